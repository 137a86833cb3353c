"""`diffbio.fit`: data as a user has it, into the training loop."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx

from . import storage
from .chunks import drawn_rows, in_chunks, joined
from .data.file_source import FileSource
from .data.source import Source, as_source
from .data.validate import check_ambient_profile, check_counts
from .errors import ConfigError, DataWarning
from .history import History
from .operators.base import Operator, axes
from .parallel import Devices
from .train import Schedule, Settings, dense_on_device, train

if TYPE_CHECKING:
    from anndata import AnnData


def fit(
    model: Operator,
    data: "Mapping[str, Any] | AnnData | str | Path | Source",
    *,
    keys: Mapping[str, str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    devices: Devices = None,
    stages: Sequence[Any] | None = None,
    **settings: Any,
) -> History:
    """Trains an operator, a pipeline or a model on `data`; afterwards it is fitted and in eval mode.

    A start from data (`init_from`) comes first, then minibatches of `objective` with early stopping. What a
    method prefers (`fit_defaults`) holds unless `settings` say otherwise: `max_epochs`, `batch_size`,
    `learning_rate`, `validation`, `patience`, `min_delta`, `clip_norm`, `seed` (see `diffbio.train.Settings`).

    Args:
        model: changed in place.
        data: a dict of arrays (counts dense or scipy sparse), an AnnData, or a .h5ad/.zarr path that stays on
            disk; `keys` says where an AnnData or file holds each key: {"batch_labels": "obs/batch"}.
        keys: key -> place, as above; counts are "X" unless named.
        optimizer: any optax optimizer instead of Adam, or instead of the one that the method brings (`optimizer`, as of
            an adversary that takes turns); of a pipeline, for its VAE. Parameters that the model holds
            (`held_in_fit`), since their start is their optimum, are left to training loops of your own.
        schedules: keyword of the objective -> function of the epoch, such as a KL warm-up; it must end at a finite
            value.
        checkpoint: folder to save to every half minute and when SIGINT or SIGTERM comes.
        resume: goes on from `checkpoint` if it exists, bit-identical to a run that was never stopped.
        force: goes on even if the config of the model or the settings are others by now.
        progress: a bar on a terminal, a line per epoch elsewhere.
        devices: that share every minibatch: how many, -1 for all, or a list of JAX devices; None is one device, or in
            a run of several processes (`diffbio.parallel.join`) all of theirs. Not for a pipeline or a chain.
        stages: of a `Chain`: what learns when, a list of `diffbio.pipelines.Stage`.
        settings: see above. Of a pipeline, `learning_rate`, `validation` and `patience` are for ambient removal
            and the VAE, `max_epochs` is that of the VAE and a limit for the other stages. UMAP learns from pairs
            of neighbours, without a validation split.

    Raises:
        ConfigError: a setting is unknown or out of range.
        DataError: the data does not fit the model.
        TrainingDivergedError: loss or gradient stayed NaN or infinite.
        TrainingInterrupted: a signal came; the checkpoint is saved.
        ProcessLostError: another process of this run is gone.
    """
    if not isinstance(model, Operator):
        msg = f"fit: the first argument is the model to train, an Operator; got {type(model).__name__}."
        raise ConfigError(msg)
    known = set(Settings.__dataclass_fields__)
    if unknown := set(settings) - known:
        msg = f"fit: unknown setting {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}."
        raise ConfigError(msg)
    source = source_for(model, data, keys)
    if stages is not None and not hasattr(model, "terms"):
        msg = f"fit: stages are of a Chain; {type(model).__name__} has its own way, or none."
        raise ConfigError(msg)
    if hasattr(model, "fit_stages"):
        if devices is not None or jax.process_count() > 1:
            msg = f"fit: {type(model).__name__} is trained on one device; fit its operators one by one on several."
            raise ConfigError(msg)
        planned = {} if stages is None else {"stages": stages}
        history: History = model.fit_stages(
            source, **planned, optimizer=optimizer, schedules=schedules, checkpoint=checkpoint, resume=resume,
            force=force, progress=progress, settings=settings,
        )
        return history  # who has stages of its own says itself which parts have been trained
    chosen = Settings(**{**model.fit_defaults, **settings})
    model.eval_mode()
    resume = resume and checkpoint is not None and storage.exists(checkpoint)
    if hasattr(model, "init_from") and not resume:
        model.init_from(gathered(source, model.init_cells, seed=chosen.seed))
    if not hasattr(model, "objective"):
        model.mark_fitted()
        return History([])
    sampler = model.sampler(_read_by_sampler(model, source)) if hasattr(model, "sampler") else None
    optimizer = optimizer or optimizer_of(model, chosen.learning_rate)
    if model.held_in_fit:
        optimizer = _divided(model.held_in_fit, optax.set_to_zero(), optimizer or optax.adam(chosen.learning_rate))
    history = train(
        model, source, chosen, optimizer=optimizer, sampler=sampler, checkpoint=checkpoint, resume=resume, force=force,
        schedules={**getattr(model, "schedules", {}), **(schedules or {})}, progress=progress,
        devices=devices,
    )
    if hasattr(model, "finish_from"):
        model.finish_from(positions_of(model, source))
    model.mark_fitted()
    return history


def _read_by_sampler(model: Operator, source: Source) -> dict[str, np.ndarray]:
    """What the model's sampler looks at, of all cells: all keys, unless it says which (`sampler_reads`)."""
    keys = getattr(model, "sampler_reads", None)
    if keys is None or not hasattr(source, "column"):
        return gathered(source, None)
    return {key: np.asarray(source.column(key)) for key in keys}


