"""One training loop for operators, pipelines and models: knows no model and no AnnData."""

import dataclasses
import hashlib
import inspect
import json
import numbers
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from . import storage
from .errors import ConfigError, DataWarning, ModelFileError, TrainingDivergedError
from .history import History, Progress
from .interrupts import Interrupts
from .parallel import Devices, OneDevice, in_order, layout_of
from .parallel import batch_of as batch_of

Batch = Mapping[str, Any]
Schedule = Callable[[Any], Any]

CHECKPOINT_SECONDS = 30.0  # a kill -9 loses at most this much work
STEPS_AHEAD = 16  # batches the host may prepare before it waits for the device: bounds memory


@runtime_checkable
class Source(Protocol):
    """Where batches come from: `take` gives the named cells, `order` a shuffle that is cheap to read."""

    n_cells: int

    def take(self, rows: np.ndarray) -> Batch:
        """The cells `rows`, in that order, as arrays (or `SparseRows`, made dense on the device)."""
        ...

    def order(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """`rows` shuffled."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Decides which rows make up each minibatch, where a permutation of cells will not do (UMAP's edges)."""

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers of one epoch: int (steps, batch_size)."""
        ...


class Trainable(Protocol):
    """What `train` needs of a model beside being an `nnx.Module`."""

    def objective(self, data: Any, /, **scheduled: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a batch, mean over its cells, and named parts of it."""
        ...

    def train_mode(self) -> None:
        """Sampling and dropout on."""
        ...

    def eval_mode(self) -> None:
        """Sampling and dropout off."""
        ...


_NUMBER = {True: numbers.Integral, False: numbers.Real}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    max_epochs: passes over the training cells at most.
    batch_size: cells in a minibatch; larger ones cost less per cell, and take more epochs to the same loss.
    learning_rate: of Adam, when no optimizer is given.
    validation: fraction of cells held out to decide when to stop; 0 trains on all, without early stopping.
    patience: epochs without a better validation loss before stopping; None never stops early.
    min_delta: by how much, relative to the loss, a better one must be better.
    clip_norm: largest global norm of a gradient; None does not clip.
    max_bad_steps: steps in a row with a NaN or infinite gradient (each is skipped) before giving up.
    seed: of the minibatch order and the validation split.
    """

    max_epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    validation: float = 0.1
    patience: int | None = 20
    min_delta: float = 1e-5
    clip_norm: float | None = None
    max_bad_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            whole = f.name not in {"learning_rate", "validation", "min_delta", "clip_norm"}
            missing = value is None and f.name in {"patience", "clip_norm"}
            if not missing and (isinstance(value, bool) or not isinstance(value, _NUMBER[whole])):
                msg = f"fit: {f.name} must be {'a whole number' if whole else 'a number'}, got {value!r}."
                raise ConfigError(msg)
        rules = {
            "max_epochs": (lambda: self.max_epochs >= 1, ">= 1"),
            "batch_size": (lambda: self.batch_size >= 1, ">= 1"),
            "learning_rate": (lambda: self.learning_rate > 0, "> 0"),
            "validation": (lambda: 0 <= self.validation < 1, "in [0, 1)"),
            "patience": (lambda: self.patience is None or self.patience >= 1, ">= 1 or None"),
            "min_delta": (lambda: self.min_delta >= 0, ">= 0"),
            "clip_norm": (lambda: self.clip_norm is None or self.clip_norm > 0, "> 0 or None"),
            "max_bad_steps": (lambda: self.max_bad_steps >= 1, ">= 1"),
            "seed": (lambda: self.seed >= 0, ">= 0"),
        }
        for name, (ok, wanted) in rules.items():
            if not ok():
                msg = f"fit: {name} must be {wanted}, got {getattr(self, name)!r}."
                raise ConfigError(msg)


class Carry(NamedTuple):
    """All that changes in a step, on the device."""

    params: Any
    rest: Any  # statistics and random streams
    opt_state: Any
    sums: dict[str, jax.Array]  # losses summed over the good steps of the epoch, and their number
    bad_run: jax.Array  # steps skipped in a row


@dataclasses.dataclass
class Clock:
    """Where the run stands, on the host."""

    epoch: int = 0
    step: int = 0  # within the epoch
    best_loss: float = float("inf")
    best_epoch: int = -1
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Program(NamedTuple):
    """The two compiled functions and what they report.

    step: from the leaves of a carry to those of the next, and the steps skipped in a row.
    """

    step: Callable[[list[Any], Batch, Any], tuple[list[Any], jax.Array]]
    evaluate: Callable[[Any, Any, Batch, dict[str, jax.Array]], dict[str, jax.Array]]
    metrics: tuple[str, ...]


def train(
    model: Any,
    source: Source,
    settings: Settings,
    *,
    optimizer: optax.GradientTransformation | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    sampler: Sampler | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    label: str | None = None,
    devices: Devices = None,
) -> History:
    """Minimises `model.objective` in minibatches; the model ends in eval mode with its best weights.

    `schedules` maps a keyword of `objective` to a function of the (fractional) epoch; validation uses the
    value at infinity, which must be finite, so that losses of different epochs compare. With a `sampler` there
    is no validation. With `checkpoint`, SIGINT and SIGTERM finish the step and save; `resume=True` goes on from there,
    bit-identical to a run that was never stopped. `devices` is as of `parallel.layout_of`.

    Raises:
        TrainingDivergedError: too many steps in a row had a NaN or infinite gradient.
        TrainingInterrupted: SIGINT or SIGTERM came.
        ModelFileError: the checkpoint does not belong to this model, data or settings.
        ProcessLostError: another process of this run is gone.
    """
    if not hasattr(model, "objective"):
        msg = f"fit: {type(model).__name__} has no objective: there is nothing to train."
        raise ConfigError(msg)
    schedules = dict(schedules or {})
    check_schedules(schedules, model)
    cells = Split.of(source.n_cells, settings, held_out=sampler is None)
    optimizer = _with_clipping(optimizer or optax.adam(settings.learning_rate), settings.clip_norm)
    model.train_mode()
    graph_train, params, rest = split(model)
    model.eval_mode()
    graph_eval, _, _ = split(model)
    n = min(settings.batch_size, len(cells.train)) if sampler is None else settings.batch_size
    orders = sampler or PermutedCells(source, cells.train)
    layout = layout_of(devices, n)
    probe = layout.batch(source, cells.train[np.arange(n) % len(cells.train)])
    program = compile_program(graph_train, graph_eval, optimizer, schedules, params, rest, probe, layout)
    start = _zeros(program.metrics)
    carry = Carry(_copied(params), _copied(rest), optimizer.init(params), start, jnp.zeros((), int))
    best, clock = _copied((carry.params, carry.rest)), Clock()
    identity = _identity(model, source, settings, n)
    if resume and checkpoint is not None:
        carry, best, clock = restore(checkpoint, carry, best, identity, force=force)
    layout.agree(identity, (carry, best))
    carry, best = layout.put((carry, best))
    ahead = getattr(source, "on_disk", False)

    def save() -> None:
        if checkpoint is not None and layout.writes:
            with layout.alone():
                store(checkpoint, carry, best, clock, identity)

    def batches_of(rows: Any) -> Any:
        return closing(in_order(lambda r: layout.batch(source, r), rows, ahead=ahead))

    def finish(best: Any) -> None:
        _finish(model, layout.home(best))

    saved = time.monotonic()
    shown = Progress(label or type(model).__name__, settings, progress and layout.writes)
    with Interrupts() as interrupts, shown, layout.watched():
        while clock.epoch < settings.max_epochs and not _stalled(clock, settings, cells):
            batches = orders.order(np.random.default_rng([settings.seed, clock.epoch]), n)
            started, first = time.perf_counter(), clock.step
            waiting: list[jax.Array] = []
            leaves, structure = jax.tree.flatten(carry)  # once an epoch: of a carry it takes a millisecond
            with batches_of(batches[first:]) as taken:
                for batch in taken:
                    epoch = np.float32(clock.epoch + clock.step / len(batches))
                    leaves, bad_run = program.step(leaves, batch, epoch)
                    clock.step += 1
                    waiting.append(bad_run)
                    if len(waiting) > STEPS_AHEAD:
                        waiting.pop(0).block_until_ready()
                    shown.step(clock.epoch, clock.step, len(batches), n)
                    asked = layout.asked(interrupts.signal)
                    if asked is not None:
                        interrupts.signal, carry = asked, jax.tree.unflatten(structure, leaves)
                        save()
                        finish(best if clock.best_epoch >= 0 else (carry.params, carry.rest))
                        raise interrupts.error(checkpoint)
            carry = jax.tree.unflatten(structure, leaves)
            row = layout.told(_row(carry.sums, program.metrics))
            if int(carry.bad_run) >= settings.max_bad_steps or row["good_steps"] == 0:
                finish(best)
                raise _diverged(model, clock, settings, checkpoint)
            if cells.validation is not None:
                size = min(n, len(cells.validation))
                held_out = cells.validation[: len(cells.validation) // size * size].reshape(-1, size)
                with batches_of(held_out) as taken:
                    row |= layout.told(_validated(program, carry, taken))
            row["cells_per_second"] = (clock.step - first) * n / (time.perf_counter() - started)
            clock.rows.append({"epoch": clock.epoch, **row})
            score = row.get("validation_loss", row["loss"])
            if not np.isfinite(score):
                finish(best)
                raise _diverged(model, clock, settings, checkpoint)
            if cells.validation is None or score < clock.best_loss - settings.min_delta * abs(score):
                clock.best_loss, clock.best_epoch = score, clock.epoch
                best = _copied((carry.params, carry.rest))
            carry = carry._replace(sums=layout.put(_zeros(program.metrics)))
            clock.epoch, clock.step = clock.epoch + 1, 0
            shown.epoch(clock.rows[-1])
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
        save()
        layout.wait()
    finish(best)
    return History(clock.rows, best_epoch=clock.best_epoch, stopped_early=clock.epoch < settings.max_epochs)


def check_schedules(schedules: Mapping[str, Schedule], model: Any) -> None:
    """Refuses a schedule of nothing, and one that does not settle: validation would compare nothing.

    Raises:
        ConfigError: the objective has no such keyword, or the value at infinity is not finite.
    """
    taken = inspect.signature(model.objective).parameters
    keywords = [name for name, parameter in taken.items() if parameter.kind == inspect.Parameter.KEYWORD_ONLY]
    anything = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for name, schedule in schedules.items():
        if name not in keywords and not anything:
            msg = f"fit: schedule {name!r} is no keyword of {type(model).__name__}.objective; it has {keywords}."
            raise ConfigError(msg)
        end = np.asarray(schedule(jnp.inf))
        if not np.isfinite(end).all():
            msg = (
                f"fit: schedule {name!r} is {end} at infinity, where validation reads it; let it end at a finite "
                "value: lambda epoch: jnp.minimum(1.0, epoch / 50)."
            )
            raise ConfigError(msg)


def split(model: Any) -> tuple[Any, Any, Any]:
    """Structure, parameters, and the rest: statistics and random streams."""
    parts: tuple[Any, ...] = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts
    return graph, params, rest


class Split(NamedTuple):
    """Rows to train on and rows held out."""

    train: np.ndarray
    validation: np.ndarray | None

    @classmethod
    def of(cls, n_cells: int, settings: Settings, *, held_out: bool) -> "Split":
        """A random split by the seed; a handful of cells is not split at all."""
        n_validation = round(n_cells * settings.validation) if held_out else 0
        if n_validation < 1 or n_cells < 10:
            return cls(np.arange(n_cells), None)
        if n_validation >= n_cells:
            msg = f"fit: validation {settings.validation:g} leaves none of {n_cells} cells to train on; lower it."
            raise ConfigError(msg)
        shuffled = np.random.default_rng([settings.seed, 0x5EED]).permutation(n_cells)
        return cls(np.sort(shuffled[n_validation:]), np.sort(shuffled[:n_validation]))


class PermutedCells:
    """Each epoch is a shuffle of the training cells; the last incomplete batch is left out.

    Cells of a file stand in their order within a batch, so that processes that share it read different parts.
    """

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers, int (steps, batch_size)."""
        rows = self.source.order(rng, self.rows)
        batches = rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
        return np.sort(batches, axis=1) if getattr(self.source, "on_disk", False) else batches


def compile_program(
    graph_train: Any,
    graph_eval: Any,
    optimizer: optax.GradientTransformation,
    schedules: Mapping[str, Schedule],
    params: Any,
    rest: Any,
    probe: Batch,
    layout: OneDevice,
) -> Program:
    """The training step and the validation step, each compiled once for the shapes of `probe`."""

    def loss_of(graph: Any, params: Any, rest: Any, batch: Batch, epoch: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        data = dense_on_device(batch, keep=getattr(model, "sparse_keys", frozenset()))
        loss, metrics = model.objective(data, **{name: schedule(epoch) for name, schedule in schedules.items()})
        return loss, ({"loss": loss, **metrics}, split(model)[2])

    def step(carry: Carry, batch: Batch, epoch: Any) -> Carry:
        (loss, (metrics, rest)), grads = jax.value_and_grad(
            lambda p: loss_of(graph_train, p, carry.rest, batch, epoch), has_aux=True
        )(carry.params)
        good = jnp.isfinite(loss) & _all_finite(grads)

        def updated() -> Any:
            updates, opt_state = optimizer.update(grads, carry.opt_state, carry.params)
            return jax.tree.map(jnp.add, carry.params, updates), opt_state

        # a bad step changes nothing but the random streams
        params, opt_state = jax.lax.cond(good, updated, lambda: (carry.params, carry.opt_state))
        rest = jax.tree.map(lambda new, old: jnp.where(good, new, old) if _is_float(new) else new, rest, carry.rest)
        counted = {**metrics, "good_steps": 1.0, "skipped_steps": 0.0}
        skipped = {**dict.fromkeys(metrics, 0.0), "good_steps": 0.0, "skipped_steps": 1.0}
        sums = {k: carry.sums[k] + jnp.where(good, counted[k], skipped[k]) for k in carry.sums}
        return Carry(params, rest, opt_state, sums, bad_run=jnp.where(good, 0, carry.bad_run + 1))

    def evaluate(params: Any, rest: Any, batch: Batch, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, (metrics, _) = loss_of(graph_eval, params, rest, batch, jnp.inf)
        return {k: sums[k] + v for k, v in {**metrics, "good_steps": 1.0, "skipped_steps": 0.0}.items()}

    shapes = jax.eval_shape(lambda b: loss_of(graph_train, params, rest, b, np.float32(0)), probe)
    names = tuple(shapes[1][0])
    opt_state = jax.eval_shape(optimizer.init, params)
    structure = jax.tree.structure(Carry(params, rest, opt_state, _zeros(names), jnp.zeros((), int)))

    def flat_step(leaves: list[Any], batch: Batch, epoch: Any) -> tuple[list[Any], jax.Array]:
        carry = step(jax.tree.unflatten(structure, leaves), batch, epoch)
        return jax.tree.leaves(carry), carry.bad_run

    return Program(jax.jit(flat_step, donate_argnums=0, **layout.jit), jax.jit(evaluate, **layout.jit), names)


def dense_on_device(batch: Batch, *, keep: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Makes sparse entries of a batch dense, except those to `keep`; inside jit a scatter on the device."""
    batch = {k: v.taken() if hasattr(v, "taken") else v for k, v in batch.items()}
    return {
        k: (v if k in keep else v.dense()) if hasattr(v, "dense") else jnp.asarray(v) for k, v in batch.items()
    }


def store(path: str | Path, carry: Carry, best: Any, clock: Clock, identity: dict[str, Any]) -> None:
    """Writes a checkpoint folder: everything the run needs to go on exactly."""
    leaves = jax.tree.leaves((carry, best))
    arrays = {f"{i:05d}": _plain(leaf) for i, leaf in enumerate(leaves)}
    storage.save_folder(path, {"kind": "checkpoint", **identity, "clock": dataclasses.asdict(clock)}, arrays)


def restore(
    path: str | Path, carry: Carry, best: Any, identity: dict[str, Any], *, force: bool = False
) -> tuple[Carry, Any, Clock]:
    """Reads a checkpoint into the shapes of `carry` and `best`; with `force` one of another config or settings.

    Raises:
        ModelFileError: it was written for another model, other data, settings or versions, naming which.
    """
    header, arrays = storage.load_folder(path)
    if header.get("kind") != "checkpoint":
        msg = f"resume: {path} holds a model, not a checkpoint of a training run."
        raise ModelFileError(msg)
    same(header, identity, path, force=force)
    leaves, tree = jax.tree.flatten((carry, best))
    if len(leaves) != len(arrays):
        msg = f"resume: {path} holds {len(arrays)} arrays, this run has {len(leaves)}: the optimizer differs."
        raise ModelFileError(msg)
    try:
        clock = Clock(**header["clock"])
        values = [_like(arrays[f"{i:05d}"], leaf) for i, leaf in enumerate(leaves)]
    except (KeyError, TypeError, ValueError) as error:
        msg = f"resume: {path} does not fit this run: {error}."
        raise ModelFileError(msg) from error
    carry, best = jax.tree.unflatten(tree, values)
    return carry, best, clock


def _validated(program: Program, carry: Carry, batches: Iterable[Batch]) -> dict[str, float]:
    sums = _zeros(program.metrics)
    for batch in batches:
        sums = program.evaluate(carry.params, carry.rest, batch, sums)
    means = _row(sums, program.metrics)
    return {f"validation_{k}": v for k, v in means.items() if k in program.metrics}


def _row(sums: dict[str, jax.Array], names: tuple[str, ...]) -> dict[str, float]:
    host = {k: float(v) for k, v in jax.device_get(sums).items()}  # the one host sync of an epoch
    good = max(host["good_steps"], 1.0)
    means = {k: host[k] / good for k in names}
    return {**means, "good_steps": host["good_steps"], "skipped_steps": host["skipped_steps"]}


def _zeros(names: tuple[str, ...]) -> dict[str, jax.Array]:
    return {k: jnp.zeros(()) for k in (*names, "good_steps", "skipped_steps")}


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.copy(), tree)  # the step donates its arguments


def _finish(model: Any, best: Any) -> None:
    params, rest = _copied(best)
    nnx.update(model, params, rest)
    model.eval_mode()


def _stalled(clock: Clock, settings: Settings, split: Split) -> bool:
    if settings.patience is None or split.validation is None or clock.best_epoch < 0:
        return False
    return clock.epoch - 1 - clock.best_epoch >= settings.patience and clock.step == 0


def _diverged(model: Any, clock: Clock, settings: Settings, checkpoint: Any) -> TrainingDivergedError:
    saved = checkpoint is not None and storage.exists(checkpoint)
    kept = f"; the last good checkpoint is {checkpoint}" if saved else ""
    return TrainingDivergedError(
        f"fit: {type(model).__name__}: {settings.max_bad_steps} steps in a row, a whole epoch or the validation had "
        f"a NaN or infinite loss or gradient in epoch {clock.epoch}; the model holds its best weights{kept}. Lower "
        f"learning_rate (now {settings.learning_rate:g}), set clip_norm, or look for extreme counts."
    )


def _with_clipping(optimizer: Any, clip_norm: float | None) -> optax.GradientTransformation:
    return optimizer if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _identity(model: Any, source: Source, settings: Settings, n: int) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on exactly: model, data, settings, versions."""
    config = getattr(model, "config", None)
    settings_used = {k: v for k, v in dataclasses.asdict(settings).items() if k not in {"max_epochs", "patience"}}
    return {
        "operator": type(model).__name__,
        "config": told(config),
        "settings": {**settings_used, "batch_size": n},
        **data_and_versions(source),
    }


def data_and_versions(source: Source) -> dict[str, str]:
    """What a run depends on beside model and settings: all of the data where the source can say so, else a sample."""
    rows = np.unique(np.linspace(0, source.n_cells - 1, min(64, source.n_cells)).astype(int))
    digest = hashlib.sha256(str(source.fingerprint() if hasattr(source, "fingerprint") else "").encode())
    for key, value in sorted(source.take(rows).items()):
        digest.update(key.encode())
        for leaf in jax.tree.leaves(value):
            digest.update(np.ascontiguousarray(leaf).tobytes())
    data = f"{source.n_cells} cells, sha256 {digest.hexdigest()[:16]}"
    return {"data": data, "versions": f"diffbio {version('diffbio')}, jax {jax.__version__}"}


def told(config: Any) -> Any:
    """A config as JSON holds it."""
    value = config if isinstance(config, str | None) else dataclasses.asdict(config)  # the models' is a text
    return json.loads(json.dumps(value, default=str))


def same(header: Mapping[str, Any], identity: Mapping[str, Any], path: str | Path, *, force: bool = False) -> None:
    """Refuses a checkpoint of another run; with `force`, another config or other settings are only warned of.

    Raises:
        ModelFileError: naming what differs, and what to do.
    """
    for name, wanted in identity.items():
        if header.get(name) != wanted:
            had = header.get(name)
            if isinstance(had, dict) and isinstance(wanted, dict):
                odd = sorted(key for key in {*had, *wanted} if had.get(key) != wanted.get(key))
                had, wanted = ({key: side.get(key) for key in odd} for side in (had, wanted))
            what = f"resume: {name} differs: the checkpoint {path} has {had}, this run has {wanted}"
            chosen = name in {"config", "settings"}
            if force and chosen:
                warnings.warn(f"{what}; it goes on with those of this run", DataWarning, stacklevel=2)
                continue
            other = " or go on with those of this run by force=True (--force)," if chosen else ""
            msg = f"{what}. Run with what it was made with,{other} or start anew without resume."
            raise ModelFileError(msg)


def _all_finite(tree: Any) -> jax.Array:
    # sums over one axis at a time: XLA turns a sum over both into windows, ten times as slow on a CPU
    rows = [jax.lax.optimization_barrier(x.sum(0) if x.ndim else x) for x in jax.tree.leaves(tree)]
    return jnp.isfinite(sum((x.sum() for x in rows), start=jnp.zeros(())))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _plain(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _like(value: np.ndarray, leaf: Any) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
    if value.shape != leaf.shape:
        msg = f"an array has shape {value.shape}, expected {leaf.shape}"
        raise ValueError(msg)
    return jnp.asarray(value, leaf.dtype)
