"""Means of spliced and unspliced counts over neighbourhoods of cells, as RNA velocity reads them."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .diffusion import Markov, step

MIDDLE = 0.5  # quantile of the totals that a cell's counts are scaled to


@jax.jit
def size_normalized(counts: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """Counts of every cell scaled to the median of the cells' totals (scVelo's `normalize_per_cell`).

    A cell without counts keeps none.
    """
    totals = counts.sum(axis=1)
    goal = jnp.quantile(totals, MIDDLE)
    return counts * jnp.where(totals > 0, goal / jnp.where(totals > 0, totals, 1.0), 0.0)[:, None]


@functools.partial(jax.jit, static_argnames=("dtype",))
def neighborhood(indices: Int[Array, "cells neighbors"], dtype: DTypeLike) -> Markov:
    """The chain whose step is a mean over a cell, its neighbours, and the cells of which it is a neighbour.

    That is the union graph of the lists with all weights 1, as scVelo's moments take it.

    Args:
        indices: neighbours of each cell, itself excluded.
        dtype: of the weights.
    """

    def look_back(mutual: jax.Array, its_neighbor: jax.Array) -> tuple[jax.Array, None]:
        return mutual | (its_neighbor[indices] == jnp.arange(len(indices))[:, None]), None

    mutual, _ = jax.lax.scan(look_back, jnp.zeros(indices.shape, bool), indices.T)
    # the product takes the mean of both directions: an edge of one direction only has to count twice
    weights = jnp.where(mutual, 1.0, 2.0).astype(dtype)
    incoming = jnp.zeros(len(weights), dtype).at[indices.ravel()].add(weights.ravel())
    return Markov(indices, weights, 1.0 + (weights.sum(axis=1) + incoming) / 2)


@jax.jit
def moments(around: Markov, x: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """Mean of x over the neighbourhood of every cell; of products of counts, a second moment."""
    return step(around, x)
