"""One pass over cells in chunks, and views of a source that the pipeline's stages train on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import sparse

from ..chunks import CHUNK_CELLS, drawn_rows, in_chunks
from ..chunks import joined as joined
from ..data.source import ArraySource, Source
from ..operators.base import Data, Operator
from ..train import batch_of, dense_on_device


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
    """`function(state, batch)` of all cells, compiled once."""
    run = jax.jit(lambda state, batch: function(state, dense_on_device(batch)))
    return in_chunks(lambda batch, number: run(state, batch), source, chunk_cells=chunk_cells)


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


PER_GENE = frozenset({"counts", "ambient_profile"})


def with_missing_genes(source: Any, columns: np.ndarray) -> Any:
    """A source of the genes that were found, as one of all genes of a model; what is missing counts as zero.

    columns: of `data.names.align_genes`: -1 where a gene is missing.
    """
    present = np.flatnonzero(columns >= 0)
    if len(present) == len(columns):
        return source

    def spread(batch: dict[str, Any]) -> dict[str, Any]:
        empty = {k: jnp.zeros((*v.shape[:-1], len(columns)), v.dtype) for k, v in batch.items() if k in PER_GENE}
        return {**batch, **{k: zeros.at[..., present].set(batch[k]) for k, zeros in empty.items()}}

    return MappedSource(source, spread)


def in_memory(source: Source, n_cells: int, *, seed: int) -> Source:
    """`source` itself if it has at most `n_cells` cells, else so many at random, some of every batch, in memory."""
    if source.n_cells <= n_cells:
        return source
    rows = drawn_rows(source, n_cells, np.random.default_rng([seed, n_cells]))
    parts: dict[str, list[Any]] = {}
    constants: dict[str, Any] = {}
    for start in range(0, len(rows), CHUNK_CELLS):
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
