"""`math.switch` with dropout: a value x is lost, and 0 is seen, with probability exp(-lambda x^2).

Campbell & Yau 2016, after ZIFA (Pierson & Yau 2015, Genome Biology 16:241). Their EM climbs the likelihood of what is
seen, in which the lost values are integrated out; that is a closed form, so it is maximised here itself. With
x ~ N(mu, sigma^2), P(0) = (1 + 2 lambda sigma^2)^(-1/2) exp(-lambda mu^2 / (1 + 2 lambda sigma^2)).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .batched_newton import with_implicit_gradient
from .switch import Limits, Nodes, box, search, sigmoid_basis, starts

LOG_VARIANCE = (-9.0, 6.0)  # ends of log sigma^2, in units of the mean square of what is seen
LOG_DROPOUT = (-7.0, 12.0)  # of log lambda, in the inverse of these
FIRST_NOISE = (-1.0, 0.0)  # where the search for both begins


class SeenSums(NamedTuple):
    """One gene's expression over its root mean square (vmapped over genes)."""

    total: Float[Array, " nodes"]  # sum over the cells of a node
    seen: Float[Array, " nodes"]  # cells of a node that are not 0
    values: Float[Array, " values"]  # above 0
    weights: Float[Array, " values"]  # how many cells have them


def dropout_loss(theta: Float[Array, " p"], data: tuple[SeenSums, Nodes]) -> Float[Array, ""]:
    """Minus the log-likelihood per cell at the best mu0; theta = (k / 10, t0, log sigma^2, log lambda)."""
    gene, nodes = data
    peak, precision, decay = _peak(theta, gene, nodes)
    del decay
    rate, variance = jnp.exp(theta[3]), jnp.exp(theta[2])
    n, seen = nodes.cells.sum(), gene.weights.sum()
    f = sigmoid_basis(theta, nodes.times)
    fit = (gene.weights * gene.values**2).sum() - peak * (gene.total * f).sum()
    kept = (gene.weights * jnp.log(-jnp.expm1(-rate * gene.values**2))).sum()
    log_likelihood = (
        0.5 * seen * (jnp.log(precision) - jnp.log(2 * jnp.pi)) - 0.5 * precision * fit + kept
        - 0.5 * (n - seen) * jnp.log1p(2 * rate * variance)
    )  # fmt: skip
    return -log_likelihood / n


def dropout_peak(theta: Float[Array, " p"], gene: SeenSums, nodes: Nodes) -> Float[Array, ""]:
    """The best factor of `sigmoid_basis`, 2 mu0 exp(log_largest)."""
    return _peak(theta, gene, nodes)[0]


def _peak(theta: Array, gene: SeenSums, nodes: Nodes) -> tuple[Array, Array, Array]:
    """The factor, 1 / sigma^2, and what a lost cell weighs."""
    f = sigmoid_basis(theta, nodes.times)
    precision, rate = jnp.exp(-theta[2]), jnp.exp(theta[3])
    decay = 2 * rate / (1 + 2 * rate / precision)
    weight = precision * (gene.seen * f**2).sum() + decay * ((nodes.cells - gene.seen) * f**2).sum()
    return precision * (gene.total * f).sum() / weight, precision, decay


def find_dropout(gene: SeenSums, nodes: Nodes, limits: Limits) -> tuple[Float[Array, "2 p"], Float[Array, " 2"]]:
    """Maximum likelihood of the switch and of the constant, and both losses; no gradient."""
    dtype = nodes.times.dtype
    grid = jnp.asarray(starts(limits), dtype)
    flat = jnp.broadcast_to(jnp.asarray([0.0, 0.5], dtype), grid[:1].shape)
    points = jnp.concatenate([grid, flat])
    noise = jnp.broadcast_to(jnp.asarray(FIRST_NOISE, dtype), points.shape)
    lower, upper = dropout_boxes(limits, dtype)
    found, loss = search(
        dropout_loss, jnp.concatenate([points, noise], axis=2), (gene, nodes),
        lower=lower[jnp.array([0, 0, 1])], upper=upper[jnp.array([0, 0, 1])],
    )  # fmt: skip
    best = jnp.stack([jnp.argmin(loss[:2]), jnp.asarray(2)])
    return found[best], loss[best]


def dropout_boxes(limits: Limits, dtype: Any) -> tuple[Float[Array, "2 p"], Float[Array, "2 p"]]:
    """Lower and upper ends of the four parameters, of the switch and of the constant, whose k is 0."""
    low, high = box(limits, dtype)
    rest, flat = jnp.asarray([LOG_VARIANCE, LOG_DROPOUT], dtype), jnp.asarray([0.0, 0.5], dtype)
    ends = [jnp.stack([jnp.concatenate([x, rest[:, i]]) for x in (end, flat)]) for i, end in enumerate((low, high))]
    return ends[0], ends[1]


def dropout_of(
    theta: Float[Array, "2 p"], gene: SeenSums, nodes: Nodes, limits: Limits
) -> tuple[Float[Array, "2 p"], Float[Array, " 2"]]:
    """What `find_dropout` found, with the gradient of the implicit function, and the losses there."""

    def of_one(theta: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
        at = with_implicit_gradient(dropout_loss, theta, (gene, nodes), lower=lower, upper=upper)
        return at, dropout_loss(at, (gene, nodes))

    return jax.vmap(of_one)(theta, *dropout_boxes(limits, nodes.times.dtype))
