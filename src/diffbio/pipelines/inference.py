"""One pass over cells in chunks, and views of a source that the pipeline's stages train on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from scipy import sparse

from ..data.source import ArraySource, Source
from ..operators.base import Data, Operator
from ..train import batch_of, dense_on_device

CHUNK_CELLS = 1024


def apply_in_chunks(
    op: Operator, source: Source, keys: Sequence[str], *, chunk_cells: int = CHUNK_CELLS
) -> Iterator[dict[str, np.ndarray]]:
    """Applies `op` to all cells in their order; yields dicts of numpy arrays, `chunk_cells` cells at a time.

    The operator has to treat cells one by one, as every fitted operator of the pipeline does, and `keys` have
    to be outputs with one row per cell.
    """
    graph, state = nnx.split(op)

    def outputs(state: Any, batch: Data) -> Data:
        result, _, _ = nnx.merge(graph, state).apply(batch, {}, None)
        return {key: result[key] for key in keys}

    return map_chunks(outputs, state, source, chunk_cells=chunk_cells)


def map_chunks(
    function: Callable[[Any, Data], Data], state: Any, source: Source, *, chunk_cells: int = CHUNK_CELLS
) -> Iterator[dict[str, np.ndarray]]:
    """`function(state, batch)` of all cells, compiled once: the last chunk is padded, and the padding cut off."""
    size = min(chunk_cells, source.n_cells)
    run = jax.jit(lambda state, batch: function(state, dense_on_device(batch)))
    for start in range(0, source.n_cells, size):
        rows = np.arange(start, start + size) % source.n_cells
        kept = min(size, source.n_cells - start)
        yield {key: value[:kept] for key, value in jax.device_get(run(state, batch_of(source, rows))).items()}


def joined(parts: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Chunks put together again."""
    every = list(parts)
    return {key: np.concatenate([part[key] for part in every]) for key in every[0]}


class MappedSource:
    """A source whose batches go through a compiled function on the device before they are used."""

    def __init__(self, source: Source, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.source, self.n_cells = source, source.n_cells
        self.function = jax.jit(lambda batch: function(dense_on_device(batch)))

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """The cells `rows`, mapped."""
        return dict(self.function(batch_of(self.source, rows)))

    def order(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """As in the source beneath."""
        return self.source.order(rng, rows)


def in_memory(source: Source, n_cells: int, *, seed: int) -> Source:
    """`source` itself if it has at most `n_cells` cells, else a random `n_cells` of them held in memory."""
    if source.n_cells <= n_cells:
        return source
    rows = np.sort(np.random.default_rng([seed, n_cells]).choice(source.n_cells, n_cells, replace=False))
    parts: dict[str, list[Any]] = {}
    constants: dict[str, Any] = {}
    for start in range(0, n_cells, CHUNK_CELLS):
        part = rows[start : start + CHUNK_CELLS]
        for key, value in source.take(part).items():
            if np.shape(value)[:1] != (len(part),):
                constants[key] = value
            else:
                parts.setdefault(key, []).append(sparse.csr_array(value) if np.ndim(value) == 2 else value)
    cells = {
        key: sparse.vstack(value, format="csr") if sparse.issparse(value[0]) else np.concatenate(value)
        for key, value in parts.items()
    }
    return ArraySource(cells, constants)


def column(source: Source, key: str) -> np.ndarray:
    """A per-cell column such as `batch_labels`, whole; of a source that only gives batches, batch by batch."""
    if hasattr(source, "column"):
        return np.asarray(source.column(key))
    starts = range(0, source.n_cells, CHUNK_CELLS)
    return np.concatenate([source.take(np.arange(s, min(s + CHUNK_CELLS, source.n_cells)))[key] for s in starts])
