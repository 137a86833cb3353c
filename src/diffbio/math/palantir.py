"""Palantir's pseudotime: shortest paths between waypoints in the space of the diffusion components, then their mean.

Setty et al. 2019, Nature Biotechnology 37:451, in the steps of palantir 1.4.5. Differentiable in the components: the
lengths of the shortest paths have the gradient of the edges they go along. Which components count, which cells are
start and waypoints, who is neighbour of whom, along which edges a path goes, what lies before a waypoint, and when
refinement stops are discrete choices outside the gradient.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import sparse
from scipy.sparse.csgraph import dijkstra

from .callbacks import on_host
from .neighbors import knn

FEWEST_COMPONENTS = 3  # of the first eigenvectors, the constant one included
ALIKE = 0.9999  # correlation of the pseudotimes of two rounds at which refinement stops
ROUNDS = 24
SILVERMAN = 1.06


class Waypoints(NamedTuple):
    """Row numbers of the waypoints, the start first; those beyond the last one repeat it, and are not `real`."""

    cells: Int[Array, " waypoints"]
    real: Bool[Array, " waypoints"]


def multiscale_space(
    gaps: Float[Array, " components"], vectors: Float[Array, "cells components"]
) -> Float[Array, "cells components"]:
    """The eigenvectors before the largest gap of the eigenvalues, each scaled to [0, 1]; the others are 0.

    The first, constant one is not among them, at least two others are. Palantir's weights l / (1 - l) are not seen
    after this scaling, which it does too.
    """
    drop = jax.lax.stop_gradient(gaps[1:] - gaps[:-1])
    order = jnp.argsort(drop)
    count = jnp.where(order[-1] + 1 >= FEWEST_COMPONENTS, order[-1], order[-2] if len(order) > 1 else order[-1]) + 1
    place = jnp.arange(len(gaps))
    used = (place > 0) & (place < jnp.maximum(count, FEWEST_COMPONENTS))
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    spread = jnp.where(used & (high > low), high - low, 1.0)
    return jnp.where(used, (vectors - low) / spread, 0.0)


def waypoints(points: Float[Array, "cells components"], root: Int[Array, ""], n_waypoints: int) -> Waypoints:
    """The start, the extreme cells of every component, and cells spread evenly along each (max-min sampling).

    The start is the extreme cell nearest to `root`. Palantir begins each component's sampling at a random cell, we at
    the start: nothing is drawn.
    """
    width = points.shape[1]
    most = min(len(points), max(n_waypoints, FEWEST_COMPONENTS, width) + 2 * width + 1)
    shapes = jax.ShapeDtypeStruct((most,), jnp.int32), jax.ShapeDtypeStruct((most,), bool)
    found = on_host(partial(_sampled, n_waypoints=n_waypoints, most=most), shapes, jax.lax.stop_gradient(points), root)
    return Waypoints(*found)


def _sampled(points: np.ndarray, root: np.ndarray, *, n_waypoints: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    points = points[:, np.ptp(points, axis=0) > 0].astype(np.float64)
    width = max(points.shape[1], 1)
    edge = np.unique(np.concatenate([points.argmax(axis=0), points.argmin(axis=0)]))
    if not len(edge):  # all cells are alike
        edge = np.array([root])
    start = int(edge[((points[edge] - points[int(root)]) ** 2).sum(axis=1).argmin()])
    chosen = [start, *edge.tolist()]
    each = max(n_waypoints, FEWEST_COMPONENTS, width) // width
    for values in points.T:
        nearest = np.abs(values - values[start])
        for _ in range(each - 1):
            new = int(nearest.argmax())
            if nearest[new] == 0:
                break  # fewer different cells than waypoints
            chosen.append(new)
            nearest = np.minimum(nearest, np.abs(values - values[new]))
    others = np.setdiff1d(chosen, [start])
    cells = np.full(most, start)
    cells[1 : 1 + len(others)] = others
    return cells, np.arange(most) <= len(others)


def path_lengths(
    points: Float[Array, "cells components"], sources: Int[Array, " waypoints"], n_neighbors: int
) -> Float[Array, "waypoints cells"]:
    """Length of the shortest path from every source to every cell on the graph of nearest neighbours.

    Parts of the graph that the first source does not reach are joined to it: the farthest cell that it reaches with
    the nearest one that it does not, until there is none. n_neighbors counts the cell itself.
    """
    return _path_lengths(points, sources, n_neighbors)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _path_lengths(points: jax.Array, sources: jax.Array, n_neighbors: int) -> tuple[jax.Array, jax.Array]:
    shape = (len(sources), len(points))
    shapes = jax.ShapeDtypeStruct(shape, points.dtype), jax.ShapeDtypeStruct(shape, jnp.int32)
    found: tuple[jax.Array, jax.Array] = on_host(partial(_paths, n_neighbors=n_neighbors), shapes, points, sources)
    return found


Paths = tuple[jax.Array, jax.Array, jax.Array]


def _paths_forward(points: jax.Array, sources: jax.Array, n_neighbors: int) -> tuple[Any, Paths]:
    lengths, before = _path_lengths(points, sources, n_neighbors)
    return (lengths, before), (points, lengths, before)


def _paths_backward(n_neighbors: int, kept: Paths, cotangents: Any) -> tuple[jax.Array, None]:
    del n_neighbors
    points = kept[0]
    shape = jax.ShapeDtypeStruct(points.shape, points.dtype)
    return on_host(_along_paths, shape, *kept, cotangents[0]), None


_path_lengths.defvjp(_paths_forward, _paths_backward)


def _paths(points: np.ndarray, sources: np.ndarray, *, n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(points)
    exact = points.astype(np.float64)
    indices = knn(points, min(n_neighbors, n) - 1).indices
    rows, columns = np.repeat(np.arange(n), indices.shape[1]), indices.ravel()
    graph = _graph(exact, rows, columns)
    while True:
        reached = dijkstra(graph, directed=False, indices=int(sources[0]))
        missing = np.flatnonzero(np.isinf(reached))
        if not len(missing):
            break
        last = int(np.where(np.isinf(reached), -1.0, reached).argmax())
        new = missing[((exact[missing] - exact[last]) ** 2).sum(axis=1).argmin()]
        rows, columns = np.append(rows, last), np.append(columns, new)
        graph = _graph(exact, rows, columns)
    unique, place = np.unique(sources, return_inverse=True)
    lengths, before = dijkstra(graph, directed=False, indices=unique, return_predecessors=True)
    return lengths[place], before[place]


def _graph(points: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Any:
    length = np.sqrt(((points[rows] - points[columns]) ** 2).sum(axis=1))
    length = np.maximum(length, np.finfo(float).tiny)  # 0 would be no edge
    return sparse.csr_array((length, (rows, columns)), shape=(len(points), len(points)))


def _along_paths(points: np.ndarray, lengths: np.ndarray, before: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """From the gradient of path lengths to that of the points: an edge has that of all paths over it."""
    total = cotangent.astype(np.float64)
    sources = np.arange(len(total))
    for cells in np.argsort(-lengths, axis=1, kind="stable").T:  # the end of each path first
        previous = before[sources, cells]
        going = previous >= 0
        total[sources[going], previous[going]] += total[sources[going], cells[going]]
    source, cell = np.nonzero(before >= 0)
    previous = before[source, cell]
    exact = points.astype(np.float64)
    along = exact[cell] - exact[previous]
    length = np.sqrt((along**2).sum(axis=1, keepdims=True))
    pull = along / np.where(length > 0, length, 1.0) * total[source, cell][:, None]
    found = np.zeros_like(exact)
    np.add.at(found, cell, pull)
    np.subtract.at(found, previous, pull)
    return found


def refined_pseudotime(
    lengths: Float[Array, "waypoints cells"], chosen: Waypoints
) -> tuple[Float[Array, " cells"], Float[Array, "waypoints cells"]]:
    """Mean of the waypoints' views of every cell's time, in [0, 1], and the weights of that mean (columns sum to 1).

    A waypoint at time t sees a cell at distance d at t + d, or at t - d if the cell was before it; near waypoints
    count more, by a Gaussian of the path length. Repeated with the new times until they stay (at most 24 rounds).
    """
    real = chosen.real[:, None]
    count = chosen.real.sum() * lengths.shape[1]
    mean = jnp.where(real, lengths, 0.0).sum() / count
    spread = jnp.sqrt(jnp.where(real, (lengths - mean) ** 2, 0.0).sum() / count)
    width = SILVERMAN * spread * count.astype(lengths.dtype) ** -0.2
    width = jnp.where(width > 0, width, 1.0)
    weights = jax.nn.softmax(jnp.where(real, -0.5 * (lengths / width) ** 2, -jnp.inf), axis=0)
    later = jnp.arange(len(chosen.cells)) > 0  # the start sees all cells ahead

    def view(time: jax.Array) -> jax.Array:
        own = jnp.where(later, time[chosen.cells], 0.0)
        ahead = jnp.where((time[None, :] < own[:, None]) & later[:, None], -1.0, 1.0)
        return (weights * (lengths * ahead + own[:, None])).sum(axis=0)

    @jax.checkpoint  # else every round keeps its signs
    def more(time: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = view(time)
        return new, _correlation(time, new) > ALIKE

    def step(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        time, done = state
        return jax.lax.cond(done, lambda time: (time, jnp.array(True)), more, time), None  # noqa: FBT003

    (time, _), _ = jax.lax.scan(step, (lengths[0], jnp.array(False)), length=ROUNDS)  # noqa: FBT003
    time = time - time.min()
    largest = time.max()
    return time / jnp.where(largest > 0, largest, 1.0), weights


def _correlation(a: Float[Array, " cells"], b: Float[Array, " cells"]) -> Float[Array, ""]:
    a, b = (jax.lax.stop_gradient(x - x.mean()) for x in (a, b))
    square = (a * a).sum() * (b * b).sum()
    return (a * b).sum() / jnp.sqrt(jnp.where(square > 0, square, 1.0))
