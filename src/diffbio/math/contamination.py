"""Counts of two sources: native molecules, NB(mu, theta), and ambient ones, Poisson(lam)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .distributions import nb_log_prob

# beyond e^40 the native source is gone to every digit, and the squares below would overflow float32
LARGEST_LOG_RATIO = 40.0


def contaminated_log_prob(
    x: Float[Array, "*#shape"],
    log_mu: Float[Array, "*#shape"],
    log_theta: Float[Array, "*#shape"],
    log_lam: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """Log-probability of x = NB(mu, theta) + Poisson(lam), by the NB of the same mean and variance.

    The sum (a Delaporte distribution) has mean mu + lam and variance mu + lam + mu² / theta, so its
    dispersion is theta (1 + lam / mu)². Exact for lam -> 0, mu -> 0 and theta -> infinity.
    """
    ratio = jnp.minimum(log_lam - log_mu, LARGEST_LOG_RATIO / 2)
    return nb_log_prob(x, jnp.logaddexp(log_mu, log_lam), log_theta + 2.0 * jax.nn.softplus(ratio))


def native_share(
    x: Float[Array, "*#shape"],
    log_mu: Float[Array, "*#shape"],
    log_theta: Float[Array, "*#shape"],
    log_lam: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """The share of the x molecules that is native, at the posterior mode of the native rate's log.

    The NB is a Poisson whose rate g is Gamma(theta, mean mu). Given x, log g has the mode with
    theta / g - theta / mu - 1 + x / (g + lam) = 0, and each molecule is native with chance y = g / (g + lam):

        (x / theta) y² + (1 + lam / mu + lam / theta - x / theta) y - 1 = 0

    A count far above mu + lam raises g, so that the excess stays native: as x grows, the ambient part ends
    at lam (1 + theta / mu) molecules. lam -> 0 gives 1; theta -> infinity gives mu / (mu + lam).
    """
    per_theta = jnp.exp(-log_theta)
    extra = x * per_theta
    ratio = jnp.exp(jnp.minimum(log_lam - log_mu, LARGEST_LOG_RATIO))
    half = 1.0 + ratio + jnp.exp(log_lam) * per_theta - extra
    root = jnp.sqrt(half**2 + 4.0 * extra)  # > 0: extra = 0 leaves half >= 1
    # the root of the quadratic without a difference of near-equal terms, on either side of half = 0
    below = (root - half) / jnp.where(half > 0, 1.0, 2.0 * extra)
    return jnp.where(half > 0, 2.0 / (jnp.abs(half) + root), below)


def soft_round(x: Float[Array, "*shape"], *, temperature: float) -> Float[Array, "*shape"]:
    """Rounds to whole numbers as temperature -> 0+, is the identity for a large one, and always has a slope.

    floor(x) + tanh(r / T) / (2 tanh(1 / 2T)) + 1/2 with r = x - floor(x) - 1/2 (Agustsson & Theis 2020);
    whole numbers stay, and the slope is continuous. temperature: in units of x.
    """
    below = jnp.floor(x)
    sharpness = 1.0 / temperature
    r = x - below - 0.5
    return below + 0.5 * jnp.tanh(sharpness * r) / jnp.tanh(0.5 * sharpness) + 0.5


def contamination_posterior(
    x: Float[Array, "cells genes"],
    fraction: Float[Array, "cells genes"],
    theta: Float[Array, "*#genes"],
    profile: Float[Array, " genes"],
    *,
    prior_mean: float,
    prior_sd: float,
    n_steps: int = 3,
) -> tuple[Float[Array, " cells"], Float[Array, " cells"]]:
    """Mean and variance of the logit of every cell's ambient fraction rho, given its native gene fractions.

    Fisher scoring of the Gaussian prior and the quasi-likelihood of x (Wedderburn 1974), of which only mean
    and variance count: N (1 - rho) fraction + N rho profile, and the variance of NB + Poisson; then Laplace's
    approximation. Genes that the cell does not express tell rho; genes of large native variance say little.
    n_steps: from the prior's mean; two are enough unless the fractions are far from the data.
    """
    library = jnp.maximum(x.sum(-1, keepdims=True), 1.0)
    logit = jnp.full_like(library, prior_mean)
    for step in range(n_steps + 1):
        rho = jax.nn.sigmoid(logit)
        native, ambient = library * (1.0 - rho) * fraction, library * rho * profile
        slope = library * rho * (1.0 - rho) * (profile - fraction)
        # a gene that is in neither source has no variance, and no slope
        weight = slope / (native + ambient + native**2 / theta + 1e-8)
        information = (weight * slope).sum(-1, keepdims=True) + prior_sd**-2
        if step < n_steps:
            score = (weight * (x - native - ambient)).sum(-1, keepdims=True)
            move = (score - (logit - prior_mean) * prior_sd**-2) / information
            logit = logit + 2.0 * jnp.tanh(0.5 * move)  # at most 2: fractions of an untrained model overshoot
    return logit[:, 0], 1.0 / information[:, 0]
