"""Diffusion maps of a graph of cells, and diffusion pseudotime on them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .distances import safe_norm
from .graph import Edges
from .transitions import row_sums, symmetric_edges


def density_normalized(edges: Edges, n_cells: int) -> Edges:
    """Kernel weights K_ij / (q_i q_j), q the row sums: where cells are dense says no more (Coifman and Lafon 2006)."""
    total = row_sums(edges, n_cells)
    density = jnp.where(total > 0, total, 1.0)
    return edges._replace(weights=edges.weights / (density[edges.rows] * density[edges.columns]))


def symmetric_transitions(edges: Edges, n_cells: int) -> tuple[Edges, Float[Array, " cells"]]:
    """D^-1/2 K D^-1/2 of a symmetric kernel K, and the row sums D.

    Similar to the Markov chain D^-1 K: the same eigenvalues, and its right eigenvectors are those of this matrix
    divided by the roots of D.
    """
    total = row_sums(edges, n_cells)
    total = jnp.where(total > 0, total, 1.0)
    root = jnp.sqrt(total)
    return edges._replace(weights=edges.weights / (root[edges.rows] * root[edges.columns])), total


def adaptive_kernel(indices: Int[Array, "cells neighbors"], distances: Float[Array, "cells neighbors"]) -> Edges:
    """W + Wᵀ over 2, with w_ij = exp(-d_ij / s_i) and s_i the distance to the neighbour a third down cell i's list.

    The kernel of Palantir (Setty et al. 2019) as palantir 1.4 computes it: of its `knn`, which counts the cell itself,
    a third, rounded down, is s_i's place among the others. Duplicates have weight 1, and where s_i is 0 all else has 0.
    """
    place = max((indices.shape[1] + 1) // 3, 1) - 1
    scale = jnp.sort(distances, axis=1)[:, place : place + 1]
    apart = (distances > 0) & (scale > 0)
    ratio = jnp.where(apart, distances, 1.0) / jnp.where(scale > 0, scale, 1.0)
    weights = jnp.where(apart, jnp.exp(-ratio), jnp.where(distances > 0, 0.0, 1.0))
    return symmetric_edges(indices, weights, mode="mean")


def diffusion_distances(scaled: Float[Array, "cells components"], cell: Int[Array, ""]) -> Float[Array, " cells"]:
    """DPT distance of every cell to one of them.

    d_ij² = sum over l < 0.9994 of (l / (1 - l))² (psi_i - psi_j)² and, with weight 1, over the other l: Haghverdi et
    al. 2016 with the stationary term that scanpy's dpt keeps. `scaled` is that of `spectrum.Spectrum`.
    """
    return safe_norm(scaled[cell] - scaled)


def scaled_to_one(
    distances: Float[Array, " cells"], parts: Int[Array, " cells"], root: Int[Array, ""]
) -> Float[Array, " cells"]:
    """Distances from the root divided by the largest of its connected part; infinite in other parts."""
    own = parts == parts[root]
    largest = jnp.where(own, distances, 0.0).max()
    return jnp.where(own, distances / jnp.where(largest > 0, largest, 1.0), jnp.inf)
