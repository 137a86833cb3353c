"""Rows of a cells x genes matrix, dense or sparse, in memory or left in its .h5ad or .zarr file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from scipy import sparse

from ..errors import DataError, InputFileError, MissingKeyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray


class Rows(NamedTuple):
    """Consecutive rows of a CSR matrix: row i holds `values[starts[i]:starts[i + 1]]` at `columns[...]`."""

    starts: NDArray[np.int64]
    columns: NDArray[np.integer]
    values: NDArray[Any]

    @property
    def row_of_value(self) -> NDArray[np.int64]:
        """The row, counted from 0, that each value is in."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.starts.nbytes + self.columns.nbytes + self.values.nbytes)


def encoding(element: Any) -> str:
    """Return "csr", "csc" or "dense" for a stored matrix, old and new AnnData layouts alike."""
    declared = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "array")))
    if declared.startswith(("csr", "csc")):
        return declared[:3]
    return "dense"


def stored_shape(element: Any) -> tuple[int, int]:
    """Return the (rows, columns) that a stored matrix declares."""
    if hasattr(element, "shape"):
        shape = element.shape
    else:
        shape = element.attrs["shape"] if "shape" in element.attrs else element.attrs["h5sparse_shape"]
    if len(shape) == 1:
        return int(shape[0]), 1
    return int(shape[0]), int(shape[1])


def frame_length(frame: Any) -> int:
    """Return the number of rows of a stored data frame (a group of columns, or one compound array)."""
    if hasattr(frame, "shape"):
        return int(frame.shape[0])
    index = frame[frame.attrs["_index"]]
    for part in ("values", "codes"):  # strings that may be missing, and categories, are groups themselves
        if not hasattr(index, "shape") and part in index:
            index = index[part]
    return int(index.shape[0])


def check_indptr(indptr: NDArray[np.integer], n_rows: int, nnz: int, where: str) -> None:
    """Raise `InputFileError` unless `indptr` (n_rows + 1,) starts at 0, never falls, and ends at `nnz`."""
    if indptr.shape != (n_rows + 1,):
        problem = f"indptr has {indptr.shape[0]} entries for {n_rows} rows"
    elif indptr[0] != 0:
        problem = f"indptr starts at {indptr[0]}, not 0"
    elif (np.diff(indptr) < 0).any():
        problem = f"indptr decreases at row {int(np.argmax(np.diff(indptr) < 0))}"
    elif indptr[-1] != nnz:
        problem = f"indptr ends at {indptr[-1]}, but {nnz} values are stored"
    else:
        return
    msg = f"sparse matrix is damaged: {problem}; {where}; write the file again from its source"
    raise InputFileError(msg)


def check_columns(columns: NDArray[np.integer], n_columns: int, where: str) -> None:
    """Raise `InputFileError` unless every index in `columns` is in [0, n_columns)."""
    if columns.size and (columns.min() < 0 or columns.max() >= n_columns):
        bad = int(np.argmax((columns < 0) | (columns >= n_columns)))
        msg = (
            f"sparse matrix is damaged: column index {columns[bad]} at position {bad}, but there are "
            f"{n_columns} columns; {where}; write the file again from its source"
        )
        raise InputFileError(msg)


def select_columns(rows: Rows, lookup: NDArray[np.int64]) -> Rows:
    """Keep the columns c with `lookup[c] >= 0`, renumbered to `lookup[c]`."""
    column = lookup[rows.columns]
    kept = column >= 0
    before = np.concatenate([[0], np.cumsum(kept)])
    return Rows(before[rows.starts], column[kept].astype(np.int32), rows.values[kept])


