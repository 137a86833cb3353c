"""What the models share: the data they are set up with, training, saving, minified data."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import jax
import numpy as np
import pandas as pd
from flax import nnx
from scipy import sparse

from ..chunks import CHUNK_CELLS, Chunk, in_chunks, joined
from ..data.source import Source
from ..errors import ConfigError, DataError, DataWarning
from ..history import History
from ..nn.scvi import SCVI as Module
from ..parallel import Devices
from ..train import Settings, Split, split, train
from . import posterior, saved, surgery
from .cells import LATENT_MEAN, LATENT_VAR, LIBRARY, CellSource, cells_of, counts_of_rows, library_sizes
from .defaults import scvi_epochs
from .registry import MINIFIED, Registry
from .state import flat_state as flat_state
from .state import set_state as set_state
from .training import Trainee, masked, plan_of

if TYPE_CHECKING:
    from anndata import AnnData

MINIFIED_TYPE = "latent_posterior_parameters"
START_CELLS, START_VALUES = 4096, 10_000_000  # at most, that the outputs' start is estimated from
# scvi-tools' names of what is noted while training
HISTORY_NAMES = {"loss": "train_loss", "reconstruction": "reconstruction_loss", "kl": "kl_local"}


class Model:
    """A module with the AnnData it is set up with."""

    # settings of training, all in one place; those of plan_kwargs among them
    fit_defaults: ClassVar[Mapping[str, Any]]
    module_class: ClassVar[type[Module]]
    saved_notes: ClassVar[tuple[str, ...]] = ("train_indices", "validation_indices")

    def __init__(
        self, adata: "AnnData | None", init: Mapping[str, Any], *, registry: Registry | None = None, seed: int = 0
    ) -> None:
        name = type(self).__name__
        if registry is None:
            if adata is None:
                msg = f"{name}: pass the AnnData that {name}.setup_anndata was called with."
                raise ConfigError(msg)
            registry = Registry.read(adata, name)
        self.registry, self.seed = registry, seed
        self.init_params: dict[str, Any] = {k: v.item() if isinstance(v, np.generic) else v for k, v in init.items()}
        self.training_history = History([])
        self.is_trained = False
        self.train_indices: np.ndarray | None = None
        self.validation_indices: np.ndarray | None = None
        self.trainable: Any = None  # of a query model: which weights are new (1) or the reference's (0)
        self.library_prior: tuple[np.ndarray, np.ndarray] | None = None
        self.adata: AnnData | None = None
        self._cells: CellSource | None = None
        if adata is not None:
            self._attach(adata)
        self.module = self._module(seed)

    # -- the data -------------------------------------------------------------------------------------------------

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """A table per quantity, by epoch, under scvi-tools' names: `elbo_train`, `elbo_validation`, ..."""
        rows = self.training_history.rows
        tables: dict[str, pd.DataFrame] = {}
        frame = pd.DataFrame(rows).set_index("epoch") if rows else pd.DataFrame()
        for start in ("", "validation_"):
            if f"{start}kl" in frame:
                frame[f"{start}elbo"] = frame[f"{start}reconstruction"] + frame[f"{start}kl"]
        for column in frame.columns:
            end = "validation" if column.startswith("validation_") else "train"
            plain = column.removeprefix("validation_")
            if plain in {"good_steps", "skipped_steps", "cells_per_second"}:
                name = plain
            elif plain == "loss":
                name = f"{end}_loss"
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

    def view_anndata_setup(self) -> pd.DataFrame:
        """What `setup_anndata` noted: for each field its key in the AnnData and how many categories it has."""
        setup, registry = self.registry.setup, self.registry
        fields: list[tuple[str, Any, int]] = [
            ("counts", setup.get("layer") or "X", len(registry.var_names)),
            ("batch", setup.get("batch_key"), max(len(registry.batches), 1)),
            ("labels", setup.get("labels_key"), len(registry.labels)),
            *(("categorical covariate", key, len(names)) for key, names in registry.categories.items()),
            *(("continuous covariate", key, 1) for key in setup.get("continuous_covariate_keys") or ()),
        ]
        return pd.DataFrame(fields, columns=["field", "key", "size"])

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
        if needs_counts is not None:
            self._need_counts(cells, needs_counts)
        if not self.is_trained:
            message = f"{type(self).__name__}: the model is not trained; call train() first"
            warnings.warn(message, DataWarning, stacklevel=4)
        graph, state = nnx.split(self.module)
        key = jax.random.key(seed)

        def run(batch: Any, number: int) -> dict[str, jax.Array]:
            return posterior.evaluate(
                graph, state, batch, jax.random.fold_in(key, number), arrays or {},
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
        held_out: Split,
        settings: Settings,
        plan_kwargs: Mapping[str, Any] | None,
        checkpoint: str | Path | None,
        resume: bool,
        progress: bool,
        devices: Devices,
    ) -> History:
        resume = resume and checkpoint is not None and Path(checkpoint).exists()
        n_train = len(held_out.train)
        if self.trainable is not None:  # a decay would pull the new weights away from the known ones they start at
            plan_kwargs = {"weight_decay": 0.0, **(plan_kwargs or {})}
        plan = plan_of(
            self.fit_defaults, plan_kwargs, max_epochs=settings.max_epochs,
            steps_per_epoch=max(1, n_train // settings.batch_size),
        )
        if not self.is_trained and self.trainable is None and not resume:
            self._start_from(held_out.train, settings.seed)
        config = repr((type(self).__name__, self.init_params))
        trainee = Trainee(self.module, config=config, only_new=self.trainable is not None)
        optimizer = plan.optimizer
        if self.trainable is not None:
            if not any(np.any(mask) for mask in self.trainable.values()):
                msg = "train: the query has no batch or category that the reference lacks: there is nothing to train."
                raise ConfigError(msg)
            optimizer = masked(optimizer, self._mask(trainee))
        self.training_history = train(
            trainee, source, settings, optimizer=optimizer, schedules=plan.schedules,
            checkpoint=checkpoint, resume=resume, progress=progress, label=type(self).__name__,
            devices=devices,
        )
        self.is_trained = True
        self.train_indices, self.validation_indices = held_out.train, held_out.validation
        return self.training_history

    def _settings(
        self,
        *,
        max_epochs: int | None,
        train_size: float | None,
        batch_size: int | None,
        early_stopping: bool,
        early_stopping_patience: int | None,
        early_stopping_min_delta: float | None,
        gradient_clip_val: float | None,
        seed: int | None,
        n_cells: int,
    ) -> Settings:
        defaults = self.fit_defaults
        train_size = defaults["train_size"] if train_size is None else train_size
        if not 0 < train_size <= 1:
            msg = f"train: train_size must be in (0, 1], got {train_size!r}."
            raise ConfigError(msg)
        patience = defaults["patience"] if early_stopping_patience is None else early_stopping_patience
        chosen: dict[str, Any] = {
            "max_epochs": self._default_epochs(n_cells) if max_epochs is None else max_epochs,
            "batch_size": defaults["batch_size"] if batch_size is None else batch_size,
            "validation": round(1.0 - train_size, 6),
            "patience": patience if early_stopping else None,
            "clip_norm": gradient_clip_val,
            "seed": self.seed if seed is None else seed,
        }
        if early_stopping_min_delta is not None:
            chosen["min_delta"] = early_stopping_min_delta
        return Settings(**chosen)

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
        self.module.start_from(np.asarray(held.toarray() if sparse.issparse(held) else held, np.float32))

    def _mask(self, trainee: Trainee) -> Any:
        params = split(trainee)[1]
        flat = dict(nnx.to_flat_state(params))
        for path, leaf in flat.items():
            flat[path] = leaf.replace(np.asarray(self.trainable["/".join(map(str, path[1:]))], np.float32))
        return nnx.from_flat_state(flat)

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, dir_path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes settings, registry, history and weights to the folder `dir_path` (JSON and safetensors).

        Args:
            dir_path: made if it is not there.
            overwrite: replaces a model that is there.

        Raises:
            OutputError: something stands there that is not a model, or it cannot be written.
            ConfigError: a model stands there, and overwrite is off.
        """
        if not overwrite and Path(dir_path).exists():
            msg = f"save: {dir_path} exists; pass overwrite=True to replace it."
            raise ConfigError(msg)
        return saved.write(self, dir_path)

    @classmethod
    def load(cls, dir_path: str | Path, adata: "AnnData | None" = None) -> Self:
        """Reads a model that `save` wrote; no data is needed until it is asked about cells.

        Args:
            dir_path: the folder.
            adata: the data to go on with; its genes and categories have to be those of the model.

        Raises:
            ModelFileError: the folder is damaged or holds another kind of model.
            DataError: `adata` does not fit the model.
        """
        model = saved.read(cls, dir_path)
        assert isinstance(model, cls)
        if adata is not None:
            model._check_var_names(adata)
            model.registry.store(adata)
            model._attach(adata)
        return model

    def _check_var_names(self, adata: "AnnData") -> None:
        names = tuple(map(str, adata.var_names))
        if names != self.registry.var_names:
            shared = len(set(names) & set(self.registry.var_names))
            msg = (
                f"load: the AnnData has {len(names)} genes, {shared} of the model's {len(self.registry.var_names)}, "
                "or in another order; subset it to the model's genes, or use load_query_data."
            )
            raise DataError(msg)

    # -- mapping a query -------------------------------------------------------------------------------------------

    @classmethod
    def load_query_data(
        cls,
        adata: "AnnData",
        reference_model: "Self | str | Path",
        *,
        unfrozen: bool = False,
    ) -> Self:
        """A model of a query, `adata`, with the reference's weights: scArches (Lotfollahi et al. 2022).

        New batches and categories get inputs of their own, which start as an average known one; `train` of the
        new model moves their weights alone, so that reference cells keep their embedding. Genes are found by
        name. `adata` needs no setup; it may lack labels.

        Args:
            adata: the query, with the columns that the reference was set up with.
            reference_model: a model of this class, or the folder of a saved one.
            unfrozen: `train` moves all weights.

        Raises:
            DataError: the query lacks a column, or more than a fifth of the genes.
            ConfigError: the reference is of another class.

        Warns:
            DataWarning: genes are missing and taken as zero.
        """
        query = surgery.query_model(cls, adata, surgery.loaded(cls, reference_model), unfrozen=unfrozen)
        assert isinstance(query, cls)
        return query

    @classmethod
    def prepare_query_anndata(
        cls,
        adata: "AnnData",
        reference_model: "Self | str | Path",
        return_reference_var_names: bool = False,  # noqa: FBT001, FBT002 - scvi-tools' signature
        inplace: bool = True,  # noqa: FBT001, FBT002
    ) -> Any:
        """Gives `adata` the reference's genes in its order; missing ones are zero, with a warning.

        Args:
            adata: the query.
            reference_model: a model, or the folder of a saved one.
            return_reference_var_names: returns the names of the genes and does nothing else.
            inplace: changes `adata`; otherwise returns a new one.

        Raises:
            DataError: more than a fifth of the genes are missing.
        """
        return surgery.padded(
            adata, reference_model, load=cls.load, only_names=return_reference_var_names, inplace=inplace
        )

    # -- minified data --------------------------------------------------------------------------------------------

    def minify_adata(self, minified_data_type: str = MINIFIED_TYPE) -> None:
        """Replaces the model's AnnData by one with the latent posterior in place of the counts.

        `model.adata` is a new AnnData: an empty X, `obsm["X_latent_qzm"]` and `obsm["X_latent_qzv"]` (mean and
        variance of q(z | x)), `obs["diffbio_library"]`, and all of obs, var and uns. What needs counts raises
        afterwards.

        Raises:
            ConfigError: another minified_data_type.
            DataError: the data are minified already.
        """
        from anndata import AnnData

        if minified_data_type != MINIFIED_TYPE:
            msg = f"minify_adata: minified_data_type must be {MINIFIED_TYPE!r}, got {minified_data_type!r}."
            raise ConfigError(msg)
        latent = joined(self.evaluate(posterior.latents, needs_counts="minify_adata"))
        size = joined(self.evaluate(posterior.library))["mean"]
        adata = self.adata
        assert adata is not None
        small = AnnData(
            sparse.csr_matrix(adata.shape, dtype=np.float32), obs=cast("pd.DataFrame", adata.obs).copy(),
            var=cast("pd.DataFrame", adata.var).copy(), uns=dict(adata.uns), obsm=dict(cast("Any", adata.obsm)),
        )
        small.obsm[LATENT_MEAN], small.obsm[LATENT_VAR] = latent["mean"], latent["var"]
        small.obs[LIBRARY] = size
        small.uns[MINIFIED] = MINIFIED_TYPE
        self._attach(small)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.init_params.items())
        state = "trained" if self.is_trained else "not trained"
        return f"{type(self).__name__}({settings}): {len(self.registry.var_names)} genes, {state}"


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


