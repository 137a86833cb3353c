"""Genes chosen by stochastic gates, by whatever task is trained behind them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import ConfigError
from ...math.soft import stochastic_gate
from ..base import Config, Data, Operator, checked_finite, nonnegative, positive

UNDECIDED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StochasticGateConfig(Config):
    """Settings of `StochasticGateSelector`.

    n_genes: width of `features`.
    sigma: sd of the noise in training.
    mu_init: where all gates start, unless `init_gate` says it for each; 0.5 is undecided.
    l0_lambda: weight of the expected share of open gates in `objective`.
    """

    n_genes: int = positive(2000)
    sigma: float = positive(0.5)
    mu_init: float = UNDECIDED
    l0_lambda: float = nonnegative(1.0)


class GatedGenes(TypedDict):
    """What `StochasticGateSelector` adds."""

    gated: Float[Array, "cells genes"]  # features times gates
    gate: Float[Array, " genes"]  # in [0, 1]
    l0_penalty: Float[Array, ""]  # expected number of open gates, Σ Phi(mu / sigma)


class StochasticGateSelector(Operator):
    """Multiplies each gene by a gate clip(mu + sigma noise, 0, 1) in training, clip(mu, 0, 1) otherwise.

    Yamada et al. 2020, Feature selection using stochastic gates (eq. 4-6). Put a task's loss behind `gated` and add
    l0_penalty times its price. `objective` is for training without a task: the share of the features' variance that
    the gates take away, plus l0_lambda times the expected share of open gates; its optimum keeps the genes of more
    than l0_lambda times the average variance, as far as noise and clipping let it.
    """

    config: StochasticGateConfig
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "learning_rate": 0.02, "max_epochs": 50}

    def __init__(
        self, config: StochasticGateConfig, *, rngs: nnx.Rngs, init_gate: np.ndarray | Array | None = None
    ) -> None:
        """init_gate: gates (genes,) in [0, 1] to start from, such as a choice of genes; None is mu_init for all.

        Raises:
            ConfigError: both mu_init and init_gate are given.
        """
        if init_gate is not None and config.mu_init != UNDECIDED:
            msg = f"StochasticGateConfig.mu_init is {config.mu_init}, but init_gate says where gates start; give one."
            raise ConfigError(msg)
        self.config = config
        start = jnp.full(config.n_genes, config.mu_init) if init_gate is None else jnp.asarray(init_gate, jnp.float32)
        self.mu = nnx.Param(jnp.broadcast_to(start, (config.n_genes,)))
        self.noise = rngs.fork()
        self.fitted = False

    def __call__(self, features: Float[Array, "cells genes"]) -> GatedGenes:
        """Gated features, the gates, and the expected number of open ones."""
        features = checked_finite("StochasticGateSelector", features, key="features")
        key = self.noise.noise() if self.training else None
        gate, is_open = stochastic_gate(self.mu[...].astype(features.dtype), self.config.sigma, key)
        return {"gated": features * gate, "gate": gate, "l0_penalty": is_open.sum()}

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Share of variance taken away plus l0_lambda times the share of open gates, see the class."""
        inputs = self._inputs(data)
        found = self(**inputs)
        variance = inputs["features"].var(axis=0)
        total = variance.sum()
        lost = (variance * (1 - found["gate"]) ** 2).sum() / jnp.where(total > 0, total, 1.0)
        share = found["l0_penalty"] / self.config.n_genes
        return lost + self.config.l0_lambda * share, {"variance_lost": lost, "open_gates": found["l0_penalty"]}

    @classmethod
    def examples(cls) -> dict[str, tuple["StochasticGateSelector", Data]]:
        """Gates between open and closed."""
        op = cls(StochasticGateConfig(n_genes=4), rngs=nnx.Rngs(0), init_gate=jnp.array([0.2, 0.5, 0.6, 0.9]))
        return {"gates": (op, {"features": jax.random.normal(jax.random.key(0), (12, 4))})}
