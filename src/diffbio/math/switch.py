"""Switch-like expression along pseudotime (Campbell & Yau 2016, Bioinformatics 33:1241), by maximum likelihood.

mu(t) = 2 mu0 / (1 + exp(-k (t - t0))) with normal noise. Times run from 0 to 1 here, the strength k in its inverse.
Cells enter as sums at nodes along time: each cell its own node, or some hundred nodes that every cell is spread over
by cubic weights (`node_weights`), which serve any number of cells.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .batched_newton import Loss, minimize, with_implicit_gradient

STRENGTH_UNIT = 10.0  # parameters of order 1 for Newton's method
GRID_STRENGTHS = (0.3, 1.0, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)  # and their negatives
GRID_TIMES = 24
N_STEPS = 40


class Nodes(NamedTuple):
    """Where along time the cells are, shared by all genes."""

    times: Float[Array, " nodes"]  # 0 to 1
    cells: Float[Array, " nodes"]  # how many


class GeneSums(NamedTuple):
    """One gene's expression (vmapped over genes)."""

    deviation: Float[Array, " nodes"]  # expression less its mean, summed over the cells of a node
    mean: Float[Array, ""]
    scatter: Float[Array, ""]  # sum of squares around the mean, above 0


class Limits(NamedTuple):
    """The box of k and t0."""

    strength: float  # largest |k|, in units of one over the range of pseudotime
    margin: float  # how far t0 may lie outside of the cells, in units of the range


def sigmoid_basis(theta: Float[Array, " p"], times: Float[Array, " nodes"]) -> Float[Array, " nodes"]:
    """1 / (1 + exp(-k (t - t0))) of theta = (k / 10, t0), over its largest: far from t0 it does not vanish."""
    return jnp.exp(jax.nn.log_sigmoid(STRENGTH_UNIT * theta[0] * (times - theta[1])) - log_largest(theta))


def log_largest(theta: Float[Array, " p"]) -> Float[Array, ""]:
    """Log of the largest 1 / (1 + exp(-k (t - t0))) at times from 0 to 1."""
    return jax.nn.log_sigmoid(STRENGTH_UNIT * theta[0] * (jnp.where(theta[0] > 0, 1.0, 0.0) - theta[1]))


def log_residual(theta: Float[Array, " p"], data: tuple[GeneSums, Nodes]) -> Float[Array, ""]:
    """Log of the residual sum of squares over that of the constant, at the best mu0."""
    return jnp.log1p(-jnp.minimum(_gain(theta, data), 1 - 1e-6))


def best_peak(theta: Float[Array, " p"], data: tuple[GeneSums, Nodes]) -> Float[Array, ""]:
    """The factor of `sigmoid_basis` by least squares, 2 mu0 exp(log_largest); `log_residual` is that at this mu0."""
    gene, nodes = data
    f, n = sigmoid_basis(theta, nodes.times), nodes.cells.sum()
    middle = (nodes.cells * f).sum() / n
    return ((gene.deviation * (f - middle)).sum() + n * gene.mean * middle) / (nodes.cells * f**2).sum()


def _gain(theta: Array, data: tuple[GeneSums, Nodes]) -> Array:
    """Share of the scatter that the sigmoid explains; centred, so that no large sums cancel."""
    gene, nodes = data
    f, n = sigmoid_basis(theta, nodes.times), nodes.cells.sum()
    middle = (nodes.cells * f).sum() / n
    off = f - middle
    shared, spread = (gene.deviation * off).sum(), (nodes.cells * off**2).sum()
    explained = shared**2 + n * gene.mean * (2 * shared * middle - gene.mean * spread)
    return explained / ((spread + n * middle**2) * gene.scatter)


def box(limits: Limits, dtype: Any) -> tuple[Array, Array]:
    """Lower and upper ends of (k / 10, t0)."""
    most = limits.strength / STRENGTH_UNIT
    return jnp.asarray([-most, -limits.margin], dtype), jnp.asarray([most, 1 + limits.margin], dtype)


def node_weights(times: Float[Array, " cells"], n_nodes: int) -> tuple[Array, Array]:
    """Numbers (cells, 4) of the nodes next to each cell, of `n_nodes` even ones from 0 to 1, and its cubic weights.

    A smooth function at a cell is the weighted sum of its values at the nodes, with an error of the fourth order:
    sums over cells become sums over nodes (below 1e-4 of a sigmoid of strength 100 at 512 nodes).
    """
    place = times * (n_nodes - 1)
    left = jnp.clip(jnp.floor(jax.lax.stop_gradient(place)), 1, n_nodes - 3)
    s = place - left
    weights = [-s * (s - 1) * (s - 2) / 6, (s + 1) * (s - 1) * (s - 2) / 2, -(s + 1) * s * (s - 2) / 2]
    weights.append((s + 1) * s * (s - 1) / 6)
    return left.astype(jnp.int32)[:, None] + jnp.arange(-1, 3), jnp.stack(weights, axis=1)


