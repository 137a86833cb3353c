"""Checks of counts and ambient profiles. Each says what is wrong, where, and what to do."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import DataError, DataWarning
from .matrix import row_chunks
from .names import check_names

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pandas as pd
    from numpy.typing import NDArray

FLOAT32_EXACT = 2**24
INT32_LIMIT = 2**31
LOG_MAXIMUM = 20.0


def check_counts(
    matrix: Any,
    *,
    name: str = "counts",
    obs_names: Sequence[str] | pd.Index | None = None,
    var_names: Sequence[str] | pd.Index | None = None,
    uns: Collection[str] = (),
    allow_non_integer: bool = False,
) -> CountSummary:
    """Check that `matrix` (cells, genes) holds counts, in one pass over chunks of about 32 MB.

    Parameters
    ----------
    matrix
        Array, scipy sparse matrix, or `DiskMatrix` (see `counts_of`).
    name
        What the messages call it.
    obs_names, var_names
        Names of cells and genes, checked for repeats and used in messages.
    uns
        Keys of `adata.uns`: "log1p" among them says that X was log-transformed.
    allow_non_integer
        Warn about non-integer values instead of refusing them.

    Returns
    -------
    CountSummary : totals, usable as a fingerprint of the data.

    Raises
    ------
    DataError : no cells or genes; nothing but zeros; NaN or infinite, negative, non-integer or log-transformed
        values; a count above 2^31; repeated gene names.

    Warns
    -----
    DataWarning : counts above 2^24, which float32 rounds; cells or genes without a count; repeated names of
        cells.
    """
    if matrix is None:
        msg = f"{name}: the data has no matrix there; pass layer= with the name of the counts"
        raise DataError(msg)
    n_cells, n_genes = _shape(matrix, name)
    check_names(obs_names, var_names)
    place = _Place(name, obs_names, var_names)
    not_finite = _Wrong(place, "are NaN or infinite", "remove those cells or genes")
    negative = _Wrong(place, "are negative", "pass raw counts, as layer= if X is scaled")
    cells_empty, n_values, n_fractional = 0, 0, 0
    largest, total = 0.0, 0.0
    fractional: tuple[int, int, float] | None = None
    gene_seen = np.zeros(n_genes, bool)
    for start, rows in row_chunks(matrix, name=name):
        values = rows.values
        _check_dtype(values.dtype, name)
        floating = np.issubdtype(values.dtype, np.floating)
        if floating:
            not_finite.add(~np.isfinite(values), start, rows)
        negative.add(values < 0, start, rows)
        if floating:
            wrong = values != np.floor(values)
            n_wrong = int(wrong.sum())
            if n_wrong and fractional is None:
                fractional = place.locate(wrong, start, rows)
            n_fractional += n_wrong
        if values.size:
            largest = max(largest, float(values.max()))
        used = values != 0
        gene_seen[rows.columns[used]] = True
        cells_empty += int((np.diff(np.concatenate([[0], np.cumsum(used)])[rows.starts]) == 0).sum())
        n_values += int(used.sum())
        total += float(values.sum(dtype=np.float64))
    not_finite.refuse()
    negative.refuse()
    if not n_values:
        msg = f"{name}: all {n_cells} x {n_genes} values are zero; pass the layer that holds the counts (--layer)"
        raise DataError(msg)
    if fractional is not None:
        logged = largest < LOG_MAXIMUM or "log1p" in uns
        _non_integer(place, n_fractional, fractional, largest, logged=logged, allowed=allow_non_integer)
    _check_size(name, largest)
    genes_empty = int((~gene_seen).sum())
    if cells_empty:
        _warn(f"{name}: {cells_empty} of {n_cells} cells have no count; they stay zero")
    if genes_empty:
        _warn(f"{name}: {genes_empty} of {n_genes} genes have no count in any cell")
    return CountSummary(n_cells, n_genes, n_values, total, largest, cells_empty, genes_empty)


def check_ambient_profile(profile: Any, n_genes: int) -> NDArray[np.float32]:
    """Return an ambient profile (genes,) as float32 fractions that sum to 1.

    A sum below 1 is scaled to 1 with a warning: the profile was measured over genes that the data lack.

    Raises
    ------
    DataError : wrong length, NaN, negative, only zeros, or a sum above 1 by more than 1e-3.
    """
    try:
        fractions = np.asarray(profile, np.float64).ravel()
    except (TypeError, ValueError) as error:
        msg = f"ambient_profile holds no numbers ({np.asarray(profile).dtype}); give the gene fractions of the soup"
        raise DataError(msg) from error
    if fractions.shape != (n_genes,):
        problem = f"has {fractions.shape[0]} entries for {n_genes} genes"
    elif not np.isfinite(fractions).all():
        problem = f"has {int((~np.isfinite(fractions)).sum())} entries that are NaN or infinite"
    elif (fractions < 0).any():
        problem = f"is negative at gene {int(np.argmin(fractions))}"
    elif not 0.0 < fractions.sum() <= 1.0 + 1e-3:
        problem = f"sums to {fractions.sum():.6g}, not 1"
    else:
        if fractions.sum() < 1.0 - 1e-3:
            _warn(
                f"ambient_profile sums to {fractions.sum():.6g}: it was measured over more genes than the data "
                "have; it is scaled to sum to 1"
            )
        return (fractions / fractions.sum()).astype(np.float32)
    msg = f"ambient_profile {problem}; give fractions of the genes in the data, such as counts / counts.sum()"
    raise DataError(msg)


class CountSummary(NamedTuple):
    """What `check_counts` saw."""

    n_cells: int
    n_genes: int
    n_nonzero: int
    total: float
    maximum: float
    n_empty_cells: int
    n_empty_genes: int


class _Place(NamedTuple):
    """Turns positions in a chunk into words."""

    name: str
    obs_names: Any
    var_names: Any

    def locate(self, wrong: NDArray[np.bool_], start: int, rows: Any) -> tuple[int, int, float]:
        position = int(np.argmax(wrong))
        row = int(np.searchsorted(rows.starts, position, side="right")) - 1
        return start + row, int(rows.columns[position]), float(rows.values[position])

    def words(self, cell: int, gene: int) -> str:
        cell_name = "" if self.obs_names is None else f" ({self.obs_names[cell]!s})"
        gene_name = "" if self.var_names is None else f" ({self.var_names[gene]!s})"
        return f"cell {cell}{cell_name}, gene {gene}{gene_name}"


class _Wrong:
    """Counts values that are wrong in one way, and knows the first of them."""

    def __init__(self, place: _Place, what: str, how: str) -> None:
        self.place, self.what, self.how = place, what, how
        self.count = 0
        self.first = (0, 0, 0.0)

    def add(self, wrong: NDArray[np.bool_], start: int, rows: Any) -> None:
        if wrong.any():
            if not self.count:
                self.first = self.place.locate(wrong, start, rows)
            self.count += int(wrong.sum())

    def refuse(self) -> None:
        if self.count:
            cell, gene, value = self.first
            msg = (
                f"{self.place.name}: {self.count} values {self.what}; the first is {value:g} at "
                f"{self.place.words(cell, gene)}; {self.how}"
            )
            raise DataError(msg)


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)


def _shape(matrix: Any, name: str) -> tuple[int, int]:
    shape = np.shape(matrix) if not hasattr(matrix, "shape") else matrix.shape
    if len(shape) != 2:
        msg = f"{name}: has shape {tuple(shape)}; expected (cells, genes)"
        raise DataError(msg)
    for length, axis in zip(shape, ("cells", "genes"), strict=True):
        if length == 0:
            msg = f"{name}: has no {axis}, shape {tuple(shape)}; check the filters that made this data"
            raise DataError(msg)
    return int(shape[0]), int(shape[1])


def _check_dtype(dtype: np.dtype[Any], name: str) -> None:
    if dtype != np.bool_ and not np.issubdtype(dtype, np.integer) and not np.issubdtype(dtype, np.floating):
        msg = f"{name}: has dtype {dtype}; expected integers or floats"
        raise DataError(msg)


def _non_integer(
    place: _Place,
    n_wrong: int,
    first: tuple[int, int, float],
    largest: float,
    *,
    logged: bool,
    allowed: bool,
) -> None:
    cell, gene, value = first
    looks = "look log-transformed" if logged else "are not integers"
    message = (
        f"{place.name}: the values {looks} (largest {largest:g}; {n_wrong} are not whole, the first is "
        f"{value:g} at {place.words(cell, gene)})"
    )
    if allowed:
        _warn(f"{message}; they are used as they are")
        return
    advice = 'pass the raw counts, for example layer="counts"'
    if not logged:
        advice += ", or allow_non_integer=True (--allow-non-integer) if these are counts after a correction"
    msg = f"{message}; {advice}"
    raise DataError(msg)


def _check_size(name: str, largest: float) -> None:
    if largest > INT32_LIMIT:
        msg = (
            f"{name}: the largest is {largest:g}, above 2^31; no molecule count is so large: check the matrix"
        )
        raise DataError(msg)
    if largest > FLOAT32_EXACT:
        _warn(f"{name}: the largest is {largest:g}; above 2^24 single precision rounds whole numbers")
