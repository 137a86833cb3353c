"""Signals between cells on a list of edges: ligand of the sender times receptor of the receiver."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

VALUES_AT_ONCE = 1 << 25  # of edges x pairs; more are taken in blocks of pairs


def complex_levels(
    values: Float[Array, "cells genes"], columns: Int[Array, "pairs subunits"], temperature: float
) -> Float[Array, "cells pairs"]:
    """The lowest subunit of every complex in every cell; a soft minimum Σ softmax(-x / temperature) x above 0.

    Args:
        values: of the genes.
        columns: of the subunits; -1 where there is none.
        temperature: in units of the values; 0 is the minimum.
    """
    there = columns >= 0
    level = values[:, jnp.maximum(columns, 0)]
    if columns.shape[1] == 1:
        return level[:, :, 0]
    if temperature == 0:
        return jnp.where(there, level, jnp.inf).min(axis=-1)
    weights = jax.nn.softmax(jnp.where(there, -level / temperature, -jnp.inf), axis=-1)
    return (weights * level).sum(axis=-1)


def received(
    weights: Float[Array, " edges"],
    senders: Int[Array, " edges"],
    receivers: Int[Array, " edges"],
    levels: Float[Array, "cells pairs"],
) -> Float[Array, "cells pairs"]:
    """Σ over edges to a receiver of weight x level of the sender; blocks of pairs where there are many edges."""
    n_cells, n_pairs = levels.shape

    def of(block: Array) -> Array:
        return jax.ops.segment_sum(weights[:, None] * block[senders], receivers, n_cells)

    per_block = max(1, VALUES_AT_ONCE // max(len(senders), 1))
    if n_pairs <= per_block:
        return of(levels)
    blocks = -(-n_pairs // per_block)
    padded = jnp.pad(levels, ((0, 0), (0, blocks * per_block - n_pairs)))
    parts = jnp.moveaxis(padded.reshape(n_cells, blocks, per_block), 1, 0)
    # without the checkpoint a gradient would keep what every edge carries
    summed = jax.lax.map(jax.checkpoint(of), parts)
    return jnp.moveaxis(summed, 0, 1).reshape(n_cells, -1)[:, :n_pairs]
