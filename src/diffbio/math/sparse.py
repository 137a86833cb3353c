"""Rows of a sparse matrix on their way to the device, where they become dense."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseRows:
    """A batch of rows as entries of the flattened dense batch.

    index: position row * columns + column of each entry; padding points behind the last position.
    values: the entries.
    shape: (rows, columns) of the dense batch; static, so that one program serves every batch.
    """

    index: Any
    values: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """The batch as a dense (rows, columns) array; inside jit a scatter on the device."""
        rows, columns = self.shape
        flat = jnp.zeros(rows * columns, self.values.dtype)
        return flat.at[self.index].set(self.values, mode="drop").reshape(rows, columns)


def sparse_rows(matrix: sparse.csr_array, rows: np.ndarray, capacity: int) -> SparseRows:
    """`matrix[rows]` with room for `capacity` entries; canonical CSR, values as float32."""
    starts = matrix.indptr[rows]
    lengths = matrix.indptr[rows + 1] - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    # position of each entry in the matrix: its row's start plus its place within the row
    entries = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    n_columns = matrix.shape[1]
    index = np.full(capacity, len(rows) * n_columns, np.int32)
    index[:total] = matrix.indices[entries] + np.repeat(np.arange(len(rows)) * n_columns, lengths)
    values = np.zeros(capacity, np.float32)
    values[:total] = matrix.data[entries]
    return SparseRows(index, values, (len(rows), n_columns))
