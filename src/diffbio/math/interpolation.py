"""Interpolation between scattered points, exact at the points themselves (modified Shepard)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .distances import squared_euclidean

AT_A_NODE = 1e-9  # squared distance, in units of the squared radius, where a node takes nearly all the weight


def shepard_weights(
    x: Float[Array, "cells features"], nodes: Float[Array, "nodes features"], k: int
) -> tuple[Int[Array, "cells nearest"], Float[Array, "cells nearest"]]:
    """The k nearest nodes of each cell, and weights ((r - d) / (r d))² over their sum, r the distance of the farthest.

    Franke & Nielson 1980: continuous with a continuous slope, although other nodes come near as a cell moves: a node
    comes and goes at weight 0. At a node all weight is on it. Cost cells · nodes · features.
    """
    found = jax.lax.stop_gradient(squared_euclidean(x, nodes))
    nearest = jax.lax.top_k(-found, k)[1]
    gap = x[:, None, :] - nodes[nearest]
    square = (gap * gap).sum(axis=-1)
    radius = square.max(axis=1, keepdims=True)
    some = radius > 0
    share = square / jnp.where(some, radius, 1.0)
    root = jnp.sqrt(jnp.where(share > 0, share, 1.0)) * (share > 0)
    # not 0 everywhere, should all be equally far
    near = (1.0 - root) ** 2 / (share + AT_A_NODE) + AT_A_NODE
    return nearest, near / near.sum(axis=1, keepdims=True)


def local_slopes(
    nodes: Float[Array, "nodes features"], values: Float[Array, "nodes outputs"], k: int
) -> Float[Array, "nodes outputs features"]:
    """Slope of the values around each node: least squares over its k nearest, with a ridge of their mean square.

    As much ridge as signal halves a slope that is well determined; it keeps that of noise small.
    """
    nearest = jax.lax.top_k(-squared_euclidean(nodes, nodes), k + 1)[1]
    steps, rises = (v[nearest] - v[:, None, :] for v in (nodes, values))
    products = jnp.einsum("nif,njf->nij", steps, steps)
    ridge = jnp.trace(products, axis1=1, axis2=2) / k
    ridge = jnp.where(ridge > 0, ridge, 1.0)[:, None, None]
    return jnp.einsum("nio,nif->nof", jnp.linalg.solve(products + ridge * jnp.eye(k + 1), rises), steps)


def interpolate(
    x: Float[Array, "cells features"],
    nodes: Float[Array, "nodes features"],
    values: Float[Array, "nodes outputs"],
    slopes: Float[Array, "nodes outputs features"],
    nearest: Int[Array, "cells nearest"],
    weights: Float[Array, "cells nearest"],
) -> Float[Array, "cells outputs"]:
    """Σ_j w_j (value_j + slope_j (x - node_j)): at a node its value, and its slope is the slope there."""
    steps = x[:, None, :] - nodes[nearest]
    local = values[nearest] + jnp.einsum("ckof,ckf->cko", slopes[nearest], steps)
    return (weights[..., None] * local).sum(axis=1)
