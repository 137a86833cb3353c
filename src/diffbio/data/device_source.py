"""Cells whose counts lie on the accelerator: a minibatch is a list of row numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from ..math.sparse import ResidentRows
from .source import ArraySource

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .source import Source

SHARE_OF_MEMORY = 0.25  # of the accelerator that counts may take; the rest is for training
MOST_ENTRIES = 2**31 - 1  # positions are int32


class DeviceSource(ArraySource):
    """An `ArraySource` with a copy of its CSR matrices on JAX's default device.

    Batches for training are taken there, so that a step does not wait for the host; all else is as in memory, and so
    is every number.
    """

    def __init__(self, source: ArraySource) -> None:
        super().__init__(source.cells, source.constants, categories=source.categories)
        self.resident: dict[str, tuple[Any, Any, Any]] = {
            key: (jnp.asarray(value.data), jnp.asarray(value.indices), jnp.asarray(value.indptr.astype(np.int32)))
            for key, value in self.cells.items()
            if isinstance(value, sparse.csr_array) and value.nnz <= MOST_ENTRIES
        }

    def take_sparse(self, rows: NDArray[np.integer]) -> dict[str, Any]:
        """Return as `ArraySource` does, but matrices on the device as `ResidentRows`."""
        batch: dict[str, Any] = dict(self.constants)
        others = {key: value for key, value in self.cells.items() if key not in self.resident}
        if others:
            batch |= ArraySource(others).take_sparse(rows)
        for key, parts in self.resident.items():
            pointers, rooms = self.cells[key].indptr, self._rooms(key, len(rows))
            entries = int((pointers[rows + 1] - pointers[rows]).sum())
            room = next((room for room in rooms if entries <= room), 0)
            if not room:  # rows repeated, or too wide
                return super().take_sparse(rows)
            batch[key] = ResidentRows(rows.astype(np.int32), *parts, self.cells[key].shape[1], room)
        return batch


def resident(source: Source) -> Source:
    """`source` with its counts on the accelerator, if there is one and they fit well; else as it is."""
    if not isinstance(source, ArraySource) or jax.default_backend() == "cpu":
        return source
    free = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    matrices = [value for value in source.cells.values() if isinstance(value, sparse.csr_array)]
    fits = sum(m.data.nbytes + m.indices.nbytes for m in matrices) <= SHARE_OF_MEMORY * free
    return DeviceSource(source) if matrices and fits else source
