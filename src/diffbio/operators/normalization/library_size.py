"""Library-size normalisation: what every cell would hold at one sequencing depth, on a log scale."""

import dataclasses
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..base import Config, Data, Operator, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibrarySizeConfig(Config):
    """Settings of LibrarySizeNormalizer.

    target_sum: total of each cell after scaling; 1e6 gives counts per million.
    pseudocount: below this scaled count the log is nearly linear; 1 is scanpy's log1p.
    log: whether to take the logarithm.
    """

    target_sum: float = positive(1e4)
    pseudocount: float = positive(1.0)
    log: bool = True


class NormalizedCounts(TypedDict):
    """normalized: scaled, logarithmic expression; 0 where the count is 0."""

    normalized: Float[Array, "cells genes"]


class LibrarySizeNormalizer(Operator):
    """Scales counts to one total per cell and takes the log: log(1 + x_ij / l_i * target_sum / pseudocount).

    With the defaults this is scanpy's `normalize_total(target_sum=1e4)` and `log1p`. With another
    pseudocount p it is log(y + p) - log(p): the shifted logarithm, moved so that zero stays zero. A cell
    without counts stays zero.
    """

    config: LibrarySizeConfig

    def __init__(self, config: LibrarySizeConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing random
        self.config = config

    def __call__(
        self, counts: Float[Array, "cells genes"], library_size: Float[Array, " cells"] | None = None
    ) -> NormalizedCounts:
        """library_size: total of each cell over all its genes, where `counts` hold a part; else their sum."""
        total = counts.sum(axis=1) if library_size is None else library_size.astype(counts.dtype)
        scaled = counts * (self.config.target_sum / jnp.where(total > 0, total, 1.0))[:, None]
        return {"normalized": jnp.log1p(scaled / self.config.pseudocount) if self.config.log else scaled}

    @classmethod
    def examples(cls) -> dict[str, tuple["LibrarySizeNormalizer", Data]]:
        """Totals of the counts themselves, totals given, and counts per million."""
        counts = jax.random.poisson(jax.random.key(0), 2.0, (12, 7)).astype(jnp.float32)

        def make(**settings: float | bool) -> "LibrarySizeNormalizer":
            return cls(LibrarySizeConfig(**settings), rngs=nnx.Rngs(0))  # type: ignore[arg-type]

        return {
            "own_totals": (make(), {"counts": counts}),
            "given_totals": (make(pseudocount=0.5), {"counts": counts, "library_size": 2 * counts.sum(1) + 1}),
            "cpm": (make(target_sum=1e6, log=False), {"counts": counts}),
        }
