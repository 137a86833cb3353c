"""One pass over cells in chunks of one shape, so that one compiled program serves them all."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .train import Source, batch_of

CHUNK_CELLS = 1024

Chunk = dict[str, np.ndarray]


def in_chunks(
    run: Callable[[Any, int], Mapping[str, Any]],
    source: Source,
    *,
    rows: np.ndarray | None = None,
    chunk_cells: int = CHUNK_CELLS,
) -> Iterator[Chunk]:
    """`run(batch, number of the chunk)` for the cells `rows` (all, in their order); one row per cell comes out.

    The last chunk is padded with cells from the start, and the padding cut off; fewer cells than a chunk are
    padded to a power of two. While the device works on a chunk, the host prepares the next.
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    size = min(chunk_cells, 1 << (len(rows) - 1).bit_length())
    waiting: tuple[Mapping[str, Any], int] | None = None
    for number, start in enumerate(range(0, len(rows), size)):
        chunk = rows[np.arange(start, start + size) % len(rows)]
        ahead = run(batch_of(source, chunk), number), min(size, len(rows) - start)
        if waiting is not None:
            yield _fetched(*waiting)
        waiting = ahead
    if waiting is not None:
        yield _fetched(*waiting)


SOME_OF_A_BATCH = 50  # cells of a rare batch that a random choice takes at least, if it has so many


def drawn_rows(source: Any, n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted rows of `n_cells` cells at random; batches that would be missing or hardly there take others' places."""
    order = rng.permutation(source.n_cells)
    if hasattr(source, "column") and "batch_labels" in getattr(source, "keys", ()):
        labels = np.asarray(source.column("batch_labels"))[order]
        some = min(SOME_OF_A_BATCH, n_cells // (int(labels.max()) + 1))
        # the first of each batch come to the front; of a common batch these were among the first `n_cells` anyway
        first = np.concatenate([np.flatnonzero(labels == batch)[:some] for batch in np.unique(labels)])
        order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:n_cells])


def joined(parts: Iterator[Chunk]) -> Chunk:
    """Chunks put together again."""
    every = list(parts)
    return {key: np.concatenate([part[key] for part in every]) for key in every[0]}


def _fetched(result: Mapping[str, Any], kept: int) -> Chunk:
    return {key: value[:kept] for key, value in jax.device_get(dict(result)).items()}
