"""Quality control of cells with thresholds that can be learned."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import DataError, MissingKeyError
from ...math.soft import log_gate, median_and_mad
from ..base import Config, Data, Operator, checked_counts, positive

SEEN = 0.5  # a gene is detected from half a count on: the usual rule for counts, and no jump at 0
LEAST_LOSS = 0.7  # log of the factor that a damaged cell has lost of its cytoplasm, at least: half
USUAL_MEDIAN, USUAL_MAD = (8.0, 6.7, 0.03), (0.3, 0.25, 0.01)  # before any data: log counts, log genes, share
SURELY = 1e-6  # gates closer to 1 have log(1 - gate) of this
THRESHOLDS = ("counts_min", "genes_min", "counts_max", "genes_max", "mitochondrial_max")
METRIC_OF = (0, 1, 0, 1, 2)  # the column that each of them is about


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityFilterConfig(Config):
    """Settings of `DifferentiableQualityFilter`.

    n_mads: median absolute deviations from the median at which the thresholds of counts and genes start, on a log
        scale, both sides.
    n_mads_mitochondrial: those of the mitochondrial share, above the median.
    softness: width of the gates at the start, in the same units; 0+ is the hard filter.
    """

    n_mads: float = positive(5.0)
    n_mads_mitochondrial: float = positive(3.0)
    softness: float = positive(0.5)


class CellQuality(TypedDict):
    """What `DifferentiableQualityFilter` adds."""

    cell_weights: Float[Array, " cells"]  # in [0, 1], near 1 for intact cells, 0 without counts
    passes: Int[Array, " cells"]  # 1 where there are counts and all metrics lie within the thresholds
    log_counts: Float[Array, " cells"]  # log(1 + counts)
    log_genes: Float[Array, " cells"]  # log(1 + detected genes)
    mitochondrial_fraction: Float[Array, " cells"]  # 0 where nothing is known
    thresholds: Float[Array, " limits"]  # of these: two lower, two upper, then the share's upper


class DifferentiableQualityFilter(Operator):
    """Weights each cell by the product of sigmoids of its counts, genes and mitochondrial share about thresholds.

    w_i = Π_m sigmoid(slope_m (z_im - location_m)), two-sided for log counts and log genes, one-sided for the share of
    mitochondrial counts. `init_from` puts the locations at n_mads median absolute deviations from the median, which
    is the outlier rule of Germain et al. 2020 and of the single-cell best practices (Heumos et al. 2023); as slopes
    grow the weights become that filter. `passes` is the filter itself. A cell without counts is no cell: it has
    weight 0, never passes, and has no part in medians or training.

    `objective` learns locations and slopes from what damage does: the membrane breaks, cytoplasmic RNA leaks, and
    that of mitochondria stays. Intact cells have (log cytoplasmic, log mitochondrial) counts normal about a mean with
    a covariance; damaged ones are the same cells shifted down along the first axis only, by at least a factor of 2
    and by as much as the data say, with a spread of its own. The gates are the recognition model: the loss is the
    negative evidence lower bound of this mixture with q(intact | cell i) = w_i. Small cells with the usual share, such
    as platelets, are no damaged cells under this model; a data set without damage keeps its cells. (A mixture over
    the share is the idea of miQC, Hippen et al. 2021; the shift and the gates are ours.)
    """

    config: QualityFilterConfig
    init_cells: ClassVar[int | None] = 50_000
    # 18 numbers do not overfit: no cells are held out
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 512, "learning_rate": 0.02, "max_epochs": 200, "validation": 0.0, "patience": None,
    }  # fmt: skip

    def __init__(self, config: QualityFilterConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # the start comes from data
        self.config = config
        self.median = nnx.BatchStat(jnp.array(USUAL_MEDIAN))
        self.mad = nnx.BatchStat(jnp.array(USUAL_MAD))
        far, share = config.n_mads, config.n_mads_mitochondrial
        self.location = nnx.Param(jnp.array([-far, -far, far, far, share]))  # in MADs from the median
        self.log_slope = nnx.Param(jnp.full(5, -jnp.log(config.softness)))
        # mean of the log cytoplasmic and of the log mitochondrial counts, log sds, slope of the second on the first
        self.intact = nnx.Param(jnp.array([8.0, 4.0, -1.0, -1.0, 0.3]))
        # log of the loss above the least, log of its spread, log odds of intact
        self.damage = nnx.Param(jnp.array([0.0, -0.7, 3.0]))
        self.fitted = False

    def __call__(
        self,
        counts: Float[Array, "cells genes"] | None = None,
        mitochondrial_genes: Float[Array, " genes"] | None = None,
        library_size: Float[Array, " cells"] | None = None,
        detected_genes: Float[Array, " cells"] | None = None,
        mitochondrial_share: Float[Array, " cells"] | None = None,
    ) -> CellQuality:
        """Metrics of the counts, or metrics as given; what is given wins.

        Args:
            counts: not normalised.
            mitochondrial_genes: 1 for mitochondrial genes, 0 for the others.
            library_size: counts of each cell.
            detected_genes: genes with a count in each cell.
            mitochondrial_share: fraction of each cell's counts, in [0, 1].

        Raises:
            MissingKeyError: neither counts nor library_size and detected_genes.
            DataError: values that are negative or not finite.
        """
        metrics, known = self._metrics(counts, mitochondrial_genes, library_size, detected_genes, mitochondrial_share)
        z = self._in_mads(metrics)
        margins = self._margins(z, known=known)
        about, scale = (v.astype(metrics.dtype)[jnp.array(METRIC_OF)] for v in (self.median[...], self._scale()))
        return {
            "cell_weights": jnp.where(_holds_counts(metrics), jnp.exp(self._log_weight(margins)), 0.0),
            "passes": ((margins >= 0).all(axis=1) & _holds_counts(metrics)).astype(int),
            "log_counts": metrics[:, 0],
            "log_genes": metrics[:, 1],
            "mitochondrial_fraction": metrics[:, 2],
            "thresholds": about + scale * self.location[...].astype(metrics.dtype),
        }

    def init_from(self, data: Data) -> None:
        """Thresholds at the median and MADs of the cells with counts, and the intact component at their middle.

        Raises:
            DataError: no cell has counts, or values are negative or not finite.
        """
        metrics, _ = self._metrics(**self._inputs(data))
        metrics = metrics[np.asarray(_holds_counts(metrics))]
        if not len(metrics):
            msg = f"{type(self).__name__}: none of the cells has counts, so that no threshold can be set."
            raise DataError(msg)
        found = [median_and_mad(metrics[:, k]) for k in range(3)]
        self.median[...] = jnp.stack([m for m, _ in found])
        self.mad[...] = jnp.stack([d for _, d in found])
        leaked = self._leaked(metrics)
        (c, c_mad), (m, m_mad) = (median_and_mad(leaked[:, k]) for k in range(2))
        log_sd = [jnp.log(jnp.maximum(1.4826 * mad, 0.05)) for mad in (c_mad, m_mad)]
        self.intact[...] = jnp.array([c, m, log_sd[0], log_sd[1] - 0.15, 0.5 * jnp.exp(log_sd[1] - log_sd[0])])

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Negative evidence lower bound per cell with counts of the mixture of intact and damaged; see the class."""
        metrics, known = self._metrics(**self._inputs(data))
        log_weight = self._log_weight(self._margins(self._in_mads(metrics), known=known))
        log_rest = jnp.log(-jnp.expm1(jnp.minimum(log_weight, -SURELY)))
        log_intact, log_damaged = self._mixture(self._leaked(metrics), known=known)
        weight = jnp.exp(log_weight)
        bound = weight * (log_intact - log_weight) + (1 - weight) * (log_damaged - log_rest)
        some = _holds_counts(metrics)
        n = jnp.maximum(some.sum(), 1)
        return -jnp.where(some, bound, 0.0).sum() / n, {"intact_cells": jnp.where(some, weight, 0.0).sum() / n}

    def for_training(self, data: Data) -> Data:
        """Metrics in place of the counts: an epoch then costs the number of cells only."""
        metrics, known = self._metrics(**self._inputs(data))
        if "counts" not in data:
            return data
        given = {"library_size": jnp.expm1(metrics[:, 0]), "detected_genes": jnp.expm1(metrics[:, 1])}
        given |= {"mitochondrial_share": metrics[:, 2]} if known else {}
        return {key: np.asarray(value) for key, value in given.items()}

    def _metrics(
        self,
        counts: Array | None = None,
        mitochondrial_genes: Array | None = None,
        library_size: Array | None = None,
        detected_genes: Array | None = None,
        mitochondrial_share: Array | None = None,
    ) -> tuple[Float[Array, "cells metrics"], bool]:
        """log(1 + counts), log(1 + genes), share; and whether the share is known."""
        if counts is None and (library_size is None or detected_genes is None):
            msg = "DifferentiableQualityFilter needs data['counts'], or data['library_size'] and "
            msg += "data['detected_genes']."
            raise MissingKeyError(msg)
        who, fix = type(self).__name__, "leave such cells out or compute it from raw counts"
        if counts is not None:
            checked_counts(who, counts)
        for key, values in (
            ("mitochondrial_genes", mitochondrial_genes),
            ("library_size", library_size),
            ("detected_genes", detected_genes),
            ("mitochondrial_share", mitochondrial_share),
        ):
            if values is not None:
                checked_counts(who, values, key=key, fix=fix)
        if library_size is None:
            assert counts is not None
            library_size = counts.sum(axis=1)
        if detected_genes is None:
            assert counts is not None
            detected_genes = (counts >= SEEN).sum(axis=1).astype(library_size.dtype)
        known = mitochondrial_share is not None or (mitochondrial_genes is not None and counts is not None)
        if mitochondrial_share is None:
            mitochondrial_share = jnp.zeros_like(library_size)
            if known:
                assert counts is not None
                assert mitochondrial_genes is not None
                total = jnp.where(library_size > 0, library_size, 1.0)
                mitochondrial_share = counts @ mitochondrial_genes / total
        columns = [jnp.log1p(library_size), jnp.log1p(detected_genes), mitochondrial_share]
        return jnp.stack(columns, axis=1), known

    def _scale(self) -> Array:
        """MADs, 1 where there is none: a metric that does not vary sets no narrow limit."""
        mad = self.mad[...]
        return jnp.where(mad > 0, mad, jnp.array([1.0, 1.0, 0.1], mad.dtype))

    def _in_mads(self, metrics: Float[Array, "cells metrics"]) -> Float[Array, "cells metrics"]:
        return (metrics - self.median[...].astype(metrics.dtype)) / self._scale().astype(metrics.dtype)

    def _margins(self, z: Float[Array, "cells metrics"], *, known: bool) -> Float[Array, "cells limits"]:
        """How far each metric lies inside each limit; the share has none where it is not known."""
        limits = self.location[...].astype(z.dtype)
        inside = [z[:, 0] - limits[0], z[:, 1] - limits[1], limits[2] - z[:, 0], limits[3] - z[:, 1]]
        return jnp.stack([*inside, limits[4] - z[:, 2]] if known else inside, axis=1)

    def _log_weight(self, margins: Float[Array, "cells limits"]) -> Float[Array, " cells"]:
        slope = jnp.exp(self.log_slope[...].astype(margins.dtype))[: margins.shape[1]]
        return log_gate(margins, jnp.zeros((), margins.dtype), slope).sum(axis=1)

    def _leaked(self, metrics: Float[Array, "cells metrics"]) -> Float[Array, "cells compartments"]:
        """log(1 + cytoplasmic counts), log(1 + mitochondrial counts)."""
        total, share = jnp.expm1(metrics[:, 0]), metrics[:, 2]
        return jnp.stack([jnp.log1p(total * (1 - share)), jnp.log1p(total * share)], axis=1)

    def _mixture(self, leaked: Float[Array, "cells compartments"], *, known: bool) -> tuple[Array, Array]:
        """Log joint densities of the cells' compartments with being intact, and with being damaged."""
        intact, damage = self.intact[...].astype(leaked.dtype), self.damage[...].astype(leaked.dtype)
        loss, spread = LEAST_LOSS + jnp.exp(damage[0]), jnp.exp(2 * damage[1])
        c, m = leaked[:, 0] - intact[0], leaked[:, 1] - intact[1]
        variance, rest = jnp.exp(2 * intact[2]), jnp.exp(2 * intact[3])

        def log_density(c: Array, extra: Array | float) -> Array:
            # m given c is normal about slope c; extra variance of c alone weakens that slope
            whole = variance + extra
            log_c = -0.5 * (jnp.log(whole) + c**2 / whole)
            if not known:
                return log_c
            slope = intact[4] * variance / whole
            left = rest + intact[4] ** 2 * variance * extra / whole
            return log_c - 0.5 * (jnp.log(left) + (m - slope * c) ** 2 / left)

        odds = damage[2]
        return (
            log_density(c, 0.0) + jax.nn.log_sigmoid(odds),
            log_density(c + loss, spread) + jax.nn.log_sigmoid(-odds),
        )

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableQualityFilter", Data]]:
        """Counts with the mitochondrial genes; metrics alone, started from them."""
        rng = np.random.default_rng(0)
        rate = rng.lognormal(0.8, 0.3, (16, 1)) * np.r_[np.full(10, 2.0), 1.0, 1.0]
        rate[13:, :10] *= 0.2
        counts = jnp.asarray(rng.poisson(rate), jnp.float32)
        genes = jnp.r_[jnp.zeros(10), 1.0, 1.0]
        share = counts @ genes / counts.sum(axis=1)
        metrics: Data = {
            "library_size": 30 * counts.sum(axis=1),
            "detected_genes": 20 * (counts > 0).sum(axis=1).astype(jnp.float32),
            "mitochondrial_share": share,
        }
        started = cls(QualityFilterConfig(softness=1.0), rngs=nnx.Rngs(0))
        started.init_from(metrics)
        wide = QualityFilterConfig(n_mads=12.0, n_mads_mitochondrial=12.0, softness=3.0)
        return {
            "counts": (cls(wide, rngs=nnx.Rngs(0)), {"counts": counts, "mitochondrial_genes": genes}),
            "metrics": (started, metrics),
        }


def _holds_counts(metrics: Float[Array, "cells metrics"]) -> Bool[Array, " cells"]:
    return metrics[:, 0] > 0
