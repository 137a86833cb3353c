"""How the models are trained: scvi-tools' arguments in terms of `diffbio.train`."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ..errors import ConfigError
from ..nn.scvi import SCVI
from ..parallel import Devices, Part
from ..train import Schedule, Settings, Split
from .peer import devices_of, merged, refuse

OPTIMIZERS = ("Adam", "AdamW")


class Plan(NamedTuple):
    """What `plan_kwargs` asked for."""

    optimizer: optax.GradientTransformation
    schedules: dict[str, Schedule]


def plan_of(
    defaults: Mapping[str, Any],
    plan_kwargs: Mapping[str, Any] | None,
    *,
    max_epochs: int,
    steps_per_epoch: int,
    told: Mapping[tuple[Any, ...], int] | None = None,
) -> Plan:
    """Optimizer and schedules of a training run.

    told: of `told_rows`; decay_matrices_only leaves them without decay.

    A warm-up of the default length takes at most a quarter of max_epochs, so that it ends before training does.

    plan_kwargs, beside what `defaults` names: n_steps_kl_warmup counts the warm-up in minibatches and goes
    before n_epochs_kl_warmup; optimizer may be any optax optimizer, which settles the rate by itself.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """
    known = {*PLAN_KEYS, "n_steps_kl_warmup"} | ({"classification_ratio"} & set(defaults))
    for name, (idle, hint) in NOT_PLANNED.items():
        if name in (plan_kwargs or {}):
            value = (plan_kwargs or {})[name]
            if not any(value is v for v in idle):
                msg = f"train: plan_kwargs {name}={value!r:.60} is of scvi-tools and not of diffbio: {hint}."
                raise ConfigError(msg)
            plan_kwargs = {key: v for key, v in (plan_kwargs or {}).items() if key != name}
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
    for key in NOT_NEGATIVE:
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
    return Plan(_optimizer(plan, max_epochs * steps_per_epoch, told or {}), schedules)


PLAN_KEYS = (
    "optimizer", "lr", "lr_schedule", "lr_warmup", "eps", "weight_decay", "decay_matrices_only", "encoder_decay",
    "n_epochs_kl_warmup", "min_kl_weight", "max_kl_weight",
)
NOT_NEGATIVE = (
    "lr", "eps", "weight_decay", "encoder_decay", "lr_warmup", "min_kl_weight", "max_kl_weight", "classification_ratio",
)
# plan_kwargs of scvi-tools that have no counterpart: values at which they change nothing, and what to do instead
NOT_PLANNED: dict[str, tuple[tuple[Any, ...], str]] = {
    "reduce_lr_on_plateau": ((False, None), "lr_schedule='cosine' lets the rate fall to 0 over max_epochs"),
    **dict.fromkeys(
        ("lr_factor", "lr_patience", "lr_threshold", "lr_scheduler_metric", "lr_min"),
        ((None,), "they are of reduce_lr_on_plateau, in place of which lr_schedule='cosine' lowers the rate"),
    ),
    "update_only_decoder": ((False, None), "load_query_data trains the new weights alone"),
    "optimizer_creator": ((None,), "pass an optax optimizer as plan_kwargs optimizer"),
    "compile": ((False, True, None), "every step is compiled"),
    "compile_kwargs": ((None,), "every step is compiled by XLA"),
    "on_step": ((None,), "history has one row per epoch"),
    "on_epoch": ((None, True), "history has one row per epoch"),
}
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
    live: what does not, all the same: 'dropout', 'batchnorm_encoder', 'batchnorm_decoder'.
    """

    def __init__(self, module: SCVI, *, config: str, only_new: bool, live: tuple[str, ...] = ()) -> None:
        self.module, self.config, self.only_new, self.live = module, config, only_new, live

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
            if "dropout" in self.live:
                self.module.vae.set_attributes(nnx.Dropout, deterministic=False, raise_if_not_found=False)
            for part in ("encoder", "decoder"):
                if f"batchnorm_{part}" in self.live:
                    inside = getattr(self.module.vae, part)
                    inside.set_attributes(nnx.BatchNorm, use_running_average=False, raise_if_not_found=False)

    def eval_mode(self) -> None:
        """Sampling, dropout and batch statistics off."""
        self.module.eval()


