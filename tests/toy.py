"""A small trainable operator with dropout and a running statistic, for the tests of the training loop."""

import dataclasses
from typing import ClassVar, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffbio.operators.base import Config, Operator, fraction, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    """Settings of `Toy`.

    n_genes: width of the data.
    n_latent: width of the code.
    dropout_rate: chance to drop a code entry in training.
    """

    n_genes: int = positive(6)
    n_latent: int = positive(2)
    dropout_rate: float = fraction(0.2)


class Coded(TypedDict):
    latent: Float[Array, "cells latent"]


class Toy(Operator):
    """A linear autoencoder."""

    fit_defaults: ClassVar[dict] = {"max_epochs": 6, "batch_size": 16, "learning_rate": 1e-2}
    schedules: ClassVar[dict] = {"weight": lambda epoch: jnp.minimum(1.0, (epoch + 1) / 3)}

    def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.fitted = False
        key = rngs.params()
        self.weights = nnx.Param(jax.random.normal(key, (config.n_genes, config.n_latent)) * 0.3)
        self.back = nnx.Param(jnp.zeros((config.n_latent, config.n_genes)))
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs, deterministic=True)

    def __call__(self, counts: Float[Array, "cells genes"]) -> Coded:
        return {"latent": counts @ self.weights[...]}

    def objective(self, data, *, weight=1.0):
        if self.training:
            self.seen[...] = self.seen[...] + 1
        code = self.dropout(data["counts"] @ self.weights[...])
        error = ((code @ self.back[...] - data["counts"]) ** 2).sum(-1).mean()
        return error + 1e-3 * weight * (code**2).sum(-1).mean(), {"error": error}

    @classmethod
    def examples(cls):
        data = {"counts": jax.random.poisson(jax.random.key(0), 2.0, (12, 6)).astype(jnp.float32)}
        return {"toy": (cls(ToyConfig(), rngs=nnx.Rngs(0)), data)}
