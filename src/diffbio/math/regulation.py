"""What regulators say about genes: ranks, correlations, partial effects, reconstruction, and networks from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .soft import soft_rank

GENES_AT_ONCE = 64  # that are ranked side by side: bounds memory
SIGN_SCALE = 10.0  # a partial effect of 0.1 standard deviations has a sign of 0.76


def standardized(x: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """Each gene with mean 0 and standard deviation 1; a constant gene is 0, without NaN in the gradient."""
    centered = x - x.mean(axis=0)
    variance = (centered**2).mean(axis=0)
    moves = varying(x) & (variance > 0)  # the mean of equal values may differ from them by rounding
    spread = jnp.sqrt(jnp.where(moves, variance, 1.0))
    return jnp.where(moves, centered / spread, 0.0)


@functools.partial(jax.jit, static_argnames="width")
def standard_ranks(x: Float[Array, "cells genes"], width: float) -> Float[Array, "cells genes"]:
    """Soft ranks of the cells in each gene, standardised.

    They do not depend on the unit of a gene, or on a log. Their correlations are Spearman's as the width goes to 0.

    Args:
        x: expression.
        width: values closer than this share their places smoothly; in standard deviations of the gene.
    """
    genes, rank = standardized(x).T, functools.partial(soft_rank, width=width)
    many = len(genes) > GENES_AT_ONCE
    ranks = jax.lax.map(rank, genes, batch_size=GENES_AT_ONCE) if many else jax.vmap(rank)(genes)
    return standardized(-ranks.T)


def varying(x: Float[Array, "cells genes"]) -> Bool[Array, " genes"]:
    """Genes that have two values at least."""
    return (x != x[:1]).any(axis=0)


def correlations(z: Float[Array, "cells genes"], regulators: Int[Array, " tfs"]) -> Float[Array, "tfs genes"]:
    """Of standardised expression: each regulator with each gene."""
    return z[:, regulators].T @ z / z.shape[0]


def not_itself(regulators: Int[Array, " tfs"], n_genes: int) -> Bool[Array, "tfs genes"]:
    """False where the gene is the regulator itself."""
    return regulators[:, None] != jnp.arange(n_genes)


@jax.jit
def partial_effects(
    correlation: Float[Array, "tfs genes"], regulators: Int[Array, " tfs"], ridge: float | Array
) -> Float[Array, "tfs genes"]:
    """Coefficients of the ridge regression of every gene on all regulators at once, itself left out.

    For a gene outside the regulators (R + ridge I)^-1 r. For regulator j on the others -P_ij / P_jj with the same
    inverse P, which is the same regression by the block inverse. Cost tfs³ + tfs² genes.

    Args:
        correlation: of regulators (rows) with genes.
        regulators: columns of `correlation` that are the regulators, in the order of its rows.
        ridge: added to the diagonal, in units of a gene's variance.
    """
    among = correlation[:, regulators]
    inverse = jnp.linalg.inv(among + ridge * jnp.eye(len(among), dtype=among.dtype))
    inverse = (inverse + inverse.T) / 2
    effects = inverse @ correlation
    own = -inverse / jnp.diagonal(inverse)
    return jnp.where(not_itself(regulators, correlation.shape[1]), effects.at[:, regulators].set(own), 0.0)


@jax.jit
def unexplained(
    weights: Float[Array, "tfs genes"], correlation: Float[Array, "tfs genes"], among: Float[Array, "tfs tfs"]
) -> Float[Array, " genes"]:
    """Mean squared error, over cells, of sum_i w_ig z_i as a reconstruction of z_g: 1 - 2 w.r + w' R w.

    The sums over cells are in the correlations, so that this costs tfs² genes for any number of cells.

    Args:
        weights: of the regulators in each gene.
        correlation: of regulators with genes.
        among: of regulators with each other.
    """
    return 1.0 - 2.0 * (weights * correlation).sum(axis=0) + (weights * (among @ weights)).sum(axis=0)


@jax.jit
def regulator_activity(z: Float[Array, "cells genes"], weights: Float[Array, "tfs genes"]) -> Float[Array, "cells tfs"]:
    """Mean of a regulator's targets in each cell, weighted with sign: sum_g w_ig z_g / |w_i|; 0 without targets.

    Dividing by the norm gives the same spread to regulators of many and of few targets whose noise is independent.
    """
    square = (weights**2).sum(axis=1)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return z @ weights.T / norm


def balanced(attention: Float[Array, "tfs genes"]) -> Float[Array, "tfs genes"]:
    """a_ig / sqrt(sum_i a_ig): the geometric mean of an edge's attention and of its share among the gene's regulators.

    The first alone puts genes that are explained well before all others, the second forgets how well they are
    explained.
    """
    total = attention.sum(axis=0)
    return attention / jnp.sqrt(jnp.where(total > 0, total, 1.0))


def soft_threshold(
    weights: Float[Array, "tfs genes"], threshold: float | Array, temperature: float
) -> Float[Array, "tfs genes"]:
    """Weights times a gate sigmoid((w - threshold) / temperature); as it goes to 0, those above the threshold."""
    return weights * jax.nn.sigmoid((weights - threshold) / temperature)


def strongest_edges(
    weights: np.ndarray, *, n_edges: int | None = None, threshold: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries above a threshold, strongest first; of equal ones the first row.

    Args:
        weights: (tfs, genes), >= 0.
        n_edges: at most so many; None is all.
        threshold: those at or below it are no edges.
    """
    flat = np.asarray(weights).ravel()
    order = np.flatnonzero(flat > threshold)
    if n_edges is not None and n_edges < len(order):
        cut = np.partition(flat[order], len(order) - n_edges)[len(order) - n_edges]
        order = order[flat[order] >= cut]
    order = order[np.argsort(-flat[order], kind="stable")][:n_edges]
    rows, columns = np.divmod(order, weights.shape[1])
    return rows, columns


def rank_average(*weights: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Mean over several networks of the rank of each edge, 0-1; equal weights get their mean rank.

    Args:
        weights: (tfs, genes) each.
        possible: (tfs, genes), False where no edge can be; it gets 0.
    """
    from scipy.stats import rankdata

    total = np.zeros(possible.shape)
    for one in weights:
        total[possible] += rankdata(np.asarray(one)[possible]) / max(int(possible.sum()), 1)
    return total / len(weights)