def optimizer_of(model: Operator, learning_rate: float) -> optax.GradientTransformation | None:
    """The optimizer that a model with an `alternation` is trained by; None says the usual one."""
    turns = getattr(model, "alternation", None)
    if turns is None:
        return None
    adam = optax.adam(learning_rate, b1=turns.first_moment)
    sometimes = optax.transforms.conditionally_mask(adam, lambda step: step % turns.every == turns.every - 1)
    return _divided(turns.rare, sometimes, adam)


def _divided(
    starts: tuple[str, ...], optimizer: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optimizer` for the parameters whose path starts with one of `starts`, `others` for the rest."""

    def kind(path: Any, _leaf: Any) -> str:
        return "these" if jax.tree_util.keystr(path, simple=True, separator="/").startswith(starts) else "others"

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(kind, params)

    return optax.multi_transform({"these": optimizer, "others": others}, kinds)


def positions_of(model: Operator, source: Source) -> dict[str, np.ndarray]:
    """What `finish_from` wants to know of every cell."""
    graph, state = nnx.split(model)

    def positions(state: Any, batch: Any) -> dict[str, jax.Array]:
        return nnx.merge(graph, state).positions(dense_on_device(batch))  # type: ignore[attr-defined]

    run = jax.jit(positions)
    if not jax.eval_shape(positions, state, source.take(np.arange(1))):
        return {}
    return joined(in_chunks(lambda batch, number: run(state, batch), source))


def source_for(model: Operator, data: Any, keys: Mapping[str, str] | None = None) -> Source:
    """`data` as a `Source` of what `model` reads.

    Raises:
        MissingKeyError: a required key is absent.
        DataError: it has another kind or size than the model declares.
    """
    if isinstance(data, Mapping):
        data = model.for_training(dict(data))
    per_cell = {key for key, hint in model.requires.items() if "cells" in axes(hint)}
    places = {"counts": "X", **keys} if keys is not None else None
    whole = set(model.requires) - per_cell
    source = as_source(data, cell_keys=per_cell, constant_keys=whole, mapping=places)
    prepared = type(model).for_training is not Operator.for_training
    if not isinstance(data, Mapping) and model.graph_of_cells and prepared:
        # neighbours are those among all cells, not among a minibatch
        source = as_source(model.for_training(gathered(source, None)), cell_keys=per_cell, constant_keys=whole)
    if source is not data and "counts" in source.keys:  # a Source was made by someone who has checked
        counts = source.matrices["counts"] if isinstance(source, FileSource) else source.cells["counts"]  # type: ignore[attr-defined]
        with warnings.catch_warnings():  # cleaned counts need not be whole; empty genes and cells are no harm here
            warnings.filterwarnings("ignore", ".* no count", DataWarning)
            check_counts(counts, allow_non_integer=True)
        if "ambient_profile" in source.keys:
            profile = source.constants["ambient_profile"]  # type: ignore[attr-defined]
            source.constants["ambient_profile"] = check_ambient_profile(profile, counts.shape[1])  # type: ignore[attr-defined]
    model._inputs(dict(source.take(np.arange(min(source.n_cells, 2)))))  # complain before training does
    return source


def gathered(source: Source, n_cells: int | None, *, seed: int = 0) -> dict[str, np.ndarray]:
    """All cells, or a random `n_cells` of them, with some of every batch, as host arrays."""
    rows = np.arange(source.n_cells)
    if n_cells is not None and n_cells < source.n_cells:
        rows = drawn_rows(source, n_cells, np.random.default_rng(seed))
    return {key: np.asarray(value) for key, value in source.take(rows).items()}
