"""Genes brought to mean 0 and variance 1."""

import dataclasses
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..base import Config, Data, Operator, checked_finite, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalerConfig(Config):
    """Settings of `DifferentiableScaler`.

    clip: largest value in standard deviations, both sides; Seurat's 10.
    """

    clip: float = positive(10.0)


class Scaled(TypedDict):
    """scaled: mean 0 and variance 1 over the cells, then clipped; 0 for constant features."""

    scaled: Float[Array, "cells features"]


class DifferentiableScaler(Operator):
    """(x - mean) / sd of each feature over the cells, sd with n - 1, clipped: `scanpy.pp.scale(max_value=clip)`.

    Clipped on both sides, as scanpy does since 1.10 where it subtracts the mean.
    """

    config: ScalerConfig

    def __init__(self, config: ScalerConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing random
        self.config = config

    def __call__(
        self,
        features: Float[Array, "cells features"],
        mean: Float[Array, " features"] | None = None,
        sd: Float[Array, " features"] | None = None,
    ) -> Scaled:
        """mean, sd: of each feature, where `features` hold a part of the cells; else theirs."""
        features = checked_finite("DifferentiableScaler", features, key="features")
        return {"scaled": _standardized(features, mean, sd, self.config.clip)}

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableScaler", Data]]:
        """Own statistics, with a limit that some values exceed."""
        features = jax.random.normal(jax.random.key(0), (12, 5))
        return {"own": (cls(ScalerConfig(clip=1.5), rngs=nnx.Rngs(0)), {"features": features})}


@jax.jit  # one pass: no copies of the size of the data but the result
def _standardized(features: Array, mean: Array | None, sd: Array | None, clip: float | Array) -> Array:
    centred = features - (features.mean(axis=0) if mean is None else mean)
    own = (centred**2).sum(axis=0) / max(features.shape[0] - 1, 1)
    # rounding alone is no variance: it would be blown up to 1
    level = (features**2).mean(axis=0)
    varies = own > (4 * jnp.finfo(features.dtype).eps) ** 2 * level if sd is None else sd > 0
    scale = jnp.sqrt(jnp.where(varies, own, 1.0)) if sd is None else jnp.where(varies, sd, 1.0)
    return jnp.clip(jnp.where(varies, centred / scale, 0.0), -clip, clip)
