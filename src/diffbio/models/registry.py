"""What `setup_anndata` notes: where a model finds its data, and which names stand behind the codes."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import pandas as pd

from ..data.source import counts_of
from ..data.validate import check_counts
from ..errors import DataError, DataWarning, MissingKeyError, ModelFileError

if TYPE_CHECKING:
    from anndata import AnnData

SETUP = "diffbio_setup"  # key in adata.uns: for each model the registry as JSON, which every file format keeps
MINIFIED = "diffbio_minified"  # key in adata.uns that says that an AnnData holds no counts any more

Names = tuple[Any, ...]  # str, int, float or bool


@dataclasses.dataclass(frozen=True)
class Registry:
    """The setup of a model, independent of the data.

    model: class name of the model.
    setup: arguments of `setup_anndata`.
    var_names: the genes, in order.
    batches: names of the batches; empty without a batch_key.
    labels: names of the cell types, without the unlabelled category.
    categories: names of every categorical covariate, by column.
    """

    model: str
    setup: dict[str, Any]
    var_names: tuple[str, ...]
    batches: Names
    labels: Names
    categories: dict[str, Names]

    @classmethod
    def of(cls, model: str, adata: "AnnData", setup: Mapping[str, Any]) -> Self:
        """Reads the names off `adata`, and checks all that a model will read.

        Raises:
            MissingKeyError: a column or layer is not there.
            DataError: the counts are none, a covariate has missing values, or a gene name repeats.
        """
        check_setup_counts(adata, setup.get("layer"))
        setup = {k: v.item() if isinstance(v, np.generic) else v for k, v in setup.items()}
        unlabelled = setup.get("unlabeled_category")
        labels = _names_of(adata, setup.get("labels_key"), "labels_key")
        if unlabelled is not None:
            labels = tuple(name for name in labels if name != unlabelled)
            if odd := [name for name in labels if str(name).lower() in NO_LABEL]:
                _warn(
                    f"obs[{setup['labels_key']!r}]: {', '.join(map(repr, odd))} counts as a cell type; "
                    f"unlabeled_category is {unlabelled!r}"
                )
            if len(labels) < 1:
                msg = f"setup_anndata: every cell of obs[{setup['labels_key']!r}] is {unlabelled!r}; label some cells."
                raise DataError(msg)
        registry = cls(
            model=model,
            setup=setup,
            var_names=tuple(map(str, adata.var_names)),
            batches=_names_of(adata, setup.get("batch_key"), "batch_key"),
            labels=labels,
            categories={
                key: _names_of(adata, key, "categorical_covariate_keys")
                for key in setup.get("categorical_covariate_keys") or ()
            },
        )
        registry.columns(adata)  # complain before training does
        return registry

    def extended(self, adata: "AnnData") -> Self:
        """The registry with the batches and categories of a query behind its own."""

        def more(known: Names, key: str | None) -> Names:
            found = _names_of(adata, key, "the reference model") if key else ()
            return known + tuple(name for name in found if name not in known)

        return dataclasses.replace(
            self,
            batches=more(self.batches, self.setup.get("batch_key")),
            categories={key: more(names, key) for key, names in self.categories.items()},
        )

    def columns(self, adata: "AnnData") -> dict[str, np.ndarray]:
        """Codes and covariates of every cell of `adata`, by the module's keys.

        Cells without a known label have the code `len(labels)`.

        Raises:
            MissingKeyError: a column is not there.
            DataError: a category that the model does not know, or a value that is missing or out of range.
        """
        found: dict[str, np.ndarray] = {}
        if self.batches:
            found["batch_labels"] = self._known_codes(adata, self.setup["batch_key"], self.batches)
        if self.labels:
            found["labels"] = self._label_codes(adata)
        if self.categories:
            codes = [self._known_codes(adata, key, names) for key, names in self.categories.items()]
            found["cat_covs"] = np.stack(codes, axis=1)
        if keys := self.setup.get("continuous_covariate_keys"):
            found["cont_covs"] = np.stack([_numbers(adata, key) for key in keys], axis=1)
        if key := self.setup.get("size_factor_key"):
            found["size_factor"] = _numbers(adata, key)
            if (found["size_factor"] <= 0).any():
                msg = f"obs[{key!r}]: size factors must be above 0, the least is {found['size_factor'].min():g}."
                raise DataError(msg)
        return found

    def batch_codes(self, batches: Any) -> np.ndarray:
        """Codes of one batch or several, given by name or by code.

        Raises:
            DataError: a batch that the model does not know.
        """
        several = batches if isinstance(batches, list | tuple | np.ndarray) else [batches]
        if not len(several):
            msg = "transform_batch: the list of batches is empty; name one at least, or pass None."
            raise DataError(msg)
        codes = []
        for batch in map(plain, several):
            if batch in self.batches:
                codes.append(self.batches.index(batch))
            elif isinstance(batch, int) and 0 <= batch < max(len(self.batches), 1):
                codes.append(batch)
            else:
                known = ", ".join(map(repr, self.batches)) or "one batch"
                msg = f"transform_batch: {batch!r} is no batch of the model, which has {known}."
                raise DataError(msg)
        return np.array(codes, np.int32)

    def gene_columns(self, gene_list: Sequence[str] | str | None) -> np.ndarray:
        """Columns of the named genes (or of the one), in the model's order, as scvi-tools has it.

        Raises:
            DataError: a gene that the model does not have, or no gene at all.
        """
        if gene_list is None:
            return np.arange(len(self.var_names))
        gene_list = [gene_list] if isinstance(gene_list, str) else list(gene_list)
        if not gene_list:
            msg = "gene_list is empty; name one gene at least, or pass None for all."
            raise DataError(msg)
        if unknown := sorted(set(gene_list) - set(self.var_names)):
            msg = f"gene_list: {', '.join(map(repr, unknown[:5]))} not among the model's {len(self.var_names)} genes."
            raise DataError(msg)
        return np.flatnonzero(np.isin(np.array(self.var_names, dtype=object), list(gene_list)))

    def store(self, adata: "AnnData") -> None:
        """Notes itself in `adata.uns`."""
        adata.uns[SETUP] = {**adata.uns.get(SETUP, {}), self.model: json.dumps(self.to_json())}

    @classmethod
    def read(cls, adata: "AnnData", model: str) -> Self:
        """What `store` noted for `model`.

        Raises:
            DataError: `setup_anndata` has not been run on `adata`.
        """
        if model not in adata.uns.get(SETUP, {}):
            msg = f"{model}: the AnnData is not set up; call {model}.setup_anndata(adata, ...) first."
            raise DataError(msg)
        return cls.from_json(json.loads(str(adata.uns[SETUP][model])))

    def __getitem__(self, name: str) -> Any:
        """What scvi-tools' registry has under `name`: 'model_name', 'setup_args', 'setup_method_name'."""
        found = {"model_name": self.model, "setup_args": self.setup, "setup_method_name": "setup_anndata"}
        if name not in found:
            msg = f"registry has no {name!r}; it has {', '.join(found)}, and batches, labels, categories as attributes"
            raise KeyError(msg)
        return found[name]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ModelFileError: an entry is missing.
        """
        try:
            return cls(
                model=value["model"],
                setup=dict(value["setup"]),
                var_names=tuple(value["var_names"]),
                batches=tuple(value["batches"]),
                labels=tuple(value["labels"]),
                categories={key: tuple(names) for key, names in value["categories"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"load: the registry of the model is damaged: {error!r}."
            raise ModelFileError(msg) from error

    def _known_codes(self, adata: "AnnData", key: str, names: Names) -> np.ndarray:
        codes, categories = _codes(_column(adata, key, self.model), names)
        if (codes == MISSING).any():
            raise _missing_value(adata, key, codes)
        if (codes < 0).any():
            unseen = [repr(c) for c in categories if c not in names]
            msg = (
                f"obs[{key!r}] holds {', '.join(unseen[:5])}, not known to the model, which has "
                f"{', '.join(map(repr, names))}; map such cells with {self.model}.load_query_data."
            )
            raise DataError(msg)
        return codes

    def _label_codes(self, adata: "AnnData") -> np.ndarray:
        key, n = self.setup["labels_key"], len(self.labels)
        if key not in adata.obs:  # a query need not be labelled
            return np.full(adata.n_obs, n, np.int32)
        codes, categories = _codes(adata.obs[key], self.labels)
        if (codes == MISSING).any():
            raise _missing_value(adata, key, codes, self.setup.get("unlabeled_category"))
        unseen = [c for c in categories if c not in self.labels and c != self.setup.get("unlabeled_category")]
        if unseen:
            shown = ", ".join(map(repr, unseen[:5]))
            _warn(f"obs[{key!r}]: {shown} not known to the model; these cells count as unlabelled")
        return np.where(codes < 0, n, codes).astype(np.int32)


UNSEEN, MISSING = -1, -2  # codes
NO_LABEL = frozenset({"", "na", "nan", "none", "unassigned", "unknown", "unlabeled", "unlabelled"})


def check_setup_counts(adata: "AnnData", layer: str | None) -> None:
    """Refuses an AnnData whose matrix does not hold counts.

    Raises:
        DataError: no such layer, values that are negative, not whole or not finite, or repeated gene names.
    """
    if MINIFIED in adata.uns:
        msg = "setup_anndata: this AnnData is minified: it holds no counts; set up the one they are in."
        raise DataError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"setup_anndata: no layer {layer!r}; layers are {layers_of(adata)}."
        raise MissingKeyError(msg)
    check_counts(
        counts_of(adata, layer=layer),
        name="X" if layer is None else f"layers[{layer!r}]",
        obs_names=adata.obs_names,
        var_names=adata.var_names,
        uns=adata.uns if layer is None else (),
    )


def layers_of(adata: "AnnData") -> str:
    """Names of the layers, for messages."""
    names: list[Any] = list(cast("Any", adata.layers))
    return ", ".join(str(name) for name in names if name is not None) or "none"  # anndata lists X as None


def plain(value: Any) -> Any:
    """A category as JSON keeps it: str, int, float or bool."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, str | int | float) else str(value)


