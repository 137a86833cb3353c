"""Modularity of soft communities on a k-NN graph: its value, its mirror ascent, and lists of neighbours for both.

The graph is two (cells, neighbors) arrays W of directed weights and stands for W + Wᵀ: a pair that is listed from both
sides has the sum. The scale of the weights does not matter. An entry that names the cell itself counts nothing, so
that lists of different length can be filled up with it. Nothing of size (cells, cells) is made.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from .diffusion import symmetric_product
from .graph import membership, smooth_knn_dist, union_edges
from .partition import find_communities as find_communities
from .partition import modularity as modularity

STEP = 0.5  # of mirror ascent: a full step of all cells at once overshoots


class Lists(NamedTuple):
    """A weighted graph as lists of neighbours; see the head of the file for how it is read."""

    indices: Int[np.ndarray, "cells neighbors"]
    weights: Float[Array | np.ndarray, "cells neighbors"]


class Links(NamedTuple):
    """A graph with the degrees of W + Wᵀ, entries of the cell itself set to 0."""

    indices: Int[Array, "cells neighbors"]
    weights: Float[Array, "cells neighbors"]
    degree: Float[Array, " cells"]
    total: Float[Array, ""]  # sum of all degrees, 2m; 1 without edges


def links(indices: Int[Array, "cells neighbors"], weights: Float[Array, "cells neighbors"]) -> Links:
    """Degrees of the cells in the graph W + Wᵀ."""
    weights = jnp.where(indices == jnp.arange(len(indices))[:, None], 0.0, weights)
    incoming = jnp.zeros(len(weights), weights.dtype).at[indices.ravel()].add(weights.ravel())
    degree = weights.sum(axis=1) + incoming
    total = degree.sum()
    return Links(indices, weights, degree, jnp.where(total > 0, total, 1.0))


def soft_modularity(
    graph: Links, assignments: Float[Array, "cells communities"], *, resolution: float | Array = 1.0
) -> Float[Array, ""]:
    """Q = Σ_ij w_ij s_i·s_j / 2m - resolution |Σ_i d_i s_i|² / (2m)² for rows s_i on the simplex.

    For rows with a single 1 it is the modularity of Newman and Girvan 2004, with the resolution of Reichardt and
    Bornholdt 2006. Time and memory are cells · (neighbors +) communities.
    """
    inside = 2.0 * (assignments * symmetric_product(graph.indices, graph.weights, assignments)).sum()
    volume = graph.degree @ assignments
    return inside / graph.total - resolution * (volume**2).sum() / graph.total**2


def ascended(
    graph: Links,
    labels: Int[Array, " cells"],
    *,
    n_communities: int,
    temperature: float | Array,
    resolution: float | Array = 1.0,
    n_iterations: int = 10,
) -> Float[Array, "cells communities"]:
    """Soft communities from hard ones, by mirror ascent on modularity and entropy.

    What rises is Q + 2 T Σ_i d_i H(s_i) / 2m, H the entropy of a row. Its gradient per share of edges is
    g_ik = Σ_j w_ij s_jk / d_i - resolution (Σ_j≠i d_j s_jk) / 2m - T log s_ik: the share of the cell's edges that lead
    into community k, less what chance would lead there. A step of exponentiated gradient moves log s towards g / T by
    half of the way; at rest s = softmax(g / T). As T -> 0 a partition that no single move makes better stays as it is.
    Communities without cells at the start have 0 throughout, a cell without edges keeps its label. Differentiable in
    the weights.

    labels: where to start, 0 to n_communities - 1. Discrete: no gradient.
    temperature: in units of the share of a cell's edges.
    """
    hard = jax.nn.one_hot(labels, n_communities, dtype=graph.weights.dtype)
    there = hard.sum(axis=0) > 0
    linked = (graph.degree > 0)[:, None]
    degree = jnp.where(linked, graph.degree[:, None], 1.0)

    @jax.checkpoint
    def pulled(s: Array) -> Array:
        others = graph.degree @ s - graph.degree[:, None] * s
        share = 2.0 * symmetric_product(graph.indices, graph.weights, s) / degree
        return (share - resolution * others / graph.total) / temperature

    def soft(logits: Array) -> Array:
        return jnp.where(linked, jax.nn.softmax(jnp.where(there, logits, -jnp.inf), axis=1), hard)

    def ascend(logits: Array, _: None) -> tuple[Array, None]:
        return logits + STEP * (pulled(soft(logits)) - logits), None

    return soft(jax.lax.scan(ascend, pulled(hard), length=n_iterations)[0])


def partition(
    indices: Int[Array, "cells neighbors"],
    weights: Float[Array, "cells neighbors"],
    *,
    n_communities: int,
    resolution: float = 1.0,
) -> Int[Array, " cells"]:
    """Labels below `n_communities` by `find_communities`, in a JAX program.

    A discrete choice: no gradient goes through it. On values it runs on the host at once, inside jit as a host
    callback.

    Raises:
        DataError: negative or missing weights, row numbers out of range, no edges.
    """
    given = indices, jax.lax.stop_gradient(weights)

    def search(indices: Any, weights: Any) -> np.ndarray:
        edges = listed_edges(np.asarray(indices), np.asarray(weights))
        return find_communities(*edges, len(indices), resolution=resolution, most=n_communities).astype(np.int32)

    if not any(isinstance(a, jax.core.Tracer) for a in given):
        return jnp.asarray(search(*given))
    shape = jax.ShapeDtypeStruct((len(indices),), jnp.int32)
    return jax.pure_callback(search, shape, *given, vmap_method="sequential")


def listed_edges(
    indices: Int[np.ndarray, "cells neighbors"], weights: Float[Array | np.ndarray, "cells neighbors"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and weights of the entries of neighbour lists."""
    rows = np.repeat(np.arange(len(indices)), indices.shape[1])
    return rows, np.asarray(indices).ravel(), np.asarray(weights).ravel()


