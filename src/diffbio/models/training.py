"""How the models are trained: scvi-tools' plan arguments in terms of `diffbio.train`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..errors import ConfigError
from ..nn.scvi import SCVI
from ..train import Schedule

OPTIMIZERS = ("Adam", "AdamW")


class Plan(NamedTuple):
    """What `plan_kwargs` asked for."""

    optimizer: optax.GradientTransformation
    schedules: dict[str, Schedule]


def plan_of(
    defaults: Mapping[str, Any], plan_kwargs: Mapping[str, Any] | None, *, max_epochs: int, steps_per_epoch: int
) -> Plan:
    """Optimizer and schedules of a training run.

    A warm-up of the default length takes at most a quarter of max_epochs, so that it ends before training does.

    plan_kwargs, beside what `defaults` names: n_steps_kl_warmup counts the warm-up in minibatches and goes
    before n_epochs_kl_warmup; optimizer may be any optax optimizer, which settles the rate by itself.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """
    known = {*PLAN_KEYS, "n_steps_kl_warmup"} | ({"classification_ratio"} & set(defaults))
    if unknown := sorted(set(plan_kwargs or {}) - known):
        msg = f"train: unknown plan_kwargs {unknown}; known are {', '.join(sorted(known))}."
        raise ConfigError(msg)
    plan = {key: defaults[key] for key in known if key in defaults} | dict(plan_kwargs or {})
    if isinstance(plan["optimizer"], str) and plan["optimizer"] not in OPTIMIZERS:
        msg = f"train: optimizer must be an optax optimizer or one of {OPTIMIZERS}, got {plan['optimizer']!r}."
        raise ConfigError(msg)
    if plan["lr_schedule"] not in RATES:
        msg = f"train: lr_schedule must be one of {RATES}, got {plan['lr_schedule']!r}."
        raise ConfigError(msg)
    for key in ("lr", "eps", "weight_decay", "lr_warmup", "min_kl_weight", "max_kl_weight", "classification_ratio"):
        if plan.get(key, 0.0) < 0 or (key in {"lr", "eps"} and not plan[key] > 0):
            msg = f"train: {key} must be {'above 0' if key in {'lr', 'eps'} else 'at least 0'}, got {plan[key]!r}."
            raise ConfigError(msg)
    epochs = plan["n_epochs_kl_warmup"]
    if epochs and "n_epochs_kl_warmup" not in (plan_kwargs or {}):
        epochs = min(epochs, max_epochs / 4)
    if plan.get("n_steps_kl_warmup") is not None:
        epochs = plan["n_steps_kl_warmup"] / steps_per_epoch
    schedules = {"kl_weight": warm_up(epochs, plan["min_kl_weight"], plan["max_kl_weight"])}
    if "classification_ratio" in plan:
        schedules["classification_weight"] = constant(plan["classification_ratio"])
    return Plan(_optimizer(plan, max_epochs * steps_per_epoch), schedules)


PLAN_KEYS = (
    "optimizer", "lr", "lr_schedule", "lr_warmup", "eps", "weight_decay", "decay_matrices_only",
    "n_epochs_kl_warmup", "min_kl_weight", "max_kl_weight",
)
RATES = ("cosine", "constant")


def warm_up(epochs: float | None, least: float, most: float) -> Schedule:
    """A weight that rises in a straight line from `least` at epoch 0 to `most` after `epochs`; None: no rise."""
    if not epochs:
        return constant(most)
    return lambda epoch: least + (most - least) * jnp.minimum(1.0, epoch / epochs)


def constant(value: float) -> Schedule:
    """The same weight all the time."""
    return lambda epoch: jnp.asarray(value, float)


class Trainee(nnx.Module):
    """A module as `diffbio.train` takes it.

    only_new: of a model that maps a query: everything but the draws of z stays in eval mode, so that running
        averages do not move.
    """

    def __init__(self, module: SCVI, *, config: str, only_new: bool) -> None:
        self.module, self.config, self.only_new = module, config, only_new

    @property
    def sparse_keys(self) -> frozenset[str]:
        """Inputs that may be sparse."""
        return self.module.sparse_keys

    def objective(self, data: Mapping[str, Any], **scheduled: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The module's."""
        return self.module.objective(data, **scheduled)

    def train_mode(self) -> None:
        """Sampling on, and dropout and batch statistics unless the network is frozen."""
        self.module.train()
        if self.only_new:
            self.module.eval()
            self.module.vae.sample.deterministic = False

    def eval_mode(self) -> None:
        """Sampling, dropout and batch statistics off."""
        self.module.eval()


def masked(optimizer: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`optimizer` whose updates count only where `mask`, of the parameters' structure, is 1."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, m: jnp.where(m > 0, u, 0.0), updates, mask), state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), update))


def matrices(params: Any) -> Any:
    """True for the kernels of linear layers, False for biases, norms and dispersions, in the parameters' structure."""
    flat = {path: leaf.replace(str(path[-1]) == "kernel") for path, leaf in nnx.to_flat_state(params)}
    return nnx.from_flat_state(flat)


def _rate(plan: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Rises from a tenth of lr over the share lr_warmup of all steps, then stays ('constant') or falls to 0."""
    rise = int(plan["lr_warmup"] * steps)
    then = optax.constant_schedule(plan["lr"])
    if plan["lr_schedule"] == "cosine":
        then = optax.cosine_decay_schedule(plan["lr"], max(1, steps - rise))
    return optax.join_schedules([optax.linear_schedule(0.1 * plan["lr"], plan["lr"], max(1, rise)), then], [rise])


def _optimizer(plan: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    if not isinstance(plan["optimizer"], str):
        given: optax.GradientTransformation = plan["optimizer"]
        return given
    decay, mask = plan["weight_decay"], matrices if plan["decay_matrices_only"] else None
    if plan["optimizer"] == "AdamW":
        return optax.adamw(_rate(plan, steps), eps=plan["eps"], weight_decay=decay, mask=mask)
    # torch's Adam adds the decay to the gradient
    return optax.chain(optax.add_decayed_weights(decay, mask), optax.adam(_rate(plan, steps), eps=plan["eps"]))
