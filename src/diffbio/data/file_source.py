"""Cells read from a file that may be larger than memory."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import DataError
from .batches import batch_dtype, in_memory, nbytes, rows_of
from .matrix import DiskMatrix, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from .batches import Batch

BLOCK_ROWS = 64
GROUP_ROWS = 4096


def _part(value: Rows | NDArray[Any], low: int, high: int) -> Rows | NDArray[Any]:
    """Copy rows [low, high), so that the larger array read with them can be freed."""
    if isinstance(value, Rows):
        first, last = value.starts[low], value.starts[high]
        return Rows(
            value.starts[low : high + 1] - first,
            value.columns[first:last].copy(),
            value.values[first:last].copy(),
        )
    return value[low:high].copy()


class FileSource:
    """Cells whose matrices stay on disk; memory held does not grow with the file, row pointers aside.

    A random order is a block shuffle: blocks of `block_rows` neighbouring rows are put in random order,
    `group_rows` rows' worth of blocks at a time are mixed row by row. Taking that order part by part reads
    each block once, and two groups of blocks are kept in memory. Safe to call from several threads.

    Parameters
    ----------
    matrices
        key -> open `DiskMatrix`.
    cells, constants, categories
        As for `ArraySource`; held in memory.
    block_rows
        Rows read at once; raised to the rows of one compressed chunk of the file. At most 1024.
    group_rows
        Rows mixed at once.
    store
        What to close in `close()`.
    """

    on_disk = True  # training reads ahead, and sorts a batch by place in the file

    def __init__(
        self,
        matrices: Mapping[str, DiskMatrix],
        cells: Mapping[str, Any] | None = None,
        constants: Mapping[str, Any] | None = None,
        *,
        categories: Mapping[str, Sequence[str]] | None = None,
        block_rows: int = BLOCK_ROWS,
        group_rows: int = GROUP_ROWS,
        store: Any = None,
    ) -> None:
        self.matrices = dict(matrices)
        lengths = {matrix.shape[0] for matrix in self.matrices.values()}
        if len(lengths) > 1:
            listed = ", ".join(f"{key} has {m.shape[0]}" for key, m in self.matrices.items())
            msg = f"matrices of the file disagree on the number of cells: {listed}; write the file again"
            raise DataError(msg)
        self.cells, self.constants, self.n_cells = in_memory(
            cells or {}, constants or {}, next(iter(lengths), None)
        )
        self.keys = (*self.matrices, *self.cells, *self.constants)
        self.categories = {key: tuple(names) for key, names in (categories or {}).items()}
        per_chunk = max((matrix.rows_per_chunk() for matrix in self.matrices.values()), default=1)
        self.block_rows = min(max(block_rows, per_chunk), 1024)
        self.blocks_per_group = max(1, group_rows // self.block_rows)
        self._store = store
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, dict[str, Rows | NDArray[Any]]] = OrderedDict()
        self._lengths: dict[str, NDArray[np.integer]] = {}  # of some rows, spread over the file
        self._rooms: dict[tuple[str, int], int] = {}
        self.n_block_reads = 0

    @property
    def nbytes_in_memory(self) -> int:
        """Bytes of row pointers, columns and the blocks held now."""
        held = sum(map(nbytes, (*self.cells.values(), *self.constants.values())))
        held += sum(matrix.nbytes_in_memory for matrix in self.matrices.values())
        return held + sum(int(part.nbytes) for block in self._blocks.values() for part in block.values())

    def take(self, rows: NDArray[np.integer]) -> Batch:
        """Return the cells `rows` (any order, repeats allowed) as a dict of arrays."""
        return self._taken(rows, self._gather)

    def take_sparse(self, rows: NDArray[np.integer]) -> dict[str, Any]:
        """Return as `take` does, but sparse matrices as `SparseRows`; a batch fuller than usual comes dense."""
        return self._taken(rows, self._gather_sparse)

    def take_blocks(self, rows: NDArray[np.integer], n_blocks: int, mine: range) -> dict[str, Any]:
        """Return the blocks `mine` of `rows` cut into n_blocks equal ones; reads no others.

        Sparse matrices come as blocks of `SparseRows` where the row pointers tell, to everyone who takes a part of
        these rows, that every block has room; dense otherwise.
        """
        from ..math.sparse import in_blocks

        blocks = np.split(np.asarray(rows), n_blocks)

        def gather(key: str, matrix: DiskMatrix, own: NDArray[np.integer]) -> Any:
            if len(mine) == n_blocks:  # nobody else has to come to the same answer: it is read off the rows
                room = self._room(key, matrix, len(blocks[0]))
                packed = (self._gather_packed(key, matrix, block, room) if room else None for block in blocks)
                parts = [part for part in packed if part is not None]
                return in_blocks(parts, n_blocks) if len(parts) == n_blocks else self._gather(key, matrix, own)
            entries = matrix.most_entries(rows)
            room = 0 if entries is None else self._room(key, matrix, len(blocks[0]))
            if entries is None or entries.reshape(n_blocks, -1).sum(1).max() > room:
                return self._gather(key, matrix, own)
            return in_blocks([self._gather_packed(key, matrix, blocks[i], room) for i in mine], n_blocks)

        return self._taken(np.concatenate([blocks[i] for i in mine]), gather)

    def _taken(self, rows: NDArray[np.integer], gather: Callable[..., Any]) -> dict[str, Any]:
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 0 or rows.max() >= self.n_cells):
            msg = f"take: rows must lie in [0, {self.n_cells}), got {rows.min()} to {rows.max()}"
            raise IndexError(msg)
        batch: dict[str, Any] = {}
        with self._lock:
            if self.matrices:
                self._load(np.unique(rows // self.block_rows))
            for key, matrix in self.matrices.items():
                batch[key] = gather(key, matrix, rows)
            self._evict()
        batch |= {key: rows_of(key, value, rows) for key, value in self.cells.items()}
        return batch | self.constants

    def column(self, key: str) -> NDArray[Any]:
        """Return a per-cell array held in memory whole, such as `batch_labels`."""
        return rows_of(key, self.cells[key], np.arange(self.n_cells))

    def order(self, rng: np.random.Generator, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return `rows` block-shuffled."""
        rows = np.asarray(rows)
        block = rows // self.block_rows
        n_blocks = -(-self.n_cells // self.block_rows)
        group = rng.permutation(n_blocks)[block] // self.blocks_per_group
        return rows[np.lexsort((rng.random(len(rows)), group))]

    def fingerprint(self) -> int:
        """A checksum of the file and of the columns in memory; of a folder, of the columns alone."""
        total = 0
        for key, value in sorted(self.cells.items()):
            total = zlib.crc32(np.ascontiguousarray(value).tobytes(), zlib.crc32(key.encode(), total))
        name = getattr(self._store, "filename", None)
        if name is not None:
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    total = zlib.crc32(block, total)
        return total

    def close(self) -> None:
        """Close the file."""
        self._blocks.clear()
        if hasattr(self._store, "close"):
            self._store.close()

    def _load(self, wanted: NDArray[np.integer]) -> None:
        """Bring the blocks `wanted` (sorted) into memory; neighbours are read together."""
        missing = [int(block) for block in wanted if block not in self._blocks]
        for block in wanted.tolist():
            if block in self._blocks:
                self._blocks.move_to_end(block)
        for run in np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1) if missing else []:
            first, last = int(run[0]), int(run[-1]) + 1
            start, stop = first * self.block_rows, min(last * self.block_rows, self.n_cells)
            read = {key: matrix.read(start, stop) for key, matrix in self.matrices.items()}
            for block in range(first, last):
                low = block * self.block_rows - start
                high = min(low + self.block_rows, stop - start)
                self._blocks[block] = {key: _part(value, low, high) for key, value in read.items()}
                self.n_block_reads += 1

    def _gather(self, key: str, matrix: DiskMatrix, rows: NDArray[np.integer]) -> NDArray[Any]:
        blocks, offsets = np.divmod(rows, self.block_rows)
        if matrix.encoding == "dense":
            dtype = batch_dtype(key, matrix.dtype)
            out = np.empty((len(rows), matrix.shape[1]), dtype)
            for i, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
                out[i] = cast("NDArray[Any]", self._blocks[block][key])[offset]
            return out
        out = np.zeros((len(rows), matrix.shape[1]), np.float32)
        for row, block, offset in zip(out, blocks.tolist(), offsets.tolist(), strict=True):
            starts, columns, values = cast("Rows", self._blocks[block][key])
            low, high = starts[offset], starts[offset + 1]
            row[columns[low:high]] = values[low:high]
        return out

    def _gather_sparse(self, key: str, matrix: DiskMatrix, rows: NDArray[np.integer]) -> Any:
        room = self._room(key, matrix, len(rows))
        packed = self._gather_packed(key, matrix, rows, room) if room else None
        return self._gather(key, matrix, rows) if packed is None else packed

    def _gather_packed(self, key: str, matrix: DiskMatrix, rows: NDArray[np.integer], room: int) -> Any:
        """`SparseRows` of `rows`; None where they hold more entries than there is room for."""
        from ..math.sparse import packed

        spans = []
        for block, offset in zip(*(part.tolist() for part in np.divmod(rows, self.block_rows)), strict=True):
            starts, columns, values = cast("Rows", self._blocks[block][key])
            low, high = starts[offset], starts[offset + 1]
            spans.append((columns[low:high], values[low:high]))
        lengths = np.array([len(values) for _, values in spans])
        if lengths.sum() > room:
            return None
        columns, values = (np.concatenate(parts) for parts in zip(*spans, strict=True))
        return packed(columns, values, lengths, matrix.shape[1], room)

    def _room(self, key: str, matrix: DiskMatrix, n_rows: int) -> int:
        """Entries that `n_rows` rows hold, from blocks spread over the file; 0 where a batch comes dense."""
        from ..math.sparse import usual_and_most

        if matrix.encoding == "dense" or not n_rows or n_rows * matrix.shape[1] >= 2**31:
            return 0
        if key not in self._lengths:
            n_blocks = -(-self.n_cells // self.block_rows)
            chosen = np.unique(np.linspace(0, n_blocks - 1, min(n_blocks, 64)).astype(int)) * self.block_rows
            read = [matrix.read(low, min(low + self.block_rows, self.n_cells)) for low in chosen.tolist()]
            self._lengths[key] = np.concatenate([np.diff(cast("Rows", part).starts) for part in read])
        if (key, n_rows) not in self._rooms:
            usual = usual_and_most(self._lengths[key], n_rows)[0]
            self._rooms[key, n_rows] = min(usual, n_rows * matrix.shape[1])
        return self._rooms[key, n_rows]

    def _evict(self) -> None:
        """Forget the blocks used longest ago; two groups stay, since a batch may straddle two."""
        while len(self._blocks) > 2 * self.blocks_per_group:
            self._blocks.popitem(last=False)
