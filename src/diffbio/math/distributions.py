"""Log-likelihoods of counts (Poisson, negative binomial, zero-inflated) and the Gaussian KL divergence.

All are elementwise and broadcast. Counts may be non-integer (decontaminated counts): the factorial is the
gamma function. In place of differences of `gammaln`, which lose all digits for a large dispersion and cost
most of a training step, they use `log_rising`. Derivatives are written out: each shares the logarithms of
the value, so that value and gradient cost about as much as two values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

# Stirling's series: log Gamma(z) = (z - 1/2) log z - z + log(2 pi) / 2 + sum_k STIRLING[k] z^-(2k+1)
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)

LARGEST_EXPONENT = 80.0  # e^80 and its square root's digits are safe in float32


@jax.custom_jvp
def log_rising(x: Float[Array, "*#shape"], theta: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Log of Gamma(x + theta) / (Gamma(theta) theta^x), which is sum_{i < x} log(1 + i / theta) for whole x.

    >>> float(log_rising(jnp.asarray(2.0), jnp.asarray(0.5)))  # log(1 + 1 / 0.5)
    1.0986...

    Exactly 0 at x = 0, and 0 in the limit of large theta. Both gammas are shifted up by their recurrence
    until Stirling's series is exact to the last digit of the dtype, and the difference is taken term by
    term, so that nothing cancels as theta grows.
    x: >= 0. theta: > 0, any broadcastable shape; what depends on theta alone is computed on its own shape.
    """
    shift, terms = _precision(x)
    top = theta + shift
    ratio = 1.0 + x * (1.0 / theta)
    for i in range(1, shift):
        ratio = ratio * (1.0 + x * (1.0 / (theta + i)))
    series = _stirling(x + top, terms) - _stirling(top, terms) - jnp.log(ratio)
    return x * (jnp.log1p(shift / theta) - 1.0) + (x + top - 0.5) * jnp.log1p(x * (1.0 / top)) + series


def _log_rising_jvp(primals: Any, tangents: Any) -> Any:
    x, theta = primals
    slopes = (lambda: _rising_by_x(x, theta), lambda: _rising_by_theta(x, theta))
    return log_rising(x, theta), _tangent(slopes, tangents, like=x + theta)


log_rising.defjvp(_log_rising_jvp, symbolic_zeros=True)


