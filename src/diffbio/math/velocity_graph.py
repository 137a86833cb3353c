"""Which neighbours a cell's velocity points to: cosines, the Markov chain they make, arrows on a map.

Bergen et al. 2020, as scVelo 0.3.4. Every cell has a list of candidates, itself, its neighbours and theirs; a cell
that is listed twice counts once. All lists have one length, so that the functions work inside jit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .blocks import mapped_in_blocks
from .distances import safe_norm, safe_sqrt
from .graph import Edges

ROWS_AT_ONCE = 4096  # of the host
CELLS_AT_ONCE = 16  # whose candidates' genes are held in memory
SURE_QUANTILE = 0.98  # of the cells' largest cosines: no cell that is surer may stay where it is
ROUNDING = 64  # cells this many rounding errors apart are at one place: cells of one neighbourhood have equal moments
STEPS_OF_SOLVER = 200  # of conjugate gradients at most


class CosineLists(NamedTuple):
    """How far each velocity points to each candidate."""

    columns: Int[Array, "cells candidates"]  # sorted
    cosines: Float[Array, "cells candidates"]  # 0 where not listed
    listed: Bool[Array, "cells candidates"]  # False: seen before in the row, or a direction that is none


@functools.partial(jax.jit, static_argnames=("reach",))
def candidates(indices: Int[Array, "cells neighbors"], *, reach: int = 2) -> Int[Array, "cells candidates"]:
    """The cell itself and its neighbours, with reach 2 the neighbours of these too; sorted, with repeats."""
    own = jnp.arange(len(indices), dtype=indices.dtype)[:, None]
    found = [own, indices]
    if reach > 1:
        found.append(indices[indices].reshape(len(indices), -1))
    return jnp.sort(jnp.concatenate(found, axis=1), axis=1)


def distinct_candidates(
    indices: Int[np.ndarray, "cells neighbors"], *, reach: int = 2
) -> Int[np.ndarray, "cells longest"]:
    """`candidates` on the host, every cell once; rows are filled up to the longest with repeats of their last.

    Neighbours of neighbours are few: of 871 with 30 neighbours some 150 are distinct.
    """
    parts = []
    for start in range(0, len(indices), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(indices)))
        found = [rows[:, None], indices[rows]]
        if reach > 1:
            found.append(indices[indices[rows]].reshape(len(rows), -1))
        every = np.sort(np.concatenate(found, axis=1), axis=1)
        new = np.concatenate([np.ones((len(rows), 1), bool), every[:, 1:] != every[:, :-1]], axis=1)
        count = new.sum(axis=1)
        short = np.repeat(every[:, -1:], count.max(), axis=1)
        short[np.arange(count.max()) < count[:, None]] = every[new]
        parts.append(short)
    longest = max(part.shape[1] for part in parts)
    filled = [np.concatenate([p, np.repeat(p[:, -1:], longest - p.shape[1], axis=1)], axis=1) for p in parts]
    return np.concatenate(filled).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("variance_stabilized",))
def cosine_lists(
    positions: Float[Array, "cells genes"],
    velocity: Float[Array, "cells genes"],
    columns: Int[Array, "cells candidates"],
    *,
    genes: Bool[Array, " genes"] | None = None,
    variance_stabilized: bool = False,
) -> CosineLists:
    """Pearson correlation of v_i with x_j - x_i for every candidate j; -1 to 1.

    Memory grows as cells x candidates, not times genes: a few cells are worked on at a time, in the gradient too.

    Args:
        positions: x, moments of spliced counts.
        velocity: v.
        columns: as of `candidates`, sorted along each row.
        genes: those that are compared; None is all.
        variance_stabilized: compares sign(v) sqrt|v| with the same of x_j - x_i.
    """
    used = jnp.ones(positions.shape[1], positions.dtype) if genes is None else genes.astype(positions.dtype)
    count = jnp.maximum(used.sum(), 1.0)
    moved = _signed_root(velocity) if variance_stabilized else velocity
    moved = _centred(moved, used, count)
    length = safe_norm(moved)

    placed = positions * used
    if not variance_stabilized:  # then the ways have mean 0 already, up to rounding
        placed = _centred(positions, used, count)
    extent = (placed * placed).sum(axis=1)

    @jax.checkpoint
    def row(cell: tuple[jax.Array, ...]) -> jax.Array:
        others, own, direction, norm, size = cell
        gap = placed[others] - own
        square = (gap * gap).sum(axis=1)
        apart = square > (ROUNDING * jnp.finfo(own.dtype).eps) ** 2 * size
        if variance_stabilized:
            gap = _signed_root(gap)
            square = (gap * gap).sum(axis=1) - gap.sum(axis=1) ** 2 / count
        # the direction has mean 0, so that the mean of the way has to leave its length only
        both = safe_sqrt(square) * norm
        points = apart & (both > 0)
        return jnp.where(points, gap @ direction / jnp.where(points, both, 1.0), 0.0)

    cosines = mapped_in_blocks(row, (columns, placed, moved, length, extent), CELLS_AT_ONCE)
    repeated = jnp.concatenate([jnp.zeros((len(columns), 1), bool), columns[:, 1:] == columns[:, :-1]], axis=1)
    listed = ~repeated & (cosines != 0)
    return CosineLists(columns, jnp.where(listed, cosines, 0.0), listed)


def surest(found: CosineLists) -> Float[Array, " cells"]:
    """The largest cosine of every cell, 0 at least."""
    best = jnp.argmax(jax.lax.stop_gradient(found.cosines), axis=1)
    return jnp.maximum(jnp.take_along_axis(found.cosines, best[:, None], axis=1)[:, 0], 0.0)


@functools.partial(jax.jit, static_argnames=("scale", "self_transitions"))
def transition_edges(found: CosineLists, *, scale: float = 10.0, self_transitions: bool = True) -> Edges:
    """The Markov chain P(i -> j) = exp(scale cos_ij) / sum over the candidates j of i.

    With `self_transitions` a cell stays with weight exp(scale (q - its largest cosine)), where that is below q, the
    98 % quantile of the cells' largest cosines (scVelo's `transition_matrix`). One edge per candidate; those that are
    not listed have weight 0.
    """
    n = len(found.columns)
    own = jnp.arange(n)
    is_self = found.columns == own[:, None]
    logits = scale * found.cosines
    open_ = found.listed & ~is_self
    best = surest(found)
    doubt = jnp.clip(jnp.quantile(best, SURE_QUANTILE) - best, 0.0, 1.0)
    first = is_self & (jnp.cumsum(is_self, axis=1) == 1)
    alone = ~open_.any(axis=1)  # nowhere to go
    stays = (doubt > 0) & self_transitions | alone
    logits = jnp.where(first, scale * doubt[:, None], logits)
    open_ = open_ | (first & stays[:, None])
    top = jax.lax.stop_gradient(jnp.where(open_, logits, -jnp.inf).max(axis=1, keepdims=True))
    weights = jnp.where(open_, jnp.exp(jnp.where(open_, logits - top, 0.0)), 0.0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    rows = jnp.repeat(own.astype(found.columns.dtype), found.columns.shape[1])
    return Edges(rows, found.columns.ravel(), weights.ravel())


@jax.jit
def confidence(
    velocity: Float[Array, "cells genes"],
    indices: Int[Array, "cells neighbors"],
    *,
    genes: Bool[Array, " genes"] | None = None,
) -> Float[Array, " cells"]:
    """Mean correlation of a cell's velocity with those of its neighbours (as scVelo, unclipped)."""
    used = jnp.ones(velocity.shape[1], velocity.dtype) if genes is None else genes.astype(velocity.dtype)
    moved = _centred(velocity, used, jnp.maximum(used.sum(), 1.0))
    length = safe_norm(moved)
    unit = moved / jnp.where(length > 0, length, 1.0)[:, None]

    @jax.checkpoint
    def column(number: jax.Array) -> jax.Array:
        return (unit * unit[number]).sum(axis=1)

    return jax.lax.map(column, indices.T).mean(axis=0)


