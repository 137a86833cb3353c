"""Weighted k-nearest-neighbour graphs as edge lists: UMAP's fuzzy simplicial set, symmetrisation, curve a, b.

Which cells are neighbours is a discrete choice, made on the host (`neighbors.knn`); the weights on those
edges are differentiable functions of the distances.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BISECTIONS = 64  # as umap; float32 is exhausted after 24 halvings, the rest finds the scale
MIN_SCALE = 1e-3  # umap's MIN_K_DIST_SCALE: sigma is at least this share of the mean distance


class UnionEdges(NamedTuple):
    """All ordered pairs (row, column) where one is a neighbour of the other, sorted, both directions present.

    `forward` and `backward` say where the pair's two directed weights lie in the raveled (cells, neighbors)
    array; -1 where the list does not have that direction.
    """

    rows: Int[np.ndarray, " edges"]
    columns: Int[np.ndarray, " edges"]
    forward: Int[np.ndarray, " edges"]
    backward: Int[np.ndarray, " edges"]


class Edges(NamedTuple):
    """A weighted graph as a list of edges."""

    rows: Int[Array | np.ndarray, " edges"]
    columns: Int[Array | np.ndarray, " edges"]
    weights: Float[Array, " edges"]


def smooth_knn_dist(
    distances: Float[Array, "cells neighbors"],
) -> tuple[Float[Array, " cells"], Float[Array, " cells"]]:
    """Solves sum_j exp(-max(d_ij - rho_i, 0) / sigma_i) = log2(k) for the bandwidth sigma_i of each cell.

    rho_i is the distance to the nearest neighbour that is not a duplicate, k the number of neighbours and
    the cell itself, as umap counts (McInnes et al. 2018, algorithm 3). sigma_i is at least 0.001 times the
    mean distance. Both are differentiable: bisection finds sigma outside the gradient, one Newton step on
    the equation carries the gradient of the implicit function.

    Args:
        distances: to the neighbours of each cell, itself excluded.

    Returns:
        (sigma, rho), in units of the distances.
    """
    k = distances.shape[1] + 1
    positive = distances > 0
    rho = jnp.min(jnp.where(positive, distances, jnp.inf), axis=1)
    rho = jnp.where(positive.any(axis=1), rho, 0.0)
    own_mean = distances.sum(axis=1) / k  # umap's mean counts the cell itself, at distance 0
    mean = jnp.where(rho > 0, own_mean, own_mean.mean())
    excess = jnp.maximum(distances - rho[:, None], 0.0)
    target = jnp.log2(float(k)).astype(distances.dtype)
    floor = MIN_SCALE * mean
    root = jax.lax.stop_gradient(_bisect(excess, target, mean))
    # no root where duplicates alone exceed the target, nor where all distances are 0: sigma is the floor
    above = root > floor
    at = jnp.where(above, root, 1.0)
    e = jnp.exp(-excess / at[:, None])
    slope = jax.lax.stop_gradient((e * excess).sum(axis=1) / at**2)
    curved = slope * at > 1e-3
    newton = at - jnp.where(curved, e.sum(axis=1) - target, 0.0) / jnp.where(curved, slope, 1.0)
    sigma = jnp.where(above, newton, floor)
    return jnp.where(sigma > 0, sigma, 1.0), rho


Bracket = tuple[jax.Array, jax.Array, jax.Array]  # low, high, middle


def _bisect(
    excess: Float[Array, "cells neighbors"], target: Float[Array, ""], scale: Float[Array, " cells"]
) -> Float[Array, " cells"]:
    def halve(_: jax.Array, state: Bracket) -> Bracket:
        low, high, mid = state
        # 0 / 0 where halving underflows: a duplicate, weight 1
        ratio = jnp.where(excess > 0, excess / mid[:, None], 0.0)
        above = jnp.exp(-ratio).sum(axis=1) > target
        low, high = jnp.where(above, low, mid), jnp.where(above, mid, high)
        return low, high, jnp.where(jnp.isinf(high), 2 * mid, (low + high) / 2)

    mid = jnp.where(scale > 0, scale, 1.0)
    return jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(mid), jnp.full_like(mid, jnp.inf), mid))[2]


def membership(
    distances: Float[Array, "cells neighbors"], sigma: Float[Array, " cells"], rho: Float[Array, " cells"]
) -> Float[Array, "cells neighbors"]:
    """Weight exp(-max(d_ij - rho_i, 0) / sigma_i) of the edge from cell i to its neighbour j, in (0, 1]."""
    return jnp.exp(-jnp.maximum(distances - rho[:, None], 0.0) / sigma[:, None])


def union_edges(indices: Int[np.ndarray, "cells neighbors"]) -> UnionEdges:
    """Lists the edges of a k-NN graph made symmetric, without a (cells, cells) array.

    Args:
        indices: neighbours of each cell, as `neighbors.knn` returns them.
    """
    n, k = indices.shape
    rows = np.repeat(np.arange(n, dtype=np.int64), k)
    columns = indices.ravel().astype(np.int64)
    key, reverse = rows * n + columns, columns * n + rows
    order = np.argsort(key, kind="stable")
    every = np.unique(np.concatenate([key, reverse]))
    union_rows, union_columns = np.divmod(every, n)

    def position(wanted: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(key, wanted, sorter=order), len(key) - 1)
        found = order[at]
        return np.where(key[found] == wanted, found, -1).astype(np.int32)

    return UnionEdges(
        union_rows.astype(np.int32),
        union_columns.astype(np.int32),
        position(every),
        position(union_columns * n + union_rows),
    )


def fuzzy_union(weights: Float[Array, "cells neighbors"], edges: UnionEdges) -> Float[Array, " edges"]:
    """Probability a + b - ab that at least one of the two directed edges exists; symmetric."""
    a, b = both_directions(weights, edges)
    return a + b - a * b


def both_directions(
    weights: Float[Array, "cells neighbors"], edges: UnionEdges
) -> tuple[Float[Array, " edges"], Float[Array, " edges"]]:
    """Directed weights (w_ij, w_ji) on the union of edges, 0 where one direction is absent.

    Their mean is the symmetric kernel (K + Kᵀ)/2, their maximum the union graph.
    """
    flat = weights.ravel()
    return (
        jnp.where(edges.forward >= 0, flat[edges.forward], 0.0),
        jnp.where(edges.backward >= 0, flat[edges.backward], 0.0),
    )


def fuzzy_simplicial_set(
    indices: Int[np.ndarray, "cells neighbors"], distances: Float[Array | np.ndarray, "cells neighbors"]
) -> Edges:
    """UMAP's graph: memberships with bandwidths from `smooth_knn_dist`, joined by the fuzzy union.

    Equals `umap.umap_.fuzzy_simplicial_set` with n_neighbors = neighbors + 1 (umap counts the cell itself).
    Differentiable in `distances`.
    """
    edges = union_edges(indices)
    return Edges(edges.rows, edges.columns, _union_of_memberships(jnp.asarray(distances), edges))


@jax.jit
def _union_of_memberships(
    distances: Float[Array, "cells neighbors"], edges: UnionEdges
) -> Float[Array, " edges"]:
    sigma, rho = smooth_knn_dist(distances)
    return fuzzy_union(membership(distances, sigma, rho), edges)


def find_ab_params(spread: float, min_dist: float) -> tuple[float, float]:
    """Fits 1 / (1 + a d^(2b)) to UMAP's similarity: 1 up to min_dist, then exp(-(d - min_dist) / spread).

    Least squares on 300 points of [0, 3 spread], as umap does; (1, 0.1) gives a = 1.577, b = 0.895.
    """
    from scipy.optimize import curve_fit

    d = np.linspace(0, 3 * spread, 300)
    wanted = np.where(d < min_dist, 1.0, np.exp(-(d - min_dist) / spread))
    (a, b), _ = curve_fit(lambda x, a, b: 1.0 / (1.0 + a * x ** (2 * b)), d, wanted)
    return float(a), float(b)