def masked(optimizer: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """`optimizer` whose updates count only where `mask`, of the parameters' structure, is 1."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, m: jnp.where(m > 0, u, 0.0), updates, mask), state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), update))


ENCODER = ("module", "vae", "encoder")  # of a `Trainee`


def told_rows(module: SCVI) -> dict[tuple[Any, ...], int]:
    """How many rows, the last ones, of which kernels of a `Trainee` are for what the decoder is told of batch and
    categories.
    """  # noqa: D205
    network = module.vae.decoder.network
    blocks = range(len(network.blocks) if network.deep else min(1, len(network.blocks)))
    at = ("module", "vae", "decoder", "network", "blocks")
    return {(*at, i, "linear", "kernel"): network.n_covariates for i in blocks if network.n_covariates}


def start_told(module: SCVI) -> None:
    """Lets batch and categories weigh as much as all of z in an untrained decoder: their rows times sqrt(width of z).

    All inputs' weights start at one variance. A one-hot of a batch has about the variance of one dimension of z, so
    that the decoder would learn the batch slower than z, and z would come to hold what the batch explains.
    """
    network = module.vae.decoder.network
    if network.n_covariates and network.blocks:
        kernel = network.blocks[0].linear.kernel
        width = kernel.shape[0] - network.n_covariates
        kernel.set_value(kernel[...].at[width:].multiply(math.sqrt(width)))


def decay(
    weight: float, *, matrices_only: bool, encoder: float, told: Mapping[tuple[Any, ...], int]
) -> optax.GradientTransformation:
    """Adds `weight` times the parameter to each gradient; in the encoder of z `encoder` times that.

    matrices_only: of the kernels of linear layers alone, not of biases, norms and dispersions, and not of the rows
        `told`: a decoder that is not let to say what a batch changes has z say it.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        flat = dict(nnx.to_flat_state(updates))
        for path, param in nnx.to_flat_state(params):
            if matrices_only and path[-1] != "kernel":
                continue
            pulled = weight * (encoder if path[:3] == ENCODER else 1.0) * param[...]
            if matrices_only and path in told:
                pulled = pulled.at[-told[path] :].set(0.0)
            flat[path] = flat[path].replace(flat[path][...] + pulled)
        return nnx.from_flat_state(list(flat.items())), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rate(plan: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Rises from a tenth of lr over the share lr_warmup of all steps, then stays ('constant') or falls to 0."""
    rise = int(plan["lr_warmup"] * steps)
    then = optax.constant_schedule(plan["lr"])
    if plan["lr_schedule"] == "cosine":
        then = optax.cosine_decay_schedule(plan["lr"], max(1, steps - rise))
    return optax.join_schedules([optax.linear_schedule(0.1 * plan["lr"], plan["lr"], max(1, rise)), then], [rise])


def _optimizer(
    plan: Mapping[str, Any], steps: int, told: Mapping[tuple[Any, ...], int]
) -> optax.GradientTransformation:
    if not isinstance(plan["optimizer"], str):
        given: optax.GradientTransformation = plan["optimizer"]
        return given
    pull = decay(
        plan["weight_decay"], matrices_only=plan["decay_matrices_only"], encoder=plan["encoder_decay"], told=told
    )
    moments = optax.scale_by_adam(eps=plan["eps"])
    # torch's Adam adds the decay to the gradient
    inner = (moments, pull) if plan["optimizer"] == "AdamW" else (pull, moments)
    return optax.chain(*inner, optax.scale_by_learning_rate(_rate(plan, steps)))


class Run(NamedTuple):
    """A call of `train`, checked."""

    settings: Settings
    held_out: Split
    test: np.ndarray  # rows that neither train nor decide when to stop
    arranged: np.ndarray | None  # order of the cells in which `diffbio.train` splits them so; None: as they are
    plan_kwargs: dict[str, Any]
    progress: bool
    devices: Devices


def run_of(
    asked: Mapping[str, Any], defaults: Mapping[str, Any], *, n_cells: int, epochs: int, seed: int, batch_size: int
) -> Run:
    """The arguments of `SCVI.train` as `diffbio.train` takes them.

    asked: those arguments, Lightning's among them. epochs, seed, batch_size: where max_epochs, seed or batch_size is
        None.

    Raises:
        ConfigError: an argument is out of range, or of scvi-tools alone.
    """
    given = {**asked, **merged("train", asked["trainer_config"], asked["trainer_kwargs"], "trainer_config")}
    for name in ("trainer_config", "trainer_kwargs"):
        given.pop(name)
    plan = merged("train", given.pop("plan_config"), given.pop("plan_kwargs"), "plan_config")
    progress = bool(given.pop("progress")) and given.pop("enable_progress_bar", True) is not False
    every = given.pop("check_val_every_n_epoch", None)
    if every is not None and not (isinstance(every, int) and every >= 1):
        msg = f"train: check_val_every_n_epoch must be a whole number above 0, got {every!r}."
        raise ConfigError(msg)
    _check_monitor(given.pop("early_stopping_monitor", None), given.pop("early_stopping_mode", None), defaults)
    splitting = dict(given.pop("datasplitter_kwargs") or {})
    if not splitting.pop("drop_last", True):
        splitting["drop_last"] = False
    refuse("train", {"datasplitter_kwargs": splitting, "datamodule": given.pop("datamodule")})
    devices = devices_of("train", given.pop("accelerator"), given.pop("devices"))
    given.pop("load_sparse_tensor", None)  # they always are
    own = {key: given.pop(key) for key in OWN_ARGUMENTS}
    refuse("train", given)
    train_size, validation_size = _sizes(own["train_size"], own["validation_size"], defaults)
    patience = own["early_stopping_patience"]
    chosen: dict[str, Any] = {
        "max_epochs": epochs if own["max_epochs"] is None else own["max_epochs"],
        "batch_size": batch_size if own["batch_size"] is None else own["batch_size"],
        "validation": validation_size,
        "patience": (defaults["patience"] if patience is None else patience) if own["early_stopping"] else None,
        "clip_norm": own["gradient_clip_val"],
        "seed": seed if own["seed"] is None else own["seed"],
    }
    if own["early_stopping_min_delta"] is not None:
        chosen["min_delta"] = own["early_stopping_min_delta"]
    settings = Settings(**chosen)
    if own["shuffle_set_split"] and train_size + validation_size > 1 - 1e-9:
        split, test, arranged = Split.of(n_cells, settings, held_out=True), np.empty(0, int), None
    else:
        settings, split, test, arranged = _own_split(
            n_cells, settings, train_size, validation_size, shuffle=own["shuffle_set_split"]
        )
    return Run(settings, split, test, arranged, plan, progress, devices)


OWN_ARGUMENTS = (
    "max_epochs", "train_size", "validation_size", "shuffle_set_split", "batch_size", "early_stopping",
    "early_stopping_patience", "early_stopping_min_delta", "gradient_clip_val", "seed",
)


class Arranged:
    """The cells of a source in another order, or some of them."""

    def __init__(self, source: Any, rows: np.ndarray) -> None:
        self.source, self.rows, self.n_cells = source, rows, len(rows)
        self.place = np.full(source.n_cells, -1)
        self.place[rows] = np.arange(len(rows))

    def take(self, rows: np.ndarray) -> Any:
        """The cells `rows` of this order."""
        return self.source.take(self.rows[rows])

    def take_sparse(self, rows: np.ndarray) -> Any:
        """The cells `rows`, counts sparse where the source can."""
        return self.source.take_sparse(self.rows[rows])

    def order(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """As in the source beneath."""
        found: np.ndarray = self.place[self.source.order(rng, self.rows[rows])]
        return found

    def parts(self, rows: np.ndarray) -> list[Part]:
        """What a batch is made of."""
        beneath: list[Part] | None = self.source.parts(self.rows[rows]) if hasattr(self.source, "parts") else None
        return [Part("", self.source, self.rows[rows], {})] if beneath is None else beneath

    @property
    def on_disk(self) -> bool:
        """Whether the counts are."""
        return bool(self.source.on_disk)


def _own_split(
    n_cells: int, settings: Settings, train_size: float, validation_size: float, *, shuffle: bool
) -> tuple[Settings, Split, np.ndarray, np.ndarray]:
    """A split that `Split.of` would not make: in the order of the cells, or with cells left over for a test."""
    order = np.arange(n_cells)
    if shuffle:
        order = np.random.default_rng([settings.seed, 0x5EED]).permutation(n_cells)
    n_validation, n_train = round(n_cells * validation_size), max(1, round(n_cells * train_size))
    n_train = min(n_train, n_cells - n_validation)
    if n_train < 1:
        msg = f"train: train_size and validation_size leave none of {n_cells} cells to train on."
        raise ConfigError(msg)
    held_out, rest = order[:n_validation], order[n_validation:]
    used = n_validation + n_train
    settings = Settings(**{**vars(settings), "validation": n_validation / used})
    inner = Split.of(used, settings, held_out=True)
    test = np.sort(rest[n_train:])
    if inner.validation is None:  # a handful of cells
        rows = np.sort(order[:used])
        return settings, Split(rows, None), test, rows
    rows = np.empty(used, int)
    rows[inner.validation], rows[inner.train] = np.sort(held_out), np.sort(rest[:n_train])
    return settings, Split(rows[inner.train], rows[inner.validation]), test, rows


def _sizes(train_size: float | None, validation_size: float | None, defaults: Mapping[str, Any]) -> tuple[float, float]:
    """Shares of the cells to train on and to hold out."""
    if train_size is None:
        train_size = min(defaults["train_size"], 1.0 - (validation_size or 0.0))
    if not 0 < train_size <= 1:
        msg = f"train: train_size must be in (0, 1], got {train_size!r}."
        raise ConfigError(msg)
    if validation_size is None:
        return train_size, round(1.0 - train_size, 6)
    if not 0 <= validation_size < 1 or train_size + validation_size > 1 + 1e-9:
        msg = (
            f"train: validation_size must be in [0, 1) and at most 1 - train_size, got {validation_size!r} with "
            f"train_size={train_size!r}."
        )
        raise ConfigError(msg)
    return train_size, validation_size


def _check_monitor(monitor: Any, mode: Any, defaults: Mapping[str, Any]) -> None:
    # of SCVI the validation loss is the negative bound; of SCANVI the classifier's loss is in it
    known = ["validation_loss"] if "classification_ratio" in defaults else ["validation_loss", "elbo_validation"]
    if monitor is not None and monitor not in known:
        msg = f"train: early_stopping_monitor={monitor!r}: training stops by {' = '.join(known)}; leave it out."
        raise ConfigError(msg)
    if mode not in (None, "min"):
        msg = f"train: early_stopping_mode={mode!r}: a loss is better when it is smaller; leave it at 'min'."
        raise ConfigError(msg)
