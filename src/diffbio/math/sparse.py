"""Rows of a sparse matrix on their way to the device, where they become dense."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseRows:
    """A batch of rows as entries of the flattened dense batch.

    index: position row * columns + column of each entry; padding points behind the last position. Of a batch
        that several devices share, (blocks, entries): a block holds as many rows as any other, and its positions
        count from its own first row, so that no device needs the entries of another.
    values: the entries.
    shape: (rows, columns) of the dense batch, of all blocks; static, so that one program serves every batch.
    in_turn: the blocks are there for one device to take one after the other, not for several side by side; static.

    >>> batch = SparseRows(jnp.array([1, 5, 6]), jnp.array([2.0, 3.0, 0.0]), (2, 3))
    >>> batch.dense().tolist()
    [[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    """

    index: Any
    values: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    in_turn: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self) -> jax.Array:
        """The batch as a dense (rows, columns) array; inside jit a scatter on the device."""
        size = self._block_rows * self.shape[1]
        if self.in_turn:  # one scatter is faster than one for each block
            n_blocks = self.index.shape[0]
            index = jnp.where(self.index < size, self.index + size * jnp.arange(n_blocks)[:, None], size * n_blocks)
            whole = jnp.zeros(size * n_blocks, self.values.dtype)
            return whole.at[index.reshape(-1)].set(self.values.reshape(-1), mode="drop").reshape(self.shape)

        def scattered(index: Any, values: Any) -> jax.Array:
            return jnp.zeros(size, values.dtype).at[index].set(values, mode="drop")

        return self._each(scattered)(self.index, self.values).reshape(self.shape)

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "SparseRows":
        """The same positions with `function` of the values; it must keep 0 at 0."""
        return dataclasses.replace(self, values=function(self.values))

    def at_entries(self, array: jax.Array) -> jax.Array:
        """The values of a dense (rows, columns) or (columns,) array at the entries' positions; () as it is."""
        if array.ndim == 0:
            return array
        if array.ndim == 1:
            return array.at[self.index % self.shape[1]].get(mode="clip")
        flat = array.reshape(*self.index.shape[:-1], -1)
        return self._each(lambda x, index: x.at[index].get(mode="clip", indices_are_sorted=True))(flat, self.index)

    def row_sums(self, values: jax.Array) -> jax.Array:
        """Sums of values at the entries over each row, (rows,); those of the padding are left out."""
        columns, rows = self.shape[1], self._block_rows

        def summed(values: Any, index: Any) -> jax.Array:
            return jax.ops.segment_sum(values, index // columns, rows, indices_are_sorted=True)

        return self._each(summed)(values, self.index).reshape(self.shape[0])

    def blocks(self) -> "SparseRows":
        """The blocks as arrays with a leading axis, whose slices are batches by themselves."""
        return dataclasses.replace(self, shape=(self._block_rows, self.shape[1]), in_turn=False)

    @property
    def _block_rows(self) -> int:
        return self.shape[0] if self.index.ndim == 1 else self.shape[0] // self.index.shape[0]

    def _each(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """`function` of every block by itself."""
        return function if self.index.ndim == 1 else jax.vmap(function)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidentRows:
    """Rows of a CSR matrix that lies on the device, named by number; inside jit `taken` makes them `SparseRows`.

    rows: their numbers.
    values, columns, starts: the matrix: entries, their columns, and where each row's entries start, and the last end.
    n_columns: of the matrix. capacity: room for the entries of the rows; both static.
    """

    rows: Any
    values: Any
    columns: Any
    starts: Any
    n_columns: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})

    def taken(self) -> SparseRows:
        """The rows as entries of the flattened dense batch."""
        n = self.rows.shape[0]
        first = self.starts[self.rows]
        ends = jnp.cumsum(self.starts[self.rows + 1] - first)
        entry = jnp.arange(self.capacity, dtype=ends.dtype)
        row = jnp.searchsorted(ends, entry, side="right").clip(max=n - 1)  # of each entry
        begins = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
        there = first[row] + entry - begins[row]
        known = entry < ends[-1]
        columns = self.columns.at[there].get(mode="clip").astype(jnp.int32)
        index = jnp.where(known, row.astype(jnp.int32) * self.n_columns + columns, n * self.n_columns)
        values = self.values.at[there].get(mode="clip").astype(jnp.float32)
        return SparseRows(index, jnp.where(known, values, 0.0), (n, self.n_columns))


ROWS_IN_TURN = 128  # arrays of (128, genes) stay in a core's cache, of (1024, genes) they do not: 2 times the time


def blocks_in_turn(n_rows: int) -> int:
    """Into how many equal blocks a batch is cut on a CPU: of at most 128 rows, not less than 64; else 1."""
    fits = (n for n in range(-(-n_rows // ROWS_IN_TURN), n_rows * 2 // ROWS_IN_TURN + 1) if n and n_rows % n == 0)
    return next(fits, 1)


def in_blocks(blocks: Sequence[SparseRows], n_blocks: int) -> SparseRows:
    """Some of the n_blocks blocks of a batch, all of one shape and capacity, as one; its shape is the batch's."""
    index, values = np.stack([b.index for b in blocks]), np.stack([b.values for b in blocks])
    rows, columns = blocks[0].shape
    return SparseRows(index, values, (n_blocks * rows, columns))


def packed(columns: np.ndarray, values: np.ndarray, lengths: np.ndarray, n_columns: int, capacity: int) -> SparseRows:
    """Rows of `lengths` entries, one after the other, with room for `capacity` entries; values as float32."""
    total, size = len(values), len(lengths) * n_columns
    index, padded = np.empty(capacity, np.int32), np.empty(capacity, np.float32)
    starts = np.repeat(np.arange(0, size, n_columns, dtype=np.int32), lengths)
    np.add(columns, starts, out=index[:total], casting="unsafe")
    index[total:] = size
    padded[:total], padded[total:] = values, 0.0
    return SparseRows(index, padded, (len(lengths), n_columns))


def usual_and_most(lengths: np.ndarray, n_rows: int) -> tuple[int, int]:
    """Entries that `n_rows` random rows hold: 6 standard errors above the mean, and at most."""
    longest = np.sort(lengths)[::-1]
    most = max(1, int(longest[:n_rows].sum()), int(longest[:1].sum()) * n_rows if n_rows > len(lengths) else 0)
    usual = int(n_rows * lengths.mean() + 6 * lengths.std() * n_rows**0.5) + 1 if lengths.size else 1
    return min(usual, most), most


def sparse_rows(matrix: sparse.csr_array, rows: np.ndarray, capacity: int) -> SparseRows:
    """`matrix[rows]` with room for `capacity` entries; canonical CSR, values as float32."""
    taken = matrix[rows]
    return packed(taken.indices, taken.data, np.diff(taken.indptr), matrix.shape[1], capacity)
