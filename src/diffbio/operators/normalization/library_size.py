"""Library-size normalisation: what every cell would hold at one sequencing depth, on a scale of equal variance."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...errors import ConfigError
from ..base import Config, Data, Operator, checked_counts, one_of, positive

THETA = 100.0  # Lause et al. 2021
PSEUDOCOUNT = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibrarySizeConfig(Config):
    """Settings of LibrarySizeNormalizer.

    target_sum: of the shifted logarithm: total of each cell after scaling; 1e6 gives counts per million.
    pseudocount: of the logarithm: below this scaled count it is nearly linear; 1 is scanpy's log1p.
    log: whether to take the logarithm.
    method: "shifted_log" is the logarithm of scaled counts (log CPM with target_sum 1e6), "pearson_residuals" the
        analytic residuals of a negative binomial.
    theta: of the residuals: inverse overdispersion.
    learnable: makes the exponent of the library size and the pseudocount weights to train.
    """

    target_sum: float = positive(1e4)
    pseudocount: float = positive(PSEUDOCOUNT)
    log: bool = True
    method: str = one_of("shifted_log", "pearson_residuals")
    theta: float = positive(THETA)
    learnable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "shifted_log" and self.theta != THETA:
            msg = f"LibrarySizeConfig.theta is for method='pearson_residuals'; it is {self.theta} without."
            raise ConfigError(msg)
        if self.method != "shifted_log":
            for f in dataclasses.fields(self):
                if f.name not in ("method", "theta") and getattr(self, f.name) != f.default:
                    msg = f"LibrarySizeConfig.{f.name} is for method='shifted_log'; Pearson residuals have no such "
                    msg += f"part, and it is {getattr(self, f.name)}."
                    raise ConfigError(msg)
        if self.learnable and not self.log:
            msg = "LibrarySizeConfig.log must be True with learnable=True: the pseudocount is inside the logarithm."
            raise ConfigError(msg)
        if self.pseudocount != PSEUDOCOUNT and not self.log:
            msg = f"LibrarySizeConfig.pseudocount is for log=True; it is {self.pseudocount} with log=False."
            raise ConfigError(msg)


class NormalizedCounts(TypedDict):
    """normalized: scaled, logarithmic expression, 0 where the count is 0; or residuals."""

    normalized: Float[Array, "cells genes"]


class LibrarySizeNormalizer(Operator):
    """Scales counts to one total per cell and takes the log: log(1 + x_ij (target_sum / l_i)^a / p).

    With the defaults, a = 1 and p = 1, this is scanpy's `normalize_total(target_sum=1e4)` and `log1p`. With another
    pseudocount p it is log(y + p) - log(p): the shifted logarithm, moved so that zero stays zero. A cell without
    counts stays zero. Pearson residuals are (x - mu) / sqrt(mu + mu² / theta), clipped at ±sqrt(cells), with mu the
    cell's total times the gene's share of all counts (Lause, Berens & Kobak 2021, eq. 4 and 5).

    learnable=True makes a and log p weights that start at a = 1 and the setting's p: scanpy's normalisation before
    training, for a task behind it or `diffbio.fit` to move (a learnable normalisation with two parameters). a = 0
    leaves the depth in. `objective` asks for the two things that a transformation is for (Ahlmann-Eltze & Huber 2023):
    values that do not follow the depth, and a variance that does not follow the mean.
    """

    config: LibrarySizeConfig
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 0.01, "max_epochs": 50}

    def __init__(self, config: LibrarySizeConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing random
        self.config = config
        self.size_exponent: nnx.Param[Array] | None = nnx.data(None)
        self.log_pseudocount: nnx.Param[Array] | None = nnx.data(None)
        if config.learnable:
            self.size_exponent = nnx.Param(jnp.asarray(1.0))
            self.log_pseudocount = nnx.Param(jnp.log(jnp.asarray(config.pseudocount)))
            self.fitted = False

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        library_size: Float[Array, " cells"] | None = None,
        gene_share: Float[Array, " genes"] | None = None,
    ) -> NormalizedCounts:
        """Normalises the cells.

        Args:
            counts: as measured.
            library_size: total of each cell over all its genes, where `counts` hold a part; else their sum.
            gene_share: of Pearson residuals: share of each gene in all counts, where `counts` hold a part of the
                cells; else theirs.

        Raises:
            DataError: counts, totals or shares that are negative or not finite.
        """
        who = "LibrarySizeNormalizer"
        counts = checked_counts(who, counts)
        if library_size is not None:
            library_size = checked_counts(who, library_size, key="library_size", fix="pass sums of raw counts")
        if gene_share is not None:
            gene_share = checked_counts(who, gene_share, key="gene_share", fix="pass fractions of all counts")
        total = counts.sum(axis=1) if library_size is None else library_size.astype(counts.dtype)
        if self.config.method == "pearson_residuals":
            return {"normalized": _residuals(counts, total, gene_share, self.config.theta)}
        ratio = self.config.target_sum / jnp.where(total > 0, total, 1.0)
        pseudocount: Array | float = self.config.pseudocount
        if self.size_exponent is not None and self.log_pseudocount is not None:
            ratio = ratio ** self.size_exponent[...].astype(counts.dtype)
            pseudocount = jnp.exp(self.log_pseudocount[...].astype(counts.dtype))
        return {"normalized": _scaled(counts, ratio, pseudocount, log=self.config.log)}

    @property
    def objective(self) -> Callable[..., tuple[Array, dict[str, Array]]]:
        """Of a learnable normaliser, see the class; the others have nothing to train."""
        if self.size_exponent is None:
            msg = "LibrarySizeNormalizer: nothing to train without learnable=True."
            raise AttributeError(msg)
        return self._objective

    def _objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Mean squared correlation of genes with log depth, plus that of the genes' variances with their means."""
        inputs = self._inputs(data)
        values = self(**inputs)["normalized"]
        total = inputs["library_size"] if "library_size" in inputs else inputs["counts"].sum(axis=1)
        depth = _squared_correlation(values, jnp.log1p(total)[:, None]).mean()
        mean, variance = values.mean(axis=0), values.var(axis=0)
        stability = _squared_correlation(variance[:, None], mean[:, None])[0]
        return depth + stability, {"depth": depth, "stability": stability}

    @classmethod
    def examples(cls) -> dict[str, tuple["LibrarySizeNormalizer", Data]]:
        """Totals of the counts themselves, totals given, Pearson residuals, and a learnable one."""
        counts = jax.random.poisson(jax.random.key(0), 2.0, (12, 7)).astype(jnp.float32)
        counts = counts * jnp.arange(1, 13)[:, None]  # depths differ

        def make(**settings: Any) -> "LibrarySizeNormalizer":
            return cls(LibrarySizeConfig(**settings), rngs=nnx.Rngs(0))

        return {
            "own_totals": (make(), {"counts": counts}),
            "given_totals": (make(pseudocount=0.5), {"counts": counts, "library_size": 2 * counts.sum(1) + 1}),
            "pearson_residuals": (make(method="pearson_residuals", theta=10.0), {"counts": counts}),
            "learnable": (make(learnable=True), {"counts": counts}),
        }


@functools.partial(jax.jit, static_argnames="log")  # one pass: no copy of the size of the counts but the result
def _scaled(counts: Array, ratio: Array, pseudocount: Array | float, *, log: bool) -> Array:
    scaled = counts * ratio[:, None]
    return jnp.log1p(scaled / pseudocount) if log else scaled


@jax.jit
def _residuals(counts: Array, total: Array, gene_share: Array | None, theta: float | Array) -> Array:
    columns = counts.sum(axis=0)
    share = columns / jnp.maximum(columns.sum(), 1.0) if gene_share is None else gene_share.astype(counts.dtype)
    mean = total[:, None] * share
    expected = mean > 0
    sd = jnp.sqrt(jnp.where(expected, mean + mean**2 / theta, 1.0))
    limit = counts.shape[0] ** 0.5
    return jnp.where(expected, jnp.clip((counts - mean) / sd, -limit, limit), 0.0)


def _squared_correlation(a: Array, b: Array) -> Array:
    """r² of the columns of `a` with those of `b`; 0 where one is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    product = (a * b).mean(axis=0) ** 2
    scale = (a**2).mean(axis=0) * (b**2).mean(axis=0)
    return jnp.where(scale > 0, product / jnp.where(scale > 0, scale, 1.0), 0.0)
