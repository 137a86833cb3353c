"""Markov chains of cells: from connectivities, directed by pseudotime or by velocity, and their weighted sums.

The kernels of CellRank (Lange et al. 2022; the sums of Weiler et al. 2024) on edge lists. Every kernel has rows that
sum to 1; a cell without edges keeps none.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import sparse

from ..errors import ConfigError, DataError
from .callbacks import on_host
from .graph import Edges
from .transitions import combined, normalized_rows, row_sums, to_scipy
from .velocity_graph import CosineLists, transition_edges

MOST_KEPT = 30  # neighbours that are kept whatever their pseudotime, as CellRank has it


def connectivity_kernel(edges: Edges, n_cells: int, *, density_normalize: bool = True) -> Edges:
    """Random walk on a symmetric graph: its weights over their row's sum.

    Args:
        edges: a symmetric graph, such as `transitions.connectivities`.
        n_cells: rows of the matrix.
        density_normalize: first divides w_ij by the degrees of both cells (Coifman & Lafon 2006, alpha 1), so that the
            walk does not prefer where many cells were sampled.
    """
    if density_normalize:
        degree = row_sums(edges, n_cells)
        share = 1 / jnp.where(degree > 0, degree, 1.0)
        edges = edges._replace(weights=edges.weights * share[edges.rows] * share[edges.columns])
    return normalized_rows(edges, n_cells)


def pseudotime_kernel(
    edges: Edges,
    pseudotime: Float[Array, " cells"],
    *,
    scheme: str = "hard",
    frac_to_keep: float = 0.3,
    b: float = 10.0,
    nu: float = 0.5,
) -> Edges:
    """Random walk on a graph whose edges into the past are taken away or made weaker.

    "hard" is Palantir's rule as CellRank has it: edges to earlier cells go, but for those among a cell's closest
    neighbours. Which ones is a discrete choice, so it has a gradient in the weights only. "soft" is VIA's (Stassen et
    al. 2021): the weight of an edge into the past is multiplied by 2 / (1 + exp(b dt))^(1 / nu), dt > 0 being how far
    back it leads; that is differentiable in the pseudotime, but where two cells' times cross: there the factor jumps
    from 1 to 2^(1 - 1 / nu), unless nu is 1. As b grows, all edges into the past are gone.

    Args:
        edges: a graph such as `transitions.connectivities`.
        pseudotime: of the cells, 0-1; infinity is later than all.
        scheme: "hard" or "soft".
        frac_to_keep: of "hard": share of a cell's neighbours, those of largest weight and 30 at most, to which edges
            stay.
        b: of "soft": how fast weights fall, per unit of pseudotime.
        nu: of "soft": the smaller, the faster they fall.

    Raises:
        ConfigError: an unknown scheme, a share outside [0, 1], or b or nu not above 0.
    """
    if scheme not in ("hard", "soft") or not 0 <= frac_to_keep <= 1 or not (b > 0 and nu > 0):
        msg = (
            "pseudotime_kernel: scheme must be 'hard' or 'soft', frac_to_keep from 0 to 1, b and nu above 0; got "
            f"{scheme!r}, {frac_to_keep}, {b}, {nu}."
        )
        raise ConfigError(msg)
    if scheme == "hard":
        factor = forward_edges(edges, pseudotime, frac_to_keep=frac_to_keep).astype(edges.weights.dtype)
    else:
        back = pseudotime[edges.rows] - pseudotime[edges.columns]
        # (1 + exp(b dt))^(-1 / nu) without overflow; both of infinite pseudotime: neither is in the past
        past = jnp.where(back > 0, back, 1.0)
        factor = jnp.where(back > 0, 2 * jnp.exp(-jax.nn.softplus(b * past) / nu), 1.0)
    return normalized_rows(edges._replace(weights=edges.weights * factor), len(pseudotime))


def forward_edges(
    edges: Edges, pseudotime: Float[Array, " cells"], *, frac_to_keep: float = 0.3
) -> Float[Array, " edges"]:
    """1 for edges that the hard scheme of `pseudotime_kernel` keeps, 0 for others; made on the host, no gradient."""
    parts = [jax.lax.stop_gradient(part) for part in (*edges, pseudotime)]

    def choose(rows: Any, columns: Any, weights: Any, when: Any) -> np.ndarray:
        return _kept(Edges(rows, columns, weights), when, frac_to_keep)

    shape = jax.ShapeDtypeStruct(edges.weights.shape, edges.weights.dtype)
    return on_host(choose, shape, *parts)


def _kept(edges: Edges, when: np.ndarray, frac_to_keep: float) -> np.ndarray:
    n = len(when)
    rows, columns = np.asarray(edges.rows), np.asarray(edges.columns)
    matrix = to_scipy(edges, n)
    matrix.sum_duplicates()  # a neighbour counts once, however often its edge is listed
    matrix.eliminate_zeros()
    degree = np.diff(matrix.indptr)
    of = np.repeat(np.arange(n), degree)
    order = np.lexsort((-matrix.data, of))  # of each cell, the largest weight first
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order)) - matrix.indptr[of]
    close = rank < np.minimum(MOST_KEPT, np.floor(degree * frac_to_keep).astype(int))[of]
    near = matrix.copy()
    near.data = np.where(close, 1.0, 0.0)
    near.eliminate_zeros()
    listed = near.indices + n * np.repeat(np.arange(n), np.diff(near.indptr)).astype(np.int64)
    kept = np.isin(columns + n * rows.astype(np.int64), listed)
    return np.asarray(kept | (when[rows] <= when[columns]))


def velocity_kernel(found: CosineLists, *, scale: float | None = None) -> Edges:
    """Walk towards the neighbours that a cell's velocity points at: softmax of the cosines times `scale`.

    Args:
        found: cosines of the angle between a cell's velocity and the step to each candidate.
        scale: steepness of the softmax; None is 1 over the median of the cosines' absolute values, as in CellRank.
    """
    if scale is None:
        # no gradient through the median: it is a unit, as in CellRank
        sizes = jnp.where(found.listed, jnp.abs(jax.lax.stop_gradient(found.cosines)), jnp.nan)
        middle = jnp.nanmedian(sizes)
        unit = jnp.where(middle > 0, middle, 1.0)
        found = found._replace(cosines=found.cosines / unit)
    return transition_edges(found, scale=1.0 if scale is None else scale, self_transitions=False)


def cosine_lists_of(matrix: Any) -> CosineLists:
    """The stored entries of a sparse (cells, cells) matrix of cosines as lists, filled up with the cell itself.

    Raises:
        DataError: no entry at all.
    """
    entries = sparse.csr_array(matrix)
    entries.sort_indices()
    degree = np.diff(entries.indptr)
    if not entries.nnz:
        msg = "velocity_kernel: the matrix of cosines has no entries; is the velocity 0 everywhere?"
        raise DataError(msg)
    n, longest = len(degree), int(degree.max())
    listed = np.arange(longest) < degree[:, None]
    columns = np.repeat(np.arange(n)[:, None], longest, axis=1)
    cosines = np.zeros((n, longest), np.float32)
    columns[listed], cosines[listed] = entries.indices, entries.data
    order = np.argsort(columns, axis=1, kind="stable")
    parts = (columns, cosines, listed & (cosines != 0))
    return CosineLists(*(jnp.asarray(np.take_along_axis(part, order, axis=1)) for part in parts))


def combined_kernel(parts: Sequence[tuple[float, Edges]], n_cells: int) -> Edges:
    """Weighted mean of kernels on the same cells, shares divided by their sum.

    Raises:
        ConfigError: no kernel, or a share that is not above 0.
    """
    if not parts or not all(share > 0 for share, _ in parts):
        msg = f"combined_kernel: shares must be above 0, got {[share for share, _ in parts]}."
        raise ConfigError(msg)
    total = sum(share for share, _ in parts)
    return normalized_rows(combined([(share / total, edges) for share, edges in parts]), n_cells)