def at_nodes(
    values: Float[Array, "cells columns"], times: Float[Array, " cells"], n_nodes: int
) -> Float[Array, "nodes columns"]:
    """Sums of `values` over the cells of each node; with fewer cells than nodes each cell is one."""
    if len(times) <= n_nodes:
        return values
    numbers, weights = node_weights(times, n_nodes)
    total = jnp.zeros((n_nodes, values.shape[1]), values.dtype)
    for corner in range(4):
        total = total.at[numbers[:, corner]].add(values * weights[:, corner, None])
    return total


def nodes_of(times: Float[Array, " cells"], n_nodes: int) -> Nodes:
    """The nodes of cells at `times`, 0 to 1."""
    cells = at_nodes(jnp.ones_like(times)[:, None], times, n_nodes)[:, 0]
    return Nodes(times if len(times) <= n_nodes else jnp.linspace(0, 1, n_nodes, dtype=times.dtype), cells)


def starts(limits: Limits) -> np.ndarray:
    """(2, points, 2): where the search may begin, rising and falling switches."""
    places = np.linspace(-limits.margin, 1 + limits.margin, GRID_TIMES)
    strengths = [k for k in GRID_STRENGTHS if k < limits.strength] or [limits.strength / 2]
    return np.asarray([[(sign * k / STRENGTH_UNIT, t) for k in strengths for t in places] for sign in (1, -1)])


def straight(gene: GeneSums, nodes: Nodes, limits: Limits) -> Float[Array, "2 1 2"]:
    """Rising and falling switches of the slope of a straight line.

    Where the mean is far above the noise no point of the grid is flat enough: the best of them are those that do not
    change at all, and from these no step leads away.
    """
    n = nodes.cells.sum()
    off = nodes.times - (nodes.cells * nodes.times).sum() / n
    slope = (gene.deviation * off).sum() / (nodes.cells * off**2).sum()
    level = jnp.maximum(jnp.abs(gene.mean), 1e-6 * jnp.sqrt(gene.scatter / n))
    k = jnp.clip(2 * jnp.abs(slope) / level, 1e-6, min(2.0, limits.strength)) / STRENGTH_UNIT
    return jnp.stack([jnp.stack([sign * k, jnp.full_like(k, 0.5)]) for sign in (1.0, -1.0)])[:, None]


def search(loss: Loss, points: Array, data: Any, *, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Local minima (kinds, p) by Newton's method from the best point of each kind, and the losses there; no gradient.

    points: (kinds, points, p).
    lower: of the box, (p,) or (kinds, p).
    upper: likewise.
    """
    data = jax.lax.stop_gradient(data)

    def from_kind(points: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
        values = jax.vmap(lambda at: loss(at, data))(points)
        at = minimize(loss, points[jnp.argmin(values)], data, lower=lower, upper=upper, n_steps=N_STEPS)
        return at, loss(at, data)

    shape = (len(points), points.shape[2])
    return jax.vmap(from_kind)(points, jnp.broadcast_to(lower, shape), jnp.broadcast_to(upper, shape))


def find_switch(gene: GeneSums, nodes: Nodes, limits: Limits) -> Float[Array, " p"]:
    """(k / 10, t0) of the maximum likelihood of one gene; no gradient."""
    lower, upper = box(limits, nodes.times.dtype)
    points = jnp.asarray(starts(limits), lower.dtype)
    points = jnp.concatenate([points, straight(gene, nodes, limits)], axis=1)
    found, loss = search(log_residual, points, (gene, nodes), lower=lower, upper=upper)
    return found[jnp.argmin(loss)]


def switch_of(theta: Float[Array, " p"], gene: GeneSums, nodes: Nodes, limits: Limits) -> Float[Array, " p"]:
    """What `find_switch` found, with the gradient of the implicit function."""
    lower, upper = box(limits, nodes.times.dtype)
    return with_implicit_gradient(log_residual, theta, (gene, nodes), lower=lower, upper=upper)


def ratio_of(theta: Float[Array, " p"], gene: GeneSums, nodes: Nodes) -> Float[Array, ""]:
    """Twice the log of the likelihood ratio against a constant."""
    return -nodes.cells.sum() * log_residual(theta, (gene, nodes))
