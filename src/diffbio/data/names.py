"""Names of genes, batches and classes: repeats refused, columns encoded, genes put in a model's order."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from scipy import sparse

from ..errors import DataError, DataWarning, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pandas as pd
    from numpy.typing import NDArray

MAX_MISSING_GENES = 0.2


def check_names(
    obs_names: Sequence[str] | pd.Index | None = None, var_names: Sequence[str] | pd.Index | None = None
) -> None:
    """Refuse repeated gene names; warn of repeated cell names, whose order is kept."""
    for names, kind in ((var_names, "gene"), (obs_names, "cell")):
        if names is None:
            continue
        listed = np.asarray(names, dtype=object)
        seen: set[str] = set()
        repeated = [str(x) for x in listed if x in seen or seen.add(x)]  # type: ignore[func-returns-value]
        if not repeated:
            continue
        message = f"{len(repeated)} {kind} names occur more than once, such as {repeated[0]!r}"
        if kind == "gene":
            msg = f"{message}; call adata.var_names_make_unique() and save, or use gene identifiers as names"
            raise DataError(msg)
        _warn(f"{message}; their order is kept")


def batch_codes(obs: pd.DataFrame, key: str) -> tuple[NDArray[np.int32], list[str]]:
    """Encode a column of `obs` as integers.

    Returns codes (cells,) in 0 ... n - 1 and the n names: those of a categorical column in its order (names
    that no cell has are left out), else sorted.

    Raises
    ------
    MissingKeyError : no such column; the columns there are get listed.
    DataError : a cell has no value, or every cell is a batch of its own.

    Warns
    -----
    DataWarning : there is only one batch, or a batch of one cell.
    """
    import pandas as pd

    column = pd.Categorical(column_of(obs, key)).remove_unused_categories()
    n_missing = int((column.codes < 0).sum())
    if n_missing:
        first = int(np.argmax(column.codes < 0))
        msg = (
            f"obs[{key!r}]: {n_missing} of {len(obs)} cells have no value, the first is cell {first} "
            f"({obs.index[first]!r}); fill them in or drop those cells"
        )
        raise DataError(msg)
    names = [str(name) for name in column.categories]
    if len(names) == 1:
        _warn(f"obs[{key!r}] holds one value, {names[0]!r}: there is nothing to correct")
        return column.codes.astype(np.int32), names
    if len(names) == len(obs):
        others = ", ".join(str(name) for name in obs.columns if name != key) or "none"
        msg = f"obs[{key!r}]: each of the {len(obs)} cells has a value of its own; name another column: {others}"
        raise DataError(msg)
    alone = [name for name, size in zip(names, np.bincount(column.codes), strict=True) if size == 1]
    if alone:
        _warn(f"obs[{key!r}]: {len(alone)} of {len(names)} batches have a single cell, such as {alone[0]!r}")
    return column.codes.astype(np.int32), names


def label_codes(
    obs: pd.DataFrame, key: str, *, unknown: Collection[str] = ("Unknown", "unknown", "NA", "nan", "")
) -> tuple[NDArray[np.int32], list[str]]:
    """Encode partly known labels as integers: -1 for a missing value or a name in `unknown`.

    Returns codes (cells,) and the names of the known classes, sorted or in the order of the categories.

    Raises
    ------
    MissingKeyError : no such column.
    DataError : no cell has a known label, or all have the same.

    Warns
    -----
    DataWarning : a class has one cell.
    """
    import pandas as pd

    column = pd.Categorical(column_of(obs, key))
    column = column.remove_categories([c for c in column.categories if str(c) in unknown])
    column = column.remove_unused_categories()
    names = [str(name) for name in column.categories]
    if len(names) < 2:
        found = f"one class, {names[0]!r}" if names else "no known label"
        msg = f"obs[{key!r}] holds {found}; at least two classes are needed; give the right column"
        raise DataError(msg)
    sizes = np.bincount(column.codes[column.codes >= 0], minlength=len(names))
    single = [name for name, size in zip(names, sizes, strict=True) if size == 1]
    if single:
        _warn(f"obs[{key!r}]: {len(single)} classes have a single cell, such as {single[0]!r}")
    return column.codes.astype(np.int32), names


def column_of(table: pd.DataFrame, key: str, where: str = "obs") -> pd.Series:
    """Return the column `key`.

    Raises
    ------
    MissingKeyError : no such column; those there are get listed.
    """
    if key not in table:
        msg = f"{where} has no column {key!r}; it has {', '.join(map(str, table.columns)) or 'none'}"
        raise MissingKeyError(msg)
    return table[key]


def encode_with(
    values: Sequence[str] | pd.Series, names: Sequence[str], key: str = "batch"
) -> NDArray[np.int32]:
    """Encode `values` (cells,) by the names a model was trained with.

    Raises
    ------
    DataError : a value the model does not know; its names are listed.
    """
    code = {str(name): index for index, name in enumerate(names)}
    unseen = sorted({str(value) for value in values} - set(code))
    if unseen:
        msg = (
            f"{key}: {', '.join(map(repr, unseen[:5]))} not known to the model, which was trained with "
            f"{', '.join(map(repr, names))}; train it on data that includes them"
        )
        raise DataError(msg)
    return np.array([code[str(value)] for value in values], np.int32)


def align_genes(var_names: Sequence[str] | pd.Index, model_genes: Sequence[str] | pd.Index) -> GeneAlignment:
    """Find the model's genes among those of new data, by name.

    Returns
    -------
    GeneAlignment : `columns` (model genes,) index into `var_names`, -1 where a gene is missing and its counts
        are to be zero; `apply(matrix)` does that.

    Raises
    ------
    DataError : repeated names, or more than 20 % of the model's genes missing.

    Warns
    -----
    DataWarning : some genes are missing.
    """
    check_names(var_names=var_names)
    position = {str(gene): index for index, gene in enumerate(var_names)}
    columns = np.array([position.get(str(gene), -1) for gene in model_genes], np.int64)
    missing = [str(gene) for gene, column in zip(model_genes, columns, strict=True) if column < 0]
    alignment = GeneAlignment(columns, missing)
    if len(missing) > MAX_MISSING_GENES * len(columns):
        msg = (
            f"{len(missing)} of the model's {len(columns)} genes are missing from the data, such as "
            f"{', '.join(missing[:3])}; use the same gene names (symbols or identifiers) as in training"
        )
        raise DataError(msg)
    if missing:
        _warn(
            f"{len(missing)} of the model's {len(columns)} genes are missing and taken as zero: {missing[:3]}"
        )
    return alignment


class GeneAlignment(NamedTuple):
    """Where the genes of a model are in new data."""

    columns: NDArray[np.int64]
    missing: list[str]

    def apply(self, matrix: Any) -> Any:
        """Return `matrix` (cells, genes of the data) with the model's genes as columns, in its order."""
        is_sparse = sparse.issparse(matrix)
        if is_sparse:
            found = np.flatnonzero(self.columns >= 0)
            ones = np.ones(len(found), matrix.dtype)
            shape = (matrix.shape[1], len(self.columns))
            pick = cast("Any", sparse.csr_array)((ones, (self.columns[found], found)), shape=shape)
            return cast("Any", sparse.csr_array)(matrix) @ pick
        dense = np.asarray(matrix)
        return np.where(self.columns >= 0, dense[:, self.columns], 0)


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)
