"""Log-likelihoods of counts (Poisson, negative binomial, zero-inflated) and the Gaussian KL divergence.

All are elementwise and broadcast. Counts may be non-integer (decontaminated counts): the factorial is the
gamma function. In place of differences of `gammaln`, which lose all digits for a large dispersion and cost
most of a training step, they use `log_rising`.
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

# Stirling's series: log Gamma(z) = (z - 1/2) log z - z + log(2 pi) / 2 + sum_k STIRLING[k] z^-(2k+1)
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)


@jax.custom_jvp
def log_rising(x: Float[Array, "*#shape"], theta: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Log of Gamma(x + theta) / (Gamma(theta) theta^x), which is sum_{i < x} log(1 + i / theta) for whole x.

    Exactly 0 at x = 0, and 0 in the limit of large theta. Both gammas are shifted up by their recurrence
    until Stirling's series is exact to the last digit of the dtype, and the difference is taken term by
    term, so that nothing cancels as theta grows.
    x: >= 0. theta: > 0, any broadcastable shape; what depends on theta alone is computed on its own shape.
    """
    shift, terms = _precision(x)
    top = theta + shift
    ratio = 1.0 + x / theta
    for i in range(1, shift):
        ratio = ratio * (1.0 + x * (1.0 / (theta + i)))
    series = _stirling(x + top, terms) - _stirling(top, terms) - jnp.log(ratio)
    return x * (jnp.log1p(shift / theta) - 1.0) + (x + top - 0.5) * jnp.log1p(x / top) + series


def _log_rising_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    x, theta = primals
    dx, dtheta = tangents
    shift, terms = _precision(x)
    top = theta + shift
    # digamma(x + theta) - digamma(theta), by the same shift
    rise = jnp.log1p(x / top) + _stirling_slope(x + top, terms) - _stirling_slope(top, terms)
    poles = sum(1.0 / (theta + i) for i in range(shift))
    rise = rise + poles - sum(1.0 / (x + theta + i) for i in range(shift))
    out = jnp.zeros_like(rise)
    if not isinstance(dtheta, SymbolicZero):
        out = out + (rise - x / theta) * dtheta
    if not isinstance(dx, SymbolicZero):  # counts are data in training: nothing to compute for them
        out = out + (rise + jnp.log1p(shift / theta) + _stirling_slope(top, terms) - poles) * dx
    return log_rising(x, theta), out


log_rising.defjvp(_log_rising_jvp, symbolic_zeros=True)


def log_factorial(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Log x!, for real x >= 0."""
    return log_rising(x, jnp.ones((), x.dtype))


def poisson_log_prob(x: Float[Array, "*#shape"], log_rate: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Log Poisson(x | exp(log_rate))."""
    return x * log_rate - jnp.exp(log_rate) - log_factorial(x)


def nb_log_prob(
    x: Float[Array, "*#shape"], log_mu: Float[Array, "*#shape"], log_theta: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Log NB(x | mean mu, variance mu + mu² / theta); the Poisson distribution as theta grows.

    log_theta: log of the inverse dispersion, up to about 40; per gene is cheapest.
    """
    return _nb_nonzero(x, log_mu, log_theta) + _nb_zero(log_mu, log_theta)


def zinb_log_prob(
    x: Float[Array, "*#shape"],
    log_mu: Float[Array, "*#shape"],
    log_theta: Float[Array, "*#shape"],
    pi_logit: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """Log of pi [x = 0] + (1 - pi) NB(x | mu, theta), with pi = sigmoid(pi_logit)."""
    zero = _nb_zero(log_mu, log_theta)
    nonzero = zero + _nb_nonzero(x, log_mu, log_theta)
    return jnp.where(x > 0, nonzero, jnp.logaddexp(pi_logit, zero)) - jax.nn.softplus(pi_logit)


def gaussian_kl(
    mean: Float[Array, "*cells latent"], logvar: Float[Array, "*cells latent"]
) -> Float[Array, "*cells"]:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over the latent axis, in nats."""
    return 0.5 * (jnp.exp(logvar) + mean**2 - 1.0 - logvar).sum(-1)


def _nb_zero(log_mu: jax.Array, log_theta: jax.Array) -> jax.Array:
    # log NB(0) = -theta log(1 + mu / theta)
    return -jnp.exp(log_theta) * jax.nn.softplus(log_mu - log_theta)


def _nb_nonzero(x: jax.Array, log_mu: jax.Array, log_theta: jax.Array) -> jax.Array:
    # log NB(x) - log NB(0), which is 0 at x = 0; mu / (1 + mu / theta) holds all digits in the Poisson limit
    log_odds = log_mu - jax.nn.softplus(log_mu - log_theta)
    return x * log_odds + log_rising(x, jnp.exp(log_theta)) - log_factorial(x)


def _precision(x: jax.Array) -> tuple[int, int]:
    """(shift, terms of the series) that reach the last digit of x's dtype."""
    return (8, 8) if x.dtype == jnp.float64 else (4, 4)


def _stirling(z: jax.Array, terms: int) -> jax.Array:
    inverse = 1.0 / z
    square = inverse * inverse
    total = jnp.full_like(square, STIRLING[terms - 1])
    for c in STIRLING[terms - 2 :: -1]:
        total = total * square + c
    return inverse * total


def _stirling_slope(z: jax.Array, terms: int) -> jax.Array:
    """Derivative of (z - 1/2) log z - z + series, less log z."""
    inverse = 1.0 / z
    square = inverse * inverse
    total = jnp.zeros_like(square)
    for k in reversed(range(terms)):
        total = total * square - (2 * k + 1) * STIRLING[k]
    return -0.5 * inverse + square * total