def log_factorial(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Log x!, for real x >= 0."""
    return log_rising(x, jnp.ones((), x.dtype))


def poisson_log_prob(x: Float[Array, "*#shape"], log_rate: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Log Poisson(x | exp(log_rate))."""
    return x * log_rate - jnp.exp(log_rate) - log_factorial(x)


@jax.custom_jvp
def nb_log_prob(
    x: Float[Array, "*#shape"], log_mu: Float[Array, "*#shape"], log_theta: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Log NB(x | mean mu, variance mu + mu² / theta); the Poisson distribution as theta grows.

    log_theta: log of the inverse dispersion, up to about 40; per gene is cheapest.
    """
    return _unfused(_nb(x, log_mu, log_theta))


def _nb_jvp(primals: Any, tangents: Any) -> Any:
    x, log_mu, log_theta = primals
    slopes = (
        lambda: _nb_by_x(x, log_mu, log_theta),
        lambda: x - (x + jnp.exp(log_theta)) * _share(log_mu - log_theta),
        lambda: _nb_by_log_theta(x, log_mu, log_theta, jnp.ones((), x.dtype)),
    )
    value = _nb(x, log_mu, log_theta)
    return _unfused(value), _tangent(slopes, tangents, like=value)


nb_log_prob.defjvp(_nb_jvp, symbolic_zeros=True)


@jax.custom_jvp
def zinb_log_prob(
    x: Float[Array, "*#shape"],
    log_mu: Float[Array, "*#shape"],
    log_theta: Float[Array, "*#shape"],
    pi_logit: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """Log of pi [x = 0] + (1 - pi) NB(x | mu, theta), with pi = sigmoid(pi_logit).

    Not continuous in x at 0, where the slope by x is 0.
    """
    return _unfused(_zinb(x, log_mu, log_theta, pi_logit))


def _zinb_jvp(primals: Any, tangents: Any) -> Any:
    x, log_mu, log_theta, pi_logit = primals
    # how far the value is that of the NB: at x = 0 by the posterior, the sigmoid of the log odds
    log_odds = -jnp.exp(log_theta) * _log1p_exp(log_mu - log_theta) - pi_logit
    weight = jnp.where(x > 0, 1.0, _share(log_odds)).astype(log_odds.dtype)
    slopes = (
        lambda: jnp.where(x > 0, _nb_by_x(x, log_mu, log_theta), 0.0),
        lambda: x - (x + weight * jnp.exp(log_theta)) * _share(log_mu - log_theta),
        lambda: _nb_by_log_theta(x, log_mu, log_theta, weight),
        lambda: (1.0 - weight) - _share(pi_logit),
    )
    value = _zinb(x, log_mu, log_theta, pi_logit)
    return _unfused(value), _tangent(slopes, tangents, like=value)


zinb_log_prob.defjvp(_zinb_jvp, symbolic_zeros=True)


@jax.custom_jvp
def nb_log_prob_of_zero(log_mu: Float[Array, "*#shape"], log_theta: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Log NB(0 | mu, theta), far cheaper than `nb_log_prob`: most entries of a count matrix are 0."""
    return _unfused(-jnp.exp(log_theta) * _log1p_exp(log_mu - log_theta))


def _nb_zero_jvp(primals: Any, tangents: Any) -> Any:
    log_mu, log_theta = primals
    theta = jnp.exp(log_theta)
    excess, share = _log1p_exp(log_mu - log_theta), _share(log_mu - log_theta)
    slopes = (lambda: -theta * share, lambda: theta * (share - excess))
    return _unfused(-theta * excess), _tangent(slopes, tangents, like=excess)


nb_log_prob_of_zero.defjvp(_nb_zero_jvp, symbolic_zeros=True)


@jax.custom_jvp
def zinb_log_prob_of_zero(
    log_mu: Float[Array, "*#shape"], log_theta: Float[Array, "*#shape"], pi_logit: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Log of pi + (1 - pi) NB(0 | mu, theta), with pi = sigmoid(pi_logit); a logit below -80 counts as -80."""
    return _zinb_zero(log_mu, log_theta, pi_logit)[0]


def _zinb_zero_jvp(primals: Any, tangents: Any) -> Any:
    log_mu, log_theta, pi_logit = primals
    value, (theta, odds, excess, nb_zero, extra_odds) = _zinb_zero(log_mu, log_theta, pi_logit)
    weight = nb_zero / (extra_odds + nb_zero)  # posterior probability that the NB gave this zero
    share = odds / (1.0 + odds)
    slopes = (
        lambda: -weight * theta * share,
        lambda: weight * theta * (share - excess),
        lambda: (1.0 - weight) - extra_odds / (1.0 + extra_odds),
    )
    return value, _tangent(slopes, tangents, like=value)


zinb_log_prob_of_zero.defjvp(_zinb_zero_jvp, symbolic_zeros=True)


def _zinb_zero(
    log_mu: jax.Array, log_theta: jax.Array, pi_logit: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The value, by three exponentials and two logarithms, and what the slopes can take over from it.

    Each in its own pass: XLA does not vectorise a long chain of them.
    """
    theta = jnp.exp(log_theta)
    odds = _unfused(_capped_exp(log_mu - log_theta))
    excess = _unfused(_log1p(odds))
    nb_zero = _unfused(jnp.exp(-theta * excess))
    extra_odds = _unfused(_capped_exp(pi_logit))
    value = _unfused(jnp.log((extra_odds + nb_zero) / (1.0 + extra_odds)))
    return value, (theta, odds, excess, nb_zero, extra_odds)


def gaussian_kl(
    mean: Float[Array, "*cells latent"], logvar: Float[Array, "*cells latent"]
) -> Float[Array, "*cells"]:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over the latent axis, in nats."""
    return 0.5 * (jnp.exp(logvar) + mean**2 - 1.0 - logvar).sum(-1)


def _nb(x: jax.Array, log_mu: jax.Array, log_theta: jax.Array) -> jax.Array:
    # log NB(0) = -theta log(1 + mu / theta); mu / (1 + mu / theta) holds all digits in the Poisson limit
    excess = _log1p_exp(log_mu - log_theta)
    theta = jnp.exp(log_theta)
    return x * (log_mu - excess) - theta * excess + (log_rising(x, theta) - log_factorial(x))


def _nb_by_x(x: jax.Array, log_mu: jax.Array, log_theta: jax.Array) -> jax.Array:
    digammas = _rising_by_x(x, jnp.exp(log_theta)) - _rising_by_x(x, jnp.ones((), x.dtype))
    return log_mu - _log1p_exp(log_mu - log_theta) + digammas


def _nb_by_log_theta(x: jax.Array, log_mu: jax.Array, log_theta: jax.Array, weight: jax.Array) -> jax.Array:
    """weight: of theta's own terms, of which at x = 0 (where the others vanish) a ZINB takes a part."""
    theta, share = jnp.exp(log_theta), _share(log_mu - log_theta)
    own = share - _log1p_exp(log_mu - log_theta)
    return theta * (weight * own + _rising_by_theta(x, theta)) + x * share


def _zinb(x: jax.Array, log_mu: jax.Array, log_theta: jax.Array, pi_logit: jax.Array) -> jax.Array:
    zero = -jnp.exp(log_theta) * _log1p_exp(log_mu - log_theta)
    value = jnp.where(x > 0, _nb(x, log_mu, log_theta), pi_logit + _log1p_exp(zero - pi_logit))
    return value - _log1p_exp(pi_logit)


def _log1p_exp(x: jax.Array) -> jax.Array:
    # jax.nn.softplus takes four times as long, by what it does for infinities
    capped = jnp.minimum(x, LARGEST_EXPONENT)
    return _log1p(jnp.exp(capped)) + (x - capped)


def _capped_exp(x: jax.Array) -> jax.Array:
    """Neither infinite nor 0."""
    return jnp.exp(jnp.clip(x, -LARGEST_EXPONENT, LARGEST_EXPONENT))


def _log1p(x: jax.Array) -> jax.Array:
    """Log(1 + x) for x >= 0 to the last digits: what 1 + x rounds off is scaled back (Kahan); half of log1p's time."""
    rounded = 1.0 + x
    kept = rounded - 1.0
    return jnp.where(kept > 0, jnp.log(rounded) * (x / jnp.where(kept > 0, kept, 1.0)), x)


def _share(log_odds: jax.Array) -> jax.Array:
    """The sigmoid, by the exponential that `_log1p_exp` computes."""
    odds = jnp.exp(jnp.minimum(log_odds, LARGEST_EXPONENT))
    return odds / (1.0 + odds)


def _unfused(x: jax.Array) -> jax.Array:
    """Keeps XLA from fusing a long formula into a sum that follows, which would make it scalar on a CPU."""
    return jax.lax.optimization_barrier(x)


def _tangent(slopes: Any, tangents: Any, *, like: jax.Array) -> jax.Array:
    """Sum of slope * tangent over the arguments that vary (counts, being data, do not)."""
    parts = [
        _unfused(slope()) * tangent
        for slope, tangent in zip(slopes, tangents, strict=True)
        if not isinstance(tangent, SymbolicZero)
    ]
    return sum(parts, jnp.zeros_like(like))


def _rising_by_theta(x: jax.Array, theta: jax.Array) -> jax.Array:
    """digamma(x + theta) - digamma(theta) - x / theta."""
    shift, terms = _precision(x)
    top = theta + shift
    rise = jnp.log1p(x * (1.0 / top)) + _stirling_slope(x + top, terms) - _stirling_slope(top, terms)
    poles = sum(1.0 / (theta + i) for i in range(shift)) - sum(1.0 / (x + theta + i) for i in range(shift))
    return rise + poles - x * (1.0 / theta)


def _rising_by_x(x: jax.Array, theta: jax.Array) -> jax.Array:
    """digamma(x + theta) - log(theta)."""
    shift, terms = _precision(x)
    top = theta + shift
    log_top = jnp.log1p(x * (1.0 / top)) + jnp.log1p(shift / theta)
    return log_top + _stirling_slope(x + top, terms) - sum(1.0 / (x + theta + i) for i in range(shift))


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
