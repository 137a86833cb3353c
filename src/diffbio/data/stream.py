"""Matrices written to .h5ad or .zarr as they are computed, a chunk of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import DataError
from .plain import to_numpy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def write_stream(group: Any, name: str, stream: RowStream, shape: tuple[int, int], place: str) -> None:
    """Write the matrix `group[name]` of the given shape chunk by chunk.

    Dense, or CSR where `stream.columns` names its genes. `group` is an open h5py or zarr group; `place` is
    what messages call it.

    Raises
    ------
    DataError : the chunks do not have one row per cell and one column per gene.
    """
    if name in group:
        del group[name]
    writer = (
        _dense_writer(group, name, shape)
        if stream.columns is None
        else _csr_writer(group, name, shape, stream.columns)
    )
    next(writer)
    n_rows = 0
    for chunk in stream.chunks:
        block = np.asarray(to_numpy(chunk), np.float32)
        width = shape[1] if stream.columns is None else len(stream.columns)
        if block.ndim != 2 or block.shape[1] != width:
            msg = f"{place}: a chunk has shape {block.shape}; expected (rows, {width})"
            raise DataError(msg)
        n_rows += len(block)
        if n_rows > shape[0]:
            break
        writer.send(block)
    if n_rows != shape[0]:
        msg = f"{place}: the chunks have {n_rows} rows or more, the data has {shape[0]} cells; match them"
        raise DataError(msg)
    writer.close()


class RowStream(NamedTuple):
    """A layer that is written as it is computed.

    `chunks` gives arrays (rows, columns) that together have one row per cell. With `columns` (indices of
    genes) they hold these genes only, and the layer is stored sparse, the other genes being empty.
    """

    chunks: Iterable[NDArray[Any]]
    columns: NDArray[np.integer] | None = None


def _create(
    group: Any, name: str, shape: tuple[int, ...], dtype: type, chunk: tuple[int, ...], *, grows: bool
) -> Any:
    if type(group).__module__.startswith("h5py"):
        limits = (None,) if grows else None
        return group.create_dataset(
            name, shape=shape, dtype=dtype, chunks=chunk, maxshape=limits, compression="gzip", fletcher32=True
        )
    return group.create_array(name, shape=shape, dtype=dtype, chunks=chunk)


def _dense_writer(group: Any, name: str, shape: tuple[int, int]) -> Any:
    rows = max(1, min(shape[0], (1 << 18) // max(1, shape[1])))
    target = _create(group, name, shape, np.float32, (rows, shape[1]), grows=False)
    target.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    start = 0
    while True:
        block = yield
        target[start : start + len(block)] = block
        start += len(block)


def _csr_writer(group: Any, name: str, shape: tuple[int, int], columns: NDArray[np.integer]) -> Any:
    ascending = np.argsort(columns)
    columns = np.asarray(columns)[ascending].astype(np.int32)
    folder = group.create_group(name)
    folder.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    folder.attrs["shape"] = np.array(shape) if type(group).__module__.startswith("h5py") else list(shape)
    data = _create(folder, "data", (0,), np.float32, (1 << 16,), grows=True)
    indices = _create(folder, "indices", (0,), np.int32, (1 << 16,), grows=True)
    indptr = _create(folder, "indptr", (shape[0] + 1,), np.int64, (min(shape[0] + 1, 1 << 16),), grows=False)
    indptr[0] = 0
    row, end = 0, 0
    while True:
        block = (yield)[:, ascending]
        used = block != 0
        n_used = int(used.sum())
        data.resize((end + n_used,))
        indices.resize((end + n_used,))
        data[end:] = block[used]
        indices[end:] = np.broadcast_to(columns, block.shape)[used]
        indptr[row + 1 : row + 1 + len(block)] = end + np.cumsum(used.sum(axis=1))
        row, end = row + len(block), end + n_used
