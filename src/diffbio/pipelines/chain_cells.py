"""Cells along a chain: what a part reads of them, and patches of neighbouring ones."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from ..math.linalg import pca
from ..math.neighbors import knn
from ..operators.base import Operator, axes, is_float
from ..train import batch_of, dense_on_device
from .inference import joined, map_chunks

if TYPE_CHECKING:
    from .chain import Chain
    from .joining import Wire

N_NEIGHBORS, N_COMPONENTS = 15, 50


def read_by(chain: "Chain", source: Any, name: str) -> dict[str, np.ndarray]:
    """What a part reads of the cells of `source`, by its own names, after one pass through the parts before.

    In chunks, unless one of those works on a graph of the cells: that sees all of them at once.
    """
    chain.eval_mode()
    number = chain.names.index(name)
    wire, before = chain.wires[number], chain.wires[:number]
    whole = {key for own, key in wire.reads if axes(chain[name].requires[own])[:1] != ["cells"]}
    graph, state = nnx.split(chain)

    def read(state: Any, batch: Any) -> dict[str, jax.Array]:
        result = through(nnx.merge(graph, state), before, dense_on_device(batch))
        return {own: result[key] for own, key in wire.reads if key in result and key not in whole}

    constants = {own: np.asarray(v) for own, key in wire.reads for k, v in source.take(np.arange(1)).items()
                 if key in whole and k == key}  # fmt: skip
    made = {key for earlier in before for _, key in earlier.writes}
    if any(chain[earlier.name].graph_of_cells for earlier in before) or whole & made:
        whole -= made
        everything = batch_of(source, np.arange(source.n_cells))
        return {**{key: np.asarray(value) for key, value in jax.jit(read)(state, everything).items()}, **constants}
    return {**joined(map_chunks(read, state, source)), **constants}


def through(chain: "Chain", wires: Sequence["Wire"], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` and what these parts give."""
    result = dict(data)
    for wire in wires:
        outputs = chain[wire.name].apply(wire.read(result))[0]
        result |= wire.written(outputs)
    return result


def points_of(read: Mapping[str, np.ndarray], part: Operator) -> np.ndarray:
    """Where cells are, to say who is near whom: the first matrix that the part reads, at most 50 components of it."""
    key = next(k for k, hint in part.requires.items() if k in read and is_float(hint) and len(axes(hint)) == 2)
    points = np.asarray(read[key], np.float32)
    if points.shape[1] <= N_COMPONENTS:
        return points
    depth = points.sum(axis=1, keepdims=True)
    counts = bool((points >= 0).all() and (depth > 0).all())
    points = np.log1p(points / depth * np.median(depth)) if counts else points
    n_components = min(N_COMPONENTS, len(points) - 1)
    return np.asarray(pca(points, n_components)[0])


class Neighborhoods:
    """Minibatches that are patches of neighbouring cells, so that a graph within one has most cells' neighbours.

    Each epoch divides the cells anew: from a random cell that is still free, its free neighbours, theirs, and so on
    until the patch is full. Cells at the rim of a patch lose neighbours: the approximation of this sampler.
    """

    def __init__(self, points: np.ndarray) -> None:
        self.n_cells = len(points)
        self.indices = knn(points, min(N_NEIGHBORS, self.n_cells - 1))[0]

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers (steps, batch_size); the last cells that do not fill a patch wait for the next epoch."""
        size = min(batch_size, self.n_cells)
        free = np.ones(self.n_cells, bool)
        turns: Iterator[int] = iter(rng.permutation(self.n_cells))
        patches = []
        for _ in range(self.n_cells // size):
            patch: list[int] = []
            ahead: list[int] = []
            while len(patch) < size:
                if not ahead:
                    ahead = [next(cell for cell in turns if free[cell])]
                    free[ahead] = False
                cell = ahead.pop(0)
                patch.append(cell)
                near = self.indices[cell]
                near = near[free[near]]
                free[near] = False
                ahead += near.tolist()
            free[ahead] = True  # seen, but of no place in this patch
            patches.append(patch)
            if ahead:
                turns = itertools.chain(ahead, turns)
        return np.array(patches)