def without_duplicates(rows: Rows) -> Rows:
    """Add up entries stored twice for one (row, column), as scipy does."""
    rising = np.diff(rows.columns) > 0
    boundary = rows.starts[1:-1] - 1
    rising[boundary[(boundary >= 0) & (boundary < rising.size)]] = True
    if rising.all():
        return rows
    shape = (len(rows.starts) - 1, int(rows.columns.max()) + 1)
    parts = (rows.values, rows.columns, rows.starts)
    matrix = cast("Any", sparse.csr_array)(parts, shape=shape, copy=True)
    matrix.sum_duplicates()
    return Rows(matrix.indptr.astype(np.int64), matrix.indices, matrix.data)


def checked_csr(matrix: Any, name: str) -> sparse.csr_array:
    """Return a scipy matrix as CSR without duplicates, its indices checked; the caller's does not change."""
    rows = sparse.csr_array(matrix)
    rows.check_format(full_check=False)
    indices = rows.indices
    if indices.size and (indices.min() < 0 or indices.max() >= rows.shape[1]):
        msg = f"{name}: sparse matrix holds a column index outside [0, {rows.shape[1]}); build it again"
        raise DataError(msg)
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def row_chunks(
    matrix: Any, *, name: str = "counts", chunk_bytes: int = 32 << 20
) -> Iterator[tuple[int, Rows]]:
    """Yield (first row, `Rows`) of all rows in order, about `chunk_bytes` at a time.

    `matrix` is an array, a scipy sparse matrix (columns-first ones are converted once) or a `DiskMatrix`.
    """
    is_sparse = sparse.issparse(matrix)
    if is_sparse:
        matrix = checked_csr(matrix, name)
        per_row = 12 * matrix.nnz / max(1, matrix.shape[0])
    elif isinstance(matrix, DiskMatrix):
        per_row = matrix.bytes_per_row
    else:
        matrix = np.asarray(matrix)
        if matrix.ndim != 2:
            msg = f"{name}: has shape {matrix.shape}; expected (cells, genes)"
            raise DataError(msg)
        per_row = matrix.shape[1] * matrix.itemsize
    step = max(1, int(chunk_bytes / max(1, per_row)))
    for start in range(0, matrix.shape[0], step):
        stop = min(start + step, matrix.shape[0])
        if isinstance(matrix, DiskMatrix):
            block = matrix.read(start, stop)
        elif is_sparse:
            first, last = int(matrix.indptr[start]), int(matrix.indptr[stop])
            pointers = matrix.indptr[start : stop + 1].astype(np.int64) - first
            block = Rows(pointers, matrix.indices[first:last], matrix.data[first:last])
        else:
            block = matrix[start:stop]
        yield start, block if isinstance(block, Rows) else _dense_rows(block)


def library_sizes(matrix: Any) -> NDArray[np.float32]:
    """Return the counts of every cell over all genes, (cells,), in one pass over a matrix that may lie on disk."""
    sizes = np.zeros(matrix.shape[0], np.float32)
    for start, rows in row_chunks(matrix):
        n = len(rows.starts) - 1
        sizes[start : start + n] = np.bincount(rows.row_of_value, rows.values, minlength=n)
    return sizes


def _dense_rows(block: NDArray[Any]) -> Rows:
    row, column = np.nonzero(block)  # NaN is not 0 and stays
    starts = np.searchsorted(row, np.arange(len(block) + 1))
    return Rows(starts.astype(np.int64), column.astype(np.int32), block[row, column])


