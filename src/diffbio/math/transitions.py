"""Sparse (cells, cells) matrices as lists of edges: graphs of cells, and Markov chains on them.

Pairs that are listed twice add up. So a k-nearest-neighbour graph made symmetric has a list of known length,
2 · cells · neighbors, within a compiled program, and a sum of kernels is their lists one after the other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import sparse

from .diffusion import neighbor_distances
from .graph import Edges, membership, smooth_knn_dist
from .metrics import metric_points
from .neighbors import nearest

ROWS_SUM_TO_1 = 1e-3  # how far a chain's row may be off, as CellRank allows


def from_lists(indices: Int[Array, "cells neighbors"], weights: Float[Array, "cells neighbors"]) -> Edges:
    """The edges of neighbour lists, cell by cell; one direction only."""
    rows = jnp.repeat(jnp.arange(len(indices), dtype=indices.dtype), indices.shape[1])
    return Edges(rows, indices.ravel(), weights.ravel())


def symmetric_edges(
    indices: Int[Array, "cells neighbors"], weights: Float[Array, "cells neighbors"], *, mode: str = "union"
) -> Edges:
    """Directed weights w on a k-NN graph made symmetric; 2 · cells · neighbors edges, also inside jit.

    A pair of which each is the other's neighbour is listed twice in either direction, each time with half its weight.

    Args:
        indices: neighbours of each cell, itself excluded.
        weights: of the edges to them.
        mode: "union", w_ij + w_ji - w_ij w_ji, as UMAP; "mean", their mean.
    """

    def reverse(found: tuple[jax.Array, jax.Array], slot: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        back, mutual = found
        its_neighbor, its_weight = slot  # of every cell, the same place in its list
        here = its_neighbor[indices] == jnp.arange(len(indices))[:, None]
        return (jnp.where(here, its_weight[indices], back), mutual | here), None

    start = jnp.zeros_like(weights), jnp.zeros(weights.shape, bool)
    (back, mutual), _ = jax.lax.scan(reverse, start, (indices.T, weights.T))
    total = weights + back - weights * back if mode == "union" else (weights + back) / 2
    one_way = from_lists(indices, jnp.where(mutual, total / 2, total))
    other_way = transposed(one_way)
    return Edges(*(jnp.concatenate(pair) for pair in zip(one_way, other_way, strict=True)))


def connectivities(points: Float[Array, "cells features"], n_neighbors: int, *, metric: str = "euclidean") -> Edges:
    """UMAP's fuzzy union graph, as `scanpy.pp.neighbors` makes it; differentiable in the points.

    Which cells are neighbours is a discrete choice outside the gradient.

    Args:
        points: of the cells.
        n_neighbors: size of a neighbourhood; the cell itself counts, as in umap and scanpy.
        metric: "euclidean", "cosine", "correlation" or "manhattan".

    Raises:
        ConfigError: as many neighbours as cells, or an unknown metric.
    """
    indices = nearest(points, n_neighbors - 1, metric=metric)
    return fuzzy_edges(indices, list_distances(points, indices, metric=metric))


def fuzzy_edges(indices: Int[Array, "cells neighbors"], distances: Float[Array, "cells neighbors"]) -> Edges:
    """UMAP's fuzzy union graph of neighbour lists; equals `graph.fuzzy_simplicial_set`, also inside jit."""
    sigma, rho = smooth_knn_dist(distances)
    return symmetric_edges(indices, membership(distances, sigma, rho))


def list_distances(
    points: Float[Array, "cells features"], indices: Int[Array, "cells neighbors"], *, metric: str = "euclidean"
) -> Float[Array, "cells neighbors"]:
    """Distance of every cell to those in its list, under any metric of `neighbors.knn`; differentiable."""
    at = metric_points(points, metric)
    if metric == "manhattan":
        return jax.lax.map(lambda number: jnp.abs(at - at[number]).sum(axis=1), indices.T).T
    apart = neighbor_distances(at, indices)
    return apart if metric == "euclidean" else apart**2 / 2  # 1 - cos of the angle between rows of length 1


def transposed(edges: Edges) -> Edges:
    """The same edges the other way round."""
    return Edges(edges.columns, edges.rows, edges.weights)


def combined(parts: Sequence[tuple[float | Array, Edges]]) -> Edges:
    """Weighted sum of graphs on the same cells."""
    return Edges(
        jnp.concatenate([edges.rows for _, edges in parts]),
        jnp.concatenate([edges.columns for _, edges in parts]),
        jnp.concatenate([share * edges.weights for share, edges in parts]),
    )


def row_sums(edges: Edges, n_cells: int) -> Float[Array, " cells"]:
    """Sum of the weights that leave every cell."""
    return jax.ops.segment_sum(edges.weights, edges.rows, n_cells)


def normalized_rows(edges: Edges, n_cells: int) -> Edges:
    """Weights divided by the sum of those that leave the same cell; a cell without any keeps none."""
    total = row_sums(edges, n_cells)
    share = 1 / jnp.where(total > 0, total, 1.0)
    return edges._replace(weights=edges.weights * share[edges.rows])


def product(edges: Edges, x: Float[Array, "cells columns"], n_cells: int) -> Float[Array, "cells columns"]:
    """The matrix times `x`."""
    return jax.ops.segment_sum(edges.weights[:, None] * x[edges.columns], edges.rows, n_cells)


def to_scipy(edges: Edges, n_cells: int) -> sparse.csr_array:
    """The matrix on the host, in double precision; pairs listed twice are summed."""
    rows, columns, weights = (np.asarray(part) for part in edges)
    return sparse.csr_array((weights.astype(np.float64), (rows, columns)), shape=(n_cells, n_cells))


def from_scipy(matrix: Any) -> Edges:
    """The stored entries of a sparse or dense (cells, cells) matrix."""
    entries = sparse.coo_array(matrix)
    rows, columns = (np.asarray(part, np.int32) for part in entries.coords)
    return Edges(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(entries.data))