def neighbor_lists(
    rows: Int[Any, " edges"], columns: Int[Any, " edges"], weights: Real[Any, " edges"], n_cells: int
) -> Lists:
    """Short lists of neighbours of any graph, for example scanpy's connectivities: each pair in one list only.

    Each pair is listed by the one of the two that has fewer neighbours, so that a cell that many others name does not
    make all lists long. A pair may be given once or twice; its weights are added up. Lists are filled up with the cell
    itself, weight 0.
    """
    from .partition import symmetric_links

    both = symmetric_links(rows, columns, weights, n_cells).tocoo()
    count = np.bincount(both.row, minlength=n_cells)
    here = np.lexsort((both.col, both.row))
    row, col, weight = both.row[here], both.col[here], both.data[here]
    kept = (count[row] < count[col]) | ((count[row] == count[col]) & (row < col))
    row, col, weight = row[kept], col[kept], weight[kept]
    length = np.bincount(row, minlength=n_cells)
    width = max(int(length.max(initial=0)), 1)
    indices = np.tile(np.arange(n_cells, dtype=np.int32)[:, None], (1, width))
    values = np.zeros((n_cells, width), np.float32)
    place = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    indices[row, place], values[row, place] = col, weight
    return Lists(indices, values)


def fuzzy_lists(
    indices: Int[np.ndarray, "cells neighbors"], distances: Float[Array | np.ndarray, "cells neighbors"]
) -> Lists:
    """UMAP's graph as lists of neighbours: W + Wᵀ is the fuzzy union a + b - ab of the memberships.

    The weight of a pair that is listed from both sides is halved between them. Equals `graph.fuzzy_simplicial_set`;
    differentiable in `distances`. scanpy's graph of `n_neighbors` is this with n_neighbors - 1 of `neighbors.knn`,
    since it counts the cell itself.
    """
    edges = union_edges(indices)
    backward = np.full(indices.size, -1, np.int32)
    known = edges.forward >= 0
    backward[edges.forward[known]] = edges.backward[known]
    return Lists(indices, _halved_union(jnp.asarray(distances), jnp.asarray(backward)))


@jax.jit
def _halved_union(
    distances: Float[Array, "cells neighbors"], backward: Int[Array, " edges"]
) -> Float[Array, "cells neighbors"]:
    own = membership(distances, *smooth_knn_dist(distances)).ravel()
    other = jnp.where(backward >= 0, own[backward], 0.0)
    union = own + other - own * other
    return jnp.where(backward >= 0, union / 2.0, union).reshape(distances.shape)
