"""What the models share: the data they are set up with, training, saving, minified data."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
import pandas as pd
from flax import nnx
from scipy import sparse

from ..chunks import CHUNK_CELLS, Chunk, in_chunks
from ..data.source import Source
from ..errors import ConfigError, DataError, DataWarning
from ..history import History
from ..nn.count_vae import LIKELIHOODS
from ..nn.scvi import SCVI as Module
from ..train import split, train
from . import posterior
from .cells import CellSource, cells_of, counts_of_rows, library_sizes
from .defaults import default_batch_size, scvi_epochs
from .registry import MINIFIED, Registry
from .seeds import settings
from .state import flat_state as flat_state
from .state import set_state as set_state
from .training import Arranged, Run, Trainee, masked, plan_of, run_of, start_told, told_rows

if TYPE_CHECKING:
    from anndata import AnnData

MINIFIED_TYPE = "latent_posterior_parameters"
START_CELLS, START_VALUES = 4096, 10_000_000  # at most, that the outputs' start is estimated from
# scvi-tools' names of what is noted while training
HISTORY_NAMES = {"reconstruction": "reconstruction_loss", "kl": "kl_local"}
IN_FRONT = {"loss": "loss", "classification": "classification_loss", "accuracy": "accuracy"}


class Tables(dict[str, pd.DataFrame]):
    """Tables by name; one that is not there is answered with those that are."""

    def __missing__(self, name: str) -> pd.DataFrame:
        msg = f"history has no {name!r}; it has {', '.join(self) or 'nothing yet: call train()'}"
        raise KeyError(msg)


class Model:
    """A module with the AnnData it is set up with."""

    # settings of training, all in one place; those of plan_kwargs among them
    fit_defaults: ClassVar[Mapping[str, Any]]
    module_class: ClassVar[type[Module]]
    saved_notes: ClassVar[tuple[str, ...]] = ("train_indices", "validation_indices", "test_indices", "new_batches")
    handed_on: ClassVar[tuple[str, ...]] = ()  # attributes that a query's model has from its reference

    def __init__(
        self,
        adata: "AnnData | None",
        init: Mapping[str, Any],
        *,
        registry: Registry | None = None,
        seed: int | None = None,
    ) -> None:
        name = type(self).__name__
        if registry is None:
            if adata is None:
                msg = f"{name}: pass the AnnData that {name}.setup_anndata was called with."
                raise ConfigError(msg)
            registry = Registry.read(adata, name)
            if set(map(str, adata.var_names)) != set(registry.var_names):
                msg = f"{name}: the genes are not those that {name}.setup_anndata was called with; call it again."
                raise DataError(msg)
        if init["gene_likelihood"] not in LIKELIHOODS:
            chosen = ", ".join(map(repr, LIKELIHOODS))
            msg = f"{name}: gene_likelihood must be one of {chosen}, got {init['gene_likelihood']!r}."
            raise ConfigError(msg)
        self.registry, self.seed = registry, (settings.seed or 0) if seed is None else seed
        self.init_params: dict[str, Any] = {k: v.item() if isinstance(v, np.generic) else v for k, v in init.items()}
        self.training_history = History([])
        self.is_trained = False
        self.train_indices: np.ndarray | None = None
        self.validation_indices: np.ndarray | None = None
        self.test_indices: np.ndarray = np.empty(0, int)
        self.trainable: Any = None  # of a query model: which weights are new (1) or the reference's (0)
        self.started = False  # whether the weights have been scaled for training
        self.new_batches: np.ndarray = np.empty(0, int)  # and codes of the batches that the reference lacks
        self.live: tuple[str, ...] = ()  # and what of the network is not in eval mode while these are trained
        self.library_prior: tuple[np.ndarray, np.ndarray] | None = None
        self.adata: AnnData | None = None
        self._cells: CellSource | None = None
        if adata is not None:
            self._attach(adata)
        self.module = self._module(self.seed)

    # -- the data -------------------------------------------------------------------------------------------------

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """A table per quantity, by epoch, under scvi-tools' names: `elbo_train`, `elbo_validation`, ..."""
        rows = self.training_history.rows
        tables: dict[str, pd.DataFrame] = Tables()
        frame = pd.DataFrame(rows).set_index("epoch") if rows else pd.DataFrame()
        for start in ("", "validation_"):
            if f"{start}kl" in frame:
                frame[f"{start}elbo"] = frame[f"{start}reconstruction"] + frame[f"{start}kl"]
                frame[f"{start}kl_global"] = 0.0  # nothing is drawn for all cells together
        for column in frame.columns:
            end = "validation" if column.startswith("validation_") else "train"
            plain = column.removeprefix("validation_")
            if plain in {"good_steps", "skipped_steps", "cells_per_second"}:
                name = plain
            elif plain in IN_FRONT:
                name = f"{end}_{IN_FRONT[plain]}"
            else:
                name = f"{HISTORY_NAMES.get(plain, plain)}_{end}"
            tables[name] = frame[[column]].set_axis([name], axis=1)
        return tables

    @property
    def is_minified(self) -> bool:
        """Whether the model's AnnData holds the latent posterior only."""
        return self.adata is not None and MINIFIED in self.adata.uns

    @property
    def minified_data_type(self) -> str | None:
        """'latent_posterior_parameters', or None if the model's AnnData holds counts."""
        return MINIFIED_TYPE if self.is_minified else None

    def view_anndata_setup(
        self,
        adata: "AnnData | None" = None,
        hide_state_registries: bool = False,  # noqa: FBT001, FBT002
    ) -> pd.DataFrame:
        """What `setup_anndata` noted: for each field its key in the AnnData and how many categories it has.

        Args:
            adata: is checked against it, if given.
            hide_state_registries: leaves out the sizes.
        """
        if adata is not None:
            self.cells(adata)
        setup, registry = self.registry.setup, self.registry
        fields: list[tuple[str, Any, int]] = [
            ("counts", setup.get("layer") or "X", len(registry.var_names)),
            ("batch", setup.get("batch_key"), max(len(registry.batches), 1)),
            ("labels", setup.get("labels_key"), len(registry.labels)),
            *(("categorical covariate", key, len(names)) for key, names in registry.categories.items()),
            *(("continuous covariate", key, 1) for key in setup.get("continuous_covariate_keys") or ()),
        ]
        table = pd.DataFrame(fields, columns=["field", "key", "size"])
        return table.drop(columns="size") if hide_state_registries else table

    def cells(self, adata: "AnnData | CellSource | None" = None) -> CellSource:
        """The cells of `adata` (None: those of the model) as the module reads them.

        Args:
            adata: what this method has given is taken as it is.

        Raises:
            DataError: the model has no data, or `adata` does not fit it.
        """
        if isinstance(adata, CellSource):
            return adata
        if adata is None or adata is self.adata:
            if self._cells is None:
                msg = f"{type(self).__name__}: the model was loaded without data; pass adata=."
                raise DataError(msg)
            return self._cells
        return self._with_library_prior(cells_of(adata, self.registry))

    def _attach(self, adata: "AnnData") -> None:
        self.adata = adata
        cells = cells_of(adata, self.registry)
        if not self._observed_library and self.library_prior is None and cells.counts is not None:
            n_batches = max(len(self.registry.batches), 1)
            self.library_prior = _library_prior(cells.counts, cells.columns.get("batch_labels"), n_batches)
        self._cells = self._with_library_prior(cells)

    def _with_library_prior(self, cells: CellSource) -> CellSource:
        if self.library_prior is not None:
            batch = cells.columns.get("batch_labels", np.zeros(cells.n_cells, np.int32))
            for key, values in zip(("local_l_mean", "local_l_var"), self.library_prior, strict=True):
                cells.columns[key] = values[batch].astype(np.float32)
        return cells

    @property
    def _observed_library(self) -> bool:
        return bool(self.init_params["use_observed_lib_size"]) or "size_factor_key" in self._given_setup

    @property
    def _given_setup(self) -> set[str]:
        return {key for key, value in self.registry.setup.items() if value}

    def _module(self, seed: int) -> Module:
        """A fresh module of the sizes that registry and arguments say."""
        return self._built(self.init_params, seed)

    def _built(self, arguments: Mapping[str, Any], seed: int) -> Module:
        init = dict(arguments)
        init["reconstruction_loss"] = init.pop("gene_likelihood")
        return self.module_class(
            n_input=len(self.registry.var_names),
            n_batch=len(self.registry.batches),
            n_labels=len(self.registry.labels),
            use_size_factor="size_factor_key" in self._given_setup,
            n_cats_per_cov=tuple(len(names) for names in self.registry.categories.values()),
            n_continuous_cov=len(self.registry.setup.get("continuous_covariate_keys") or ()),
            rngs=nnx.Rngs(seed),
            **init,
        )

    # -- passes over cells ----------------------------------------------------------------------------------------

    def evaluate(
        self,
        function: Any,
        adata: "AnnData | CellSource | None" = None,
        indices: Any = None,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        arrays: Mapping[str, Any] | None = None,
        needs_counts: str | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Yields a function of `posterior` of the cells, chunk by chunk.

        Args:
            function: of (module, batch, key, **arrays, **options).
            adata: None is the model's.
            indices: of the cells, a mask, or None for all.
            batch_size: cells in a chunk.
            seed: of the draws.
            arrays: arguments that are arrays.
            needs_counts: who asks; refused for minified data.
            options: arguments that programs are compiled for.
        """
        cells = self.cells(adata)
        if batch_size is not None and batch_size < 1:
            msg = f"{type(self).__name__}: batch_size must be at least 1, got {batch_size!r}."
            raise ConfigError(msg)
        if needs_counts is not None:
            self._need_counts(cells, needs_counts)
        if not self.is_trained:
            message = f"{type(self).__name__}: the model is not trained; call train() first"
            warnings.warn(message, DataWarning, stacklevel=4)
        structure, leaves = posterior.Structure.split(self.module)
        key = jax.random.key(seed)

        def run(batch: Any, number: int) -> dict[str, jax.Array]:
            return posterior.evaluate(
                structure, leaves, batch, jax.random.fold_in(key, number), arrays or {},
                function=function, options=tuple(sorted(options.items())),
            )

        rows = rows_of(indices, cells.n_cells)
        return in_chunks(run, cells, rows=rows, chunk_cells=batch_size or CHUNK_CELLS)

    def _need_counts(self, cells: CellSource, who: str) -> None:
        if cells.counts is None:
            msg = f"{who} needs the counts, but the data are minified: they hold the latent posterior only."
            raise DataError(msg)

    # -- training -------------------------------------------------------------------------------------------------

    def _train(
        self,
        *,
        source: Any,
        run: Run,
        checkpoint: str | Path | None,
        resume: bool,
    ) -> History:
        held_out, plan_kwargs = run.held_out, run.plan_kwargs
        if resume and checkpoint is None:
            msg = "train: resume=True needs checkpoint=, the folder to go on from."
            raise ConfigError(msg)
        resume = resume and checkpoint is not None and Path(checkpoint).exists()
        n_train = len(held_out.train)
        if self.trainable is not None:  # a decay would pull the new weights away from the known ones they start at
            plan_kwargs = {"weight_decay": 0.0, **plan_kwargs}
        plan = plan_of(
            self.fit_defaults, plan_kwargs, max_epochs=run.settings.max_epochs,
            steps_per_epoch=max(1, n_train // run.settings.batch_size), told=told_rows(self.module),
        )
        if not self.is_trained and self.trainable is None and not resume:
            self._start_from(held_out.train, run.settings.seed)
        config = repr((type(self).__name__, self.init_params))
        trainee = Trainee(self.module, config=config, only_new=self.trainable is not None, live=self.live)
        optimizer = plan.optimizer
        if self.trainable is not None:
            if not any(np.any(mask) for mask in self.trainable.values()):
                msg = "train: the query has no batch or category that the reference lacks: there is nothing to train."
                raise ConfigError(msg)
            optimizer = masked(optimizer, self._mask(trainee))
        self.training_history = train(
            trainee, source if run.arranged is None else Arranged(source, run.arranged), run.settings,
            optimizer=optimizer, schedules=plan.schedules, checkpoint=checkpoint, resume=resume,
            progress=run.progress, label=type(self).__name__, devices=run.devices,
        )
        self.is_trained = True
        self.train_indices, self.validation_indices, self.test_indices = held_out.train, held_out.validation, run.test
        return self.training_history

    def _run(self, n_cells: int, asked: Mapping[str, Any]) -> Run:
        """The arguments of `train`, checked."""
        batch_size = self.fit_defaults["batch_size"]
        if self.trainable is None:
            batch_size = default_batch_size(n_cells, batch_size)
        return run_of(
            asked, self.fit_defaults, n_cells=n_cells, epochs=self._default_epochs(n_cells), seed=self.seed,
            batch_size=batch_size,
        )

    def _default_epochs(self, n_cells: int) -> int:
        return scvi_epochs(n_cells)

    def _trainable_cells(self) -> CellSource:
        cells = self.cells()
        self._need_counts(cells, f"{type(self).__name__}.train")
        columns = cells.columns
        if self.module.dispersion != "gene-label" and self.module_class is Module:
            columns = {key: value for key, value in columns.items() if key != "labels"}  # nothing reads them
        return CellSource(cells.counts, columns, cells.n_cells)

    def _start_from(self, rows: np.ndarray, seed: int) -> None:
        most = max(1, min(START_CELLS, START_VALUES // len(self.registry.var_names)))
        chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
        counts = self.cells().counts
        assert counts is not None
        held = counts_of_rows(counts, chosen)
        if not self.started:  # a run that diverged is tried again; what is set by moments may be set twice
            start_told(self.module)
        self.started = True
        self.module.start_from(np.asarray(held.toarray() if sparse.issparse(held) else held, np.float32))

    def _mask(self, trainee: Trainee) -> Any:
        params = split(trainee)[1]
        flat = dict(nnx.to_flat_state(params))
        for path, leaf in flat.items():
            flat[path] = leaf.replace(np.asarray(self.trainable["/".join(map(str, path[1:]))], np.float32))
        return nnx.from_flat_state(flat)


def rows_of(indices: Any, n_cells: int) -> np.ndarray:
    """Row numbers from indices, a mask or None.

    Raises:
        DataError: there are none, or they are out of range.
    """
    if indices is None:
        return np.arange(n_cells)
    rows = np.asarray(indices)
    if rows.dtype == bool:
        if rows.shape != (n_cells,):
            msg = f"indices: the mask has {rows.size} entries for {n_cells} cells."
            raise DataError(msg)
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu" or rows.min() < -n_cells or rows.max() >= n_cells:
        msg = f"indices must be row numbers below {n_cells} or a mask, at least one cell; got {indices!r:.80}."
        raise DataError(msg)
    return np.where(rows < 0, rows + n_cells, rows)


def setup(model: str, adata: "AnnData", arguments: Mapping[str, Any]) -> None:
    """Checks `adata` and notes how a model is to read it."""
    Registry.of(model, adata, arguments).store(adata)


def _library_prior(counts: Source, batch: np.ndarray | None, n_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the log library in every batch; 0 and 1 of a batch without cells."""
    log_size = np.log(np.maximum(library_sizes(counts), 1.0))
    batch = np.zeros(len(log_size), int) if batch is None else batch
    mean, var = np.zeros(n_batches), np.ones(n_batches)
    for code in np.unique(batch):
        mean[code], var[code] = log_size[batch == code].mean(), max(float(log_size[batch == code].var()), 1e-4)
    return mean.astype(np.float32), var.astype(np.float32)