class DiskMatrix:
    """Rows of the matrix stored at `key` ("X", "layers/counts", ...) of an open store.

    Parameters
    ----------
    store : h5py.File or zarr.Group
    key : where the matrix is.
    columns : indices of the columns to keep, in the order wanted; None keeps all.
    where : the file's name, for messages.

    Raises
    ------
    MissingKeyError : nothing is stored at `key`.
    InputFileError : the matrix is stored by column, or its row pointers are damaged.
    """

    def __init__(
        self,
        store: Mapping[str, Any],
        key: str,
        *,
        columns: NDArray[np.integer] | None = None,
        where: str = "file",
    ) -> None:
        if key not in store:
            msg = f"{key}: not in {where}, which holds {', '.join(sorted(store))}; name a stored matrix"
            raise MissingKeyError(msg)
        element = store[key]
        self.key = key
        self.where = f"{where}, {key}"
        self.encoding = encoding(element)
        n_rows, self.n_stored_columns = stored_shape(element)
        self._columns = None if columns is None else np.asarray(columns)
        self._lookup: NDArray[np.int64] | None = None
        n_columns = self.n_stored_columns
        if self._columns is not None:
            check_columns(self._columns, self.n_stored_columns, f"{self.where}, genes asked for")
            self._lookup = np.full(self.n_stored_columns, -1, np.int64)
            self._lookup[self._columns] = np.arange(len(self._columns))
            n_columns = len(self._columns)
        self.shape = (n_rows, n_columns)
        if self.encoding == "csc":
            msg = (
                f"matrix is stored by column (CSC), so its rows cannot be streamed; {self.where}; "
                "load it into memory, or store it with adata.X = adata.X.tocsr()"
            )
            raise InputFileError(msg)
        if self.encoding == "csr":
            self._values, self._indices = element["data"], element["indices"]
            self._indptr = np.asarray(element["indptr"][:]).astype(np.int64)
            check_indptr(self._indptr, n_rows, int(self._values.shape[0]), self.where)
            if self._indices.shape != self._values.shape:
                msg = (
                    f"sparse matrix is damaged: {self._indices.shape[0]} indices for {self._values.shape[0]} "
                    f"values; {self.where}; write the file again from its source"
                )
                raise InputFileError(msg)
        else:
            self._values = element

    @property
    def nbytes_in_memory(self) -> int:
        """Bytes held all the time: the row pointers of a CSR matrix."""
        return int(self._indptr.nbytes) if self.encoding == "csr" else 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype stored."""
        return cast("np.dtype[Any]", self._values.dtype)

    @property
    def bytes_per_row(self) -> float:
        """Bytes that reading one row takes on average."""
        if self.encoding == "dense":
            return float(self.n_stored_columns * self.dtype.itemsize)
        return float((self.dtype.itemsize + 12) * self._values.shape[0] / max(1, self.shape[0]))

    def rows_per_chunk(self) -> int:
        """Rows that one compressed chunk of the file holds on average, at least 1."""
        chunks = getattr(self._values, "chunks", None)
        if not chunks or not self.shape[0]:
            return 1
        if self.encoding == "csr":
            return max(1, int(chunks[0] * self.shape[0] / max(1, self._values.shape[0])))
        return int(chunks[0])

    def most_entries(self, rows: NDArray[np.integer]) -> NDArray[np.int64] | None:
        """Entries that each of `rows` holds at most, without reading them; None where it cannot be told."""
        if self.encoding == "dense" or self._lookup is not None:
            return None
        return self._indptr[rows + 1] - self._indptr[rows]

    def read(self, start: int, stop: int) -> Rows | NDArray[Any]:
        """Return rows [start, stop): `Rows` of a CSR matrix, an array (rows, columns) of a dense one.

        Raises
        ------
        InputFileError : the file is damaged there.
        """
        try:
            return self._read(start, stop)
        except (OSError, RuntimeError) as error:  # of the library below; its text means nothing to a user
            msg = f"rows {start} to {stop} cannot be read; {self.where}; the file is damaged: make a fresh copy"
            raise InputFileError(msg) from error

    def _read(self, start: int, stop: int) -> Rows | NDArray[Any]:
        if self.encoding == "dense":
            block = np.asarray(self._values[start:stop])
            block = block[:, None] if block.ndim == 1 else block
            return block if self._columns is None else block[:, self._columns]
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        columns = np.asarray(self._indices[first:last])
        check_columns(columns, self.n_stored_columns, self.where)
        rows = Rows(self._indptr[start : stop + 1] - first, columns, np.asarray(self._values[first:last]))
        rows = without_duplicates(rows)
        return rows if self._lookup is None else select_columns(rows, self._lookup)