def _column(adata: "AnnData", key: str, who: str) -> "pd.Series[Any]":
    if key not in adata.obs:
        listed = ", ".join(map(str, adata.obs.columns)) or "none"
        msg = f"{who}: obs has no column {key!r}; it has {listed}."
        raise MissingKeyError(msg)
    return adata.obs[key]


def _names_of(adata: "AnnData", key: str | None, argument: str) -> Names:
    if key is None:
        return ()
    column = pd.Categorical(_column(adata, key, argument)).remove_unused_categories()
    if (column.codes < 0).any():
        raise _missing_value(adata, key, np.where(column.codes < 0, MISSING, 0))
    if len(column.categories) == adata.n_obs >= 10:
        msg = f"{argument}: each of the {adata.n_obs} cells has its own value in obs[{key!r}]; name another column."
        raise DataError(msg)
    return tuple(map(plain, column.categories))


def _codes(column: "pd.Series[Any]", names: Names) -> tuple[np.ndarray, list[Any]]:
    """Codes of a column by `names`, UNSEEN or MISSING where there is none, and the categories it holds."""
    found = pd.Categorical(column).remove_unused_categories()
    known = {name: code for code, name in enumerate(names)}
    categories = list(map(plain, found.categories))
    lookup = np.array([*(known.get(name, UNSEEN) for name in categories), MISSING], np.int32)
    return lookup[found.codes], categories  # code -1 of a missing value picks the last


def _numbers(adata: "AnnData", key: str) -> np.ndarray:
    column = _column(adata, key, "setup_anndata")
    if not pd.api.types.is_numeric_dtype(column):
        msg = f"obs[{key!r}] has dtype {column.dtype}; numbers are needed."
        raise DataError(msg)
    values = column.to_numpy(np.float32, na_value=np.nan)
    if not np.isfinite(values).all():
        cell = int(np.argmin(np.isfinite(values)))
        msg = f"obs[{key!r}] is NaN or infinite in cell {cell} ({adata.obs_names[cell]!r})."
        raise DataError(msg)
    return values


def _missing_value(adata: "AnnData", key: str, codes: np.ndarray, unlabelled: Any = None) -> DataError:
    cell, n = int(np.argmax(codes == MISSING)), int((codes == MISSING).sum())
    fix = f"name them {unlabelled!r}, as the other unlabelled ones" if unlabelled is not None else "fill them in"
    return DataError(
        f"obs[{key!r}]: {n} of {adata.n_obs} cells have no value (NaN), the first is cell {cell} "
        f"({adata.obs_names[cell]!r}); {fix}, or drop those cells."
    )


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=4)
