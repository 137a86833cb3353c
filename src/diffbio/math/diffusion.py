"""Diffusion of values over a k-nearest-neighbour graph: MAGIC's Markov operator, its real powers, when to stop.

The graph is two (cells, neighbors) arrays; nothing of size (cells, cells) is made, and no power of the operator.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .distances import safe_norm, unit_rows

LEAST_AFFINITY = 1e-4  # weaker edges are none, as graphtools' `thresh`
ENTRIES_PER_BLOCK = 1 << 24  # of (cells, genes) diffused at once: 64 MB in float32
UNROLLED = 16  # neighbours added in one pass over the cells


class Markov(NamedTuple):
    """The operator D^-1 (W + Wᵀ) / 2, with the cell itself in W at weight 1; rows sum to 1.

    Not merged into one list of edges: how many are in both directions is not known inside a program.
    """

    indices: Int[Array, "cells neighbors"]  # the cell itself excluded
    weights: Float[Array, "cells neighbors"]  # directed
    degree: Float[Array, " cells"]


def neighbor_distances(
    points: Float[Array, "cells features"], indices: Int[Array, "cells neighbors"], *, metric: str = "euclidean"
) -> Float[Array, "cells neighbors"]:
    """Distance of every cell to the cells that `indices` names; differentiable in the points.

    metric: "euclidean", or "cosine": 1 - cos of the angle.
    """
    at = unit_rows(points) if metric == "cosine" else points

    @jax.checkpoint  # else the gradient keeps the points of all neighbours
    def column(points: jax.Array, number: jax.Array) -> jax.Array:
        gap = points - points[number]
        return (gap * gap).sum(-1) / 2 if metric == "cosine" else safe_norm(gap)

    return jax.lax.map(lambda number: column(at, number), indices.T).T


def adaptive_affinity(
    distances: Float[Array, "cells neighbors"],
    k: int,
    *,
    bandwidth: Float[Array, ""] | float = 1.0,
    decay: Float[Array, ""] | float = 1.0,
) -> Float[Array, "cells neighbors"]:
    """exp(-(d_ij / (bandwidth s_i))^decay), with s_i the distance of cell i to its k-th neighbour.

    The alpha-decaying kernel of Moon et al. 2019 as graphtools has it, below 1e-4 cut to 0. Where k neighbours are
    duplicates of the cell, s_i is 0: then they have weight 1 and all others 0, the limit of a small s_i.
    """
    scale = bandwidth * jnp.sort(distances, axis=1)[:, k - 1 : k]
    apart = (distances > 0) & (scale > 0)
    # what is cut is left out of the power, whose overflow beside near duplicates would give a gradient of NaN
    log_ratio = jnp.log(jnp.where(apart, distances, 1.0)) - jnp.log(jnp.where(apart, scale, 1.0))
    inside = apart & (decay * log_ratio <= np.log(-np.log(LEAST_AFFINITY)))
    ratio = jnp.where(inside, distances, 1.0) / jnp.where(inside, scale, 1.0)
    affinity = jnp.where(inside, jnp.exp(-(ratio**decay)), jnp.where(distances > 0, 0.0, 1.0))
    return jnp.where(affinity < LEAST_AFFINITY, 0.0, affinity)


def markov(indices: Int[Array, "cells neighbors"], weights: Float[Array, "cells neighbors"]) -> Markov:
    """The Markov operator of directed weights on a k-NN graph: made symmetric by their mean, rows divided by sums."""
    incoming = jnp.zeros(len(weights), weights.dtype).at[indices.ravel()].add(weights.ravel())
    return Markov(indices, weights, 1.0 + (weights.sum(axis=1) + incoming) / 2)


def step(operator: Markov, x: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """One step of diffusion, P x."""
    return (x + symmetric_product(operator.indices, operator.weights, x)) / operator.degree[:, None]


@jax.custom_vjp
def symmetric_product(
    indices: Int[Array, "cells neighbors"], weights: Float[Array, "cells neighbors"], x: Float[Array, "cells genes"]
) -> Float[Array, "cells genes"]:
    """(W + Wᵀ) x / 2 for W of which each row holds `weights` at the columns `indices`."""
    return 0.5 * jax.lax.platform_dependent(indices, weights, x, cpu=_both_in_order, default=_both_at_once)


def _gathered(indices: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
    """W x."""
    width = indices.shape[1]

    def add(j: jax.Array, y: jax.Array) -> jax.Array:
        return y + weights[:, j, None] * x[indices[:, j]]

    return jax.lax.fori_loop(0, width, add, jnp.zeros_like(x), unroll=min(width, UNROLLED))


def _both_in_order(indices: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
    # a row at a time: a scatter of all rows would first write them all to memory
    targets, values, width = indices.ravel(), weights.ravel(), indices.shape[1]

    def add(e: jax.Array, y: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(y, targets[e], 1)
        row = row + values[e] * jax.lax.dynamic_slice_in_dim(x, e // width, 1)
        return jax.lax.dynamic_update_slice_in_dim(y, row, targets[e], 0)

    return jax.lax.fori_loop(0, targets.size, add, _gathered(indices, weights, x))


def _both_at_once(indices: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
    def add(j: jax.Array, y: jax.Array) -> jax.Array:
        return y.at[indices[:, j]].add(weights[:, j, None] * x)

    return jax.lax.fori_loop(0, indices.shape[1], add, _gathered(indices, weights, x))


Product = tuple[jax.Array, jax.Array, jax.Array]


def _product_forward(indices: jax.Array, weights: jax.Array, x: jax.Array) -> tuple[jax.Array, Product]:
    return symmetric_product(indices, weights, x), (indices, weights, x)


def _product_backward(kept: Product, g: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    indices, weights, x = kept

    def along_edges(cell: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        others, own_g, own_x = cell
        return 0.5 * (x[others] @ own_g + g[others] @ own_x)

    # the matrix is its own transpose
    return None, jax.lax.map(along_edges, (indices, g, x)), symmetric_product(indices, weights, g)


symmetric_product.defvjp(_product_forward, _product_backward)


def power_weights(t: Float[Array, ""], n_powers: int) -> Float[Array, " powers"]:
    """Weights of P^0 ... P^(n_powers - 1) whose mixture stands for P^t; exactly P^t at whole t.

    The cubic convolution of Keys 1981 (a = -1/2) along the powers: the weights sum to 1, at most four are not zero,
    and their derivative is continuous and not zero at whole t, so that t can be learned from there. Before P^0 the
    powers go on in a straight line. Weights of the outer two of the four are negative, at least -0.074.
    t: in [0, n_powers - 2].
    """
    s = jnp.abs(t - jnp.arange(-1, n_powers, dtype=t.dtype))
    inner = 1.0 - 2.5 * s**2 + 1.5 * s**3
    outer = 2.0 - 4.0 * s + 2.5 * s**2 - 0.5 * s**3
    weights = jnp.where(s < 1, inner, jnp.where(s < 2, outer, 0.0))
    before, weights = weights[0], weights[1:]
    return weights.at[0].add(2.0 * before).at[1].add(-before)


def diffuse(
    operator: Markov, x: Float[Array, "cells genes"], t: Float[Array, ""], *, most: int = 20
) -> Float[Array, "cells genes"]:
    """P^t x for real t in [0, most] (see `power_weights`); t = 0 is x itself.

    Costs as many products as t needs, each of cells x neighbours x genes, a block of genes at a time. The gradient
    with respect to t, the operator and x costs three to four times as much; it keeps nothing but x.
    """
    weights = power_weights(t, most + 2).astype(x.dtype)
    # where t is whole, the power after it has weight 0, but a derivative
    last = jnp.minimum(jnp.ceil(jax.lax.stop_gradient(t)).astype(int) + 1, most + 1)
    n, n_genes = x.shape
    width = max(1, ENTRIES_PER_BLOCK // n)
    if width >= n_genes:
        return _mixture(operator, x, weights, last)

    def block(out: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
        part = _mixture(operator, part, weights, last)
        return jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=1), None

    starts = jnp.minimum(jnp.arange(0, n_genes, width), n_genes - width)
    return jax.lax.scan(block, jnp.zeros_like(x), starts)[0]


@jax.custom_vjp
def _mixture(operator: Markov, x: jax.Array, weights: jax.Array, last: jax.Array) -> jax.Array:
    """Sum of weights[j] P^j x; `last` is the highest power that the gradient needs."""
    del last
    used = jnp.where(weights != 0, jnp.arange(len(weights)), 0).max()

    def add(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        power, total = carry
        power = step(operator, power)
        return power, total + weights[j] * power

    return jax.lax.fori_loop(1, used + 1, add, (x, weights[0] * x))[1]


Mixture = tuple[Markov, jax.Array, jax.Array, jax.Array]


def _mixture_forward(operator: Markov, x: jax.Array, weights: jax.Array, last: jax.Array) -> tuple[jax.Array, Mixture]:
    return _mixture(operator, x, weights, last), (operator, x, weights, last)


def _mixture_backward(kept: Mixture, g: jax.Array) -> tuple[Markov, jax.Array, jax.Array, None]:
    """By Horner's scheme, w0 x + P (w1 x + P (w2 x + ...)): as many products as powers that are needed, and back."""
    operator, x, weights, last = kept

    def inwards(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inner, kept = carry
        power = last - 1 - j
        return weights[power] * x + step(operator, inner), kept.at[power].set(inner)

    none_yet = jnp.zeros((len(weights) - 1, *x.shape), x.dtype)
    inner = jax.lax.fori_loop(0, last, inwards, (weights[last] * x, none_yet))[1]

    def outwards(power: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        g, of_edges, of_degree, of_x, of_weights = carry
        of_x, of_weights = of_x + weights[power] * g, of_weights.at[power].set((g * x).sum())
        more, g = jax.vjp(step, operator, inner[power])[1](g)
        return g, of_edges + more.weights, of_degree + more.degree, of_x, of_weights

    start = (g, *(jnp.zeros_like(v) for v in (operator.weights, operator.degree, x, weights)))
    g, of_edges, of_degree, of_x, of_weights = jax.lax.fori_loop(0, last, outwards, start)
    of_x, of_weights = of_x + weights[last] * g, of_weights.at[last].set((g * x).sum())
    of_indices: Any = np.zeros(operator.indices.shape, jax.dtypes.float0)
    return Markov(of_indices, of_edges, of_degree), of_x, of_weights, None


_mixture.defvjp(_mixture_forward, _mixture_backward)


def procrustes_disparity(a: Float[Array, "cells genes"], b: Float[Array, "cells genes"]) -> Float[Array, ""]:
    """Squared difference that is left of two configurations, centred and of length 1, by the best rotation and scale.

    It is 1 - (sum of singular values of aᵀb)², as `scipy.spatial.procrustes` has it. Without variance there is
    nothing to compare, and it is 0.
    """
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    square = (a * a).sum() * (b * b).sum()
    varies = square > 0
    overlap = jnp.linalg.svd(a.T @ b, compute_uv=False).sum()
    return jnp.where(varies, jnp.maximum(1.0 - overlap**2 / jnp.where(varies, square, 1.0), 0.0), 0.0)
