"""How arrays are held in memory and become rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import sparse

from ..errors import DataError
from .matrix import checked_csr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

type Batch = dict[str, NDArray[Any]]

# Integer arrays under these names count or point at things; every other integer array is a measurement.
INTEGER_ENDINGS = ("labels", "label", "indices", "index", "pairs", "edges", "graph", "rows", "columns")


def batch_dtype(key: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype an array has in a batch: bool as it is, labels and indices int32, the rest float32."""
    if dtype == np.bool_:
        return dtype
    if np.issubdtype(dtype, np.integer) and key.endswith(INTEGER_ENDINGS):
        return np.dtype(np.int32)
    if np.issubdtype(dtype, np.number):
        return np.dtype(np.float32)
    msg = f"{key}: dtype {dtype} is no number; encode names as integers first (diffbio.data.batch_codes)"
    raise DataError(msg)


def in_memory(
    cells: Mapping[str, Any], constants: Mapping[str, Any], n_cells: int | None = None
) -> tuple[dict[str, Any], Batch, int]:
    """Return cells (CSR or numpy), constants (numpy) and the number of cells, all lengths checked."""
    held: dict[str, Any] = {}
    for key, value in cells.items():
        held[key] = checked_csr(value, key) if sparse.issparse(value) else np.asarray(value)
        batch_dtype(key, held[key].dtype)
        if held[key].ndim == 0:
            msg = f"{key}: is a single number, but one entry per cell is needed"
            raise DataError(msg)
    lengths = {key: int(value.shape[0]) for key, value in held.items()}
    if n_cells is not None:
        lengths = {"the file": n_cells, **lengths}
    if len(set(lengths.values())) != 1:
        msg = "no array with a cell axis was given; pass counts or embeddings"
        if lengths:
            listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            msg = f"arrays disagree on the number of cells: {listed}; give every key the same cells"
        raise DataError(msg)
    ready: Batch = {}
    for key, value in constants.items():
        array = cast("Any", value).toarray() if sparse.issparse(value) else np.asarray(value)
        ready[key] = array.astype(batch_dtype(key, array.dtype), copy=False)
    return held, ready, next(iter(lengths.values()))


def rows_of(key: str, value: Any, rows: NDArray[np.integer]) -> NDArray[Any]:
    """Return `value[rows]` dense, in the dtype of a batch."""
    dtype = batch_dtype(key, value.dtype)
    if isinstance(value, sparse.csr_array):
        return cast("NDArray[Any]", value[rows].astype(dtype, copy=False).toarray())
    return cast("NDArray[Any]", value[rows].astype(dtype, copy=False))


def nbytes(value: Any) -> int:
    """Return the bytes of an array or CSR matrix."""
    if isinstance(value, sparse.csr_array):
        return int(value.data.nbytes + value.indices.nbytes + value.indptr.nbytes)
    return int(value.nbytes)