@functools.partial(jax.jit, static_argnames=("scale",))
def projected(
    found: CosineLists, embedding: Float[Array, "cells components"], *, scale: float = 10.0
) -> Float[Array, "cells components"]:
    """Velocity on a map: sum_j (p_ij - mean p_i) (y_j - y_i) / |y_j - y_i| (scVelo's `velocity_embedding`).

    p_ij is sign(cos) (exp(scale |cos_ij|) - 1), divided by the sum of absolute values in the row; the diagonal, which
    takes part in that sum, is left out afterwards. Not scaled to the map.
    """
    n = len(found.columns)
    is_self = found.columns == jnp.arange(n)[:, None]
    best = surest(found)
    doubt = jnp.clip(jnp.quantile(best, SURE_QUANTILE) - best, 0.0, 1.0)
    open_ = found.listed & ~is_self
    signed = jnp.sign(found.cosines) * jnp.expm1(scale * jnp.abs(found.cosines)) * open_
    total = jnp.abs(signed).sum(axis=1) + jnp.expm1(scale * doubt)
    share = signed / jnp.where(total > 0, total, 1.0)[:, None]
    count = jnp.maximum(open_.sum(axis=1), 1)
    weight = jnp.where(open_, share - (share.sum(axis=1) / count)[:, None], 0.0)

    def row(cell: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        others, own, weights = cell
        gap = embedding[others] - own
        length = safe_norm(gap)
        return weights @ (gap / jnp.where(length > 0, length, 1.0)[:, None])

    return mapped_in_blocks(row, (found.columns, embedding, weight), 1024)


@functools.partial(jax.jit, static_argnames=("ridge",))
def potential(
    indices: Int[Array, "cells neighbors"], cosines: Float[Array, "cells neighbors"], *, ridge: float = 1e-3
) -> Float[Array, " cells"]:
    """Times whose differences along the graph are nearest to what the velocities say.

    Minimises sum over edges (t_j - t_i - cos_ij)² + ridge sum t_i²: the part of the flow on the graph that is a
    gradient (HodgeRank: Jiang et al. 2011, Math. Program. 127:203). Sparse, by conjugate gradients; the gradient goes
    through the solution by the implicit function theorem. Needs no root and no eigenvectors.

    Args:
        indices: neighbours of each cell.
        cosines: of its velocity with the way to each.
        ridge: relative to the number of neighbours; also fixes the level, the mean is 0 up to it.
    """
    n, k = indices.shape
    flat = indices.ravel()

    def to_cells(on_edges: jax.Array) -> jax.Array:  # transpose of t_j - t_i
        incoming = jnp.zeros(n, on_edges.dtype).at[flat].add(on_edges.ravel())
        return incoming - on_edges.sum(axis=1)

    incoming = jnp.zeros(n, cosines.dtype).at[flat].add(1.0)
    degree = k + incoming + ridge * k

    def laplacian(t: jax.Array) -> jax.Array:
        return to_cells(t[indices] - t[:, None]) + ridge * k * t

    precision = 1e-12 if cosines.dtype == jnp.float64 else 1e-7
    goal = to_cells(cosines)
    t, _ = jax.scipy.sparse.linalg.cg(laplacian, goal, tol=precision, maxiter=STEPS_OF_SOLVER, M=lambda r: r / degree)
    return t


def unit_interval(t: Float[Array, " cells"]) -> Float[Array, " cells"]:
    """Scaled to 0-1; all 0 where there is one value only."""
    fixed = jax.lax.stop_gradient(t)
    low, high = t[jnp.argmin(fixed)], t[jnp.argmax(fixed)]
    return (t - low) / jnp.where(high > low, high - low, 1.0)


def _centred(x: jax.Array, used: jax.Array, count: jax.Array) -> jax.Array:
    """Minus the mean over the genes that are used, 0 at others."""
    x = x * used
    return (x - (x.sum(axis=-1, keepdims=True) / count)) * used


def _signed_root(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.sqrt(jnp.where(size > 0, size, 1.0)) * (size > 0)
