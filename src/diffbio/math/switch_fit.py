"""Fits of `math.switch` and `math.switch_dropout` to many genes, and to the same genes in permuted cells."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .blocks import mapped_in_blocks
from .switch import GeneSums, Limits, Nodes, at_nodes, best_peak, find_switch, log_residual, nodes_of, switch_of
from .switch_dropout import SeenSums, dropout_of, dropout_peak, find_dropout

GENES_PER_BLOCK = 256
ZERO = 1e-4  # of the zero-inflated model: log expression up to here was not seen


class Fit(NamedTuple):
    """Maximum likelihood of every gene, on times from 0 to 1."""

    theta: Float[Array, "genes 2"]  # k / 10, t0
    peak: Float[Array, " genes"]  # factor of `math.switch.sigmoid_basis`
    variance: Float[Array, " genes"]
    log_likelihood: Float[Array, " genes"]
    null_log_likelihood: Float[Array, " genes"]
    null_ratios: Float[Array, "permutations genes"]  # twice the log likelihood ratios of permuted cells


def fit_normal(
    expression: Float[Array, "cells genes"],
    times: Float[Array, " cells"],
    permutations: Int[Array, "permutations cells"],
    limits: Limits,
    n_nodes: int,
) -> Fit:
    """Least squares. Times run from 0 to 1; row p of `permutations` says whose expression each cell takes."""
    mean = expression.mean(axis=0)
    off = expression - mean

    def sums(off: Array) -> Array:
        return at_nodes(off, times, n_nodes).T

    null = jax.lax.stop_gradient(jax.lax.map(lambda cells: sums(off[cells]), permutations))
    return fit_sums(sums(off), mean, (off**2).sum(axis=0), null, nodes_of(times, n_nodes), limits)


@partial(jax.jit, static_argnames="limits")
def fit_sums(
    deviation: Float[Array, "genes nodes"],
    mean: Float[Array, " genes"],
    scatter: Float[Array, " genes"],
    null: Float[Array, "permutations genes nodes"],
    nodes: Nodes,
    limits: Limits,
) -> Fit:
    """`fit_normal` from sums at nodes.

    deviation: of expression from its mean.
    scatter: sum of squares of this over cells.
    null: `deviation` of permuted cells.
    """
    n = nodes.cells.sum()
    varies = scatter > 1e-9 * (1e-30 + n * mean**2)
    scatter = jnp.where(varies, scatter, 1.0)
    genes = GeneSums(jnp.where(varies[:, None], deviation, 0.0), mean, scatter)
    every = jnp.concatenate([genes.deviation[None], null])

    def find(gene: GeneSums) -> tuple[Array, Array]:
        at = find_switch(gene, nodes, limits)
        return at, log_residual(at, (gene, nodes))

    rows = GeneSums(every.reshape(-1, every.shape[-1]), *(jnp.tile(x, len(every)) for x in (mean, scatter)))
    found, loss = mapped_in_blocks(find, jax.lax.stop_gradient(rows), GENES_PER_BLOCK)
    null_ratios = (-n * loss).reshape(len(every), -1)[1:]

    def polish(theta: Array, gene: GeneSums) -> tuple[Array, Array, Array]:
        theta = switch_of(theta, gene, nodes, limits)
        return theta, best_peak(theta, (gene, nodes)), -n * log_residual(theta, (gene, nodes))

    theta, peak, ratio = _mapped(polish, found[: len(mean)], genes)
    ratio = jnp.where(varies, ratio, 0.0)
    constant = jnp.where(varies, -0.5 * n * (jnp.log(2 * jnp.pi * scatter / n) + 1), 0.0)
    return Fit(
        jnp.where(varies[:, None], theta, jnp.asarray([0.0, 0.5], mean.dtype)),
        jnp.where(varies, peak, mean),
        jnp.where(varies, scatter / n * jnp.exp(-ratio / n), 0.0),
        constant + 0.5 * ratio,
        constant,
        jnp.where(varies, null_ratios, 0.0),
    )


def fit_zero_inflated(
    expression: Float[Array, "cells genes"],
    times: Float[Array, " cells"],
    permutations: Int[Array, "permutations cells"],
    limits: Limits,
    n_nodes: int,
) -> Fit:
    """With values that are lost; see `fit_normal`."""
    seen = jax.lax.stop_gradient(expression > ZERO)
    there = seen.astype(times.dtype)
    values = jnp.where(seen, expression, 0.0)
    count = there.sum(axis=0)
    square = (values**2).sum(axis=0)
    unit = jnp.where(count > 0, jnp.sqrt(jnp.where(count > 0, square, 1.0) / jnp.maximum(count, 1.0)), 1.0)
    scaled = values / unit

    def sums(scaled: Array, there: Array) -> tuple[Array, Array]:
        return at_nodes(scaled, times, n_nodes).T, at_nodes(there, times, n_nodes).T

    null = jax.lax.stop_gradient(jax.lax.map(lambda cells: sums(scaled[cells], there[cells]), permutations))
    own = SeenSums(*sums(scaled, there), jnp.where(seen, scaled, 1.0).T, there.T)
    return fit_seen(own, null, unit, nodes_of(times, n_nodes), limits)


@partial(jax.jit, static_argnames="limits")
def fit_seen(
    genes: SeenSums,
    null: tuple[Float[Array, "permutations genes nodes"], Float[Array, "permutations genes nodes"]],
    unit: Float[Array, " genes"],
    nodes: Nodes,
    limits: Limits,
) -> Fit:
    """`fit_zero_inflated` from sums at nodes.

    genes: with a row per gene, over `unit`.
    null: totals and numbers of seen cells at the nodes, of permuted cells.
    unit: root mean square of what was seen.
    """
    n, n_genes = nodes.cells.sum(), len(unit)
    varies = (genes.weights.sum(axis=1) > 1) & (jnp.ptp(genes.values * genes.weights, axis=1) > 0)
    genes = jax.tree.map(lambda x: jnp.where(varies[:, None], x, 1.0), genes)  # a gene that can be fitted
    total, seen = (jnp.concatenate([x[None], y]) for x, y in zip(genes[:2], null, strict=True))
    fixed = jax.lax.stop_gradient(genes)

    def find(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        return find_dropout(SeenSums(row[0], row[1], fixed.values[row[2]], fixed.weights[row[2]]), nodes, limits)

    number = jnp.tile(jnp.arange(n_genes), len(total))
    rows = (total.reshape(len(number), -1), seen.reshape(len(number), -1), number)
    found, losses = mapped_in_blocks(find, jax.lax.stop_gradient(rows), GENES_PER_BLOCK)
    gain = losses[:, 1] - losses[:, 0]

    def polish(theta: Array, gene: SeenSums) -> tuple[Array, Array, Array]:
        theta, loss = dropout_of(theta, gene, nodes, limits)
        return theta[0], dropout_peak(theta[0], gene, nodes), loss

    theta, peak, loss = _mapped(polish, found[:n_genes], genes)
    shift = genes.weights.sum(axis=1) * jnp.log(unit)
    return Fit(
        jnp.where(varies[:, None], theta[:, :2], jnp.asarray([0.0, 0.5], unit.dtype)),
        jnp.where(varies, peak * unit, 0.0),
        jnp.where(varies, jnp.exp(theta[:, 2]) * unit**2, 0.0),
        jnp.where(varies, -n * loss[:, 0] - shift, 0.0),
        jnp.where(varies, -n * loss[:, 1] - shift, 0.0),
        jnp.where(varies, (2 * n * gain).reshape(len(total), -1)[1:], 0.0),
    )


def _mapped(function: Any, theta: Any, genes: Any) -> Any:
    return mapped_in_blocks(lambda row: function(*row), (jax.lax.stop_gradient(theta), genes), GENES_PER_BLOCK)
