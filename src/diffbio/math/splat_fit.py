"""How far simulated counts are from real ones: statistics of cells and genes, differentiable in the simulated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .splat import zero_probability

TOP_GENES = 200  # whose covariance is compared


class Moments(NamedTuple):
    """Mean, variance and probability of zero of the counts, given what is drawn for genes and cells."""

    mean: Float[Array, "cells genes"]
    variance: Float[Array, "cells genes"]
    zero: Float[Array, "cells genes"]


def entry_moments(
    own: Float[Array, "cells genes"],
    soup: Float[Array, "cells genes"],
    shape: Float[Array, "cells genes"],
    lost: Float[Array, "cells genes"] | float = 0.0,
) -> Moments:
    """Of Poisson(own * Gamma(shape) / shape + soup), which is 0 with probability `lost`; exact but for the last."""
    mean = own + soup
    variance = mean + own**2 / shape
    zero = zero_probability(own, shape) * jnp.exp(-soup)
    kept = 1 - lost
    return Moments(kept * mean, kept * (variance + mean**2) - (kept * mean) ** 2, lost + kept * zero)


def statistics_distance(
    simulated: Moments, counts: Float[Array, "cells genes"], normals: Float[Array, " cells"], *, genes_match: bool
) -> dict[str, Float[Array, ""]]:
    """Distances of mean, variance, zeros, library sizes and correlations, each about 1 where nothing fits.

    If `genes_match`, simulated gene j stands for real gene j, and gene statistics are compared by losses whose
    expectation is least at the true value (gamma deviance, cross-entropy, squares), so that minibatches do not bend
    them. Else the sorted statistics are: the genes as a distribution. Cells are always compared as a distribution,
    by the sorted values (1-Wasserstein's coupling, squared).

    Args:
        simulated: as many cells as there are real ones.
        counts: the real ones.
        normals: one for each cell, standard: the counting noise of library sizes.
        genes_match: see above.
    """
    n, g = counts.shape
    least = 1.0 / n
    real_mean, real_variance, real_zero = counts.mean(0), counts.var(0), (counts == 0).mean(0)
    mean, zero = simulated.mean.mean(0), simulated.zero.mean(0)
    variance = simulated.variance.mean(0) + ((simulated.mean - mean) ** 2).mean(0)
    if genes_match:
        terms = {
            "mean": _deviance(real_mean + least, mean + least).mean(),
            "variance": _deviance(real_variance + least, variance + least).mean(),
            "zeros": _cross_entropy(real_zero, zero).mean(),
        }
    else:
        order, real_order = jnp.argsort(mean), jnp.argsort(real_mean)
        excess, real_excess = (variance + least) / (mean + least), (real_variance + least) / (real_mean + least)
        terms = {
            "mean": _squared(jnp.log(mean[order] + least), jnp.log(real_mean[real_order] + least)),
            "variance": _squared(
                _smoothed(jnp.log(excess[order])), _smoothed(jnp.log(real_excess[real_order]))
            ) + _squared(jnp.log(jnp.sort(variance) + least), jnp.log(jnp.sort(real_variance) + least)),
            "zeros": _squared(jnp.sort(zero), jnp.sort(real_zero)),
        }  # fmt: skip
    total = simulated.mean.sum(1)
    spread = jnp.sqrt(jnp.maximum(simulated.variance.sum(1), 1e-12))
    totals = jnp.maximum(total + spread * normals, 0.0)
    terms["library"] = _squared(jnp.sort(jnp.log1p(totals)), jnp.sort(jnp.log1p(counts.sum(1))))
    terms["cell_zeros"] = _squared(jnp.sort(simulated.zero.mean(1)), jnp.sort((counts == 0).mean(1)))
    if genes_match and g > 1:
        top = jnp.argsort(-real_mean)[: min(g, TOP_GENES)]
        # in units of the Poisson deviation: 1 is as strong as counting noise
        scale = jnp.sqrt(jnp.maximum(real_mean[top], 1e-9)) / jnp.maximum(counts.sum(1).mean(), 1.0)
        real_cov = _covariance(counts[:, top] / scale, counts.sum(1))
        cov = _covariance(simulated.mean[:, top] / scale, total)
        off = 1 - jnp.eye(len(top), dtype=counts.dtype)
        terms["correlation"] = ((cov - real_cov) ** 2 * off).sum() / off.sum()
    return terms


def _squared(simulated: Array, real: Array) -> Array:
    """Mean squared difference in units of the variance of the real values."""
    return ((simulated - real) ** 2).mean() / (real.var() + 1e-4)  # all cells may be equal


def _deviance(real: Array, simulated: Array) -> Array:
    """Of gamma laws: linear in `real`, least at equality, where it is 0."""
    ratio = real / simulated
    return ratio - jnp.log(ratio) - 1


def _cross_entropy(real: Array, simulated: Array) -> Array:
    p = jnp.clip(simulated, 1e-6, 1 - 1e-6)
    entropy = -jax.scipy.special.xlogy(real, real) - jax.scipy.special.xlogy(1 - real, 1 - real)
    return -(real * jnp.log(p) + (1 - real) * jnp.log1p(-p)) - entropy


def _smoothed(values: Array) -> Array:
    """Means of at most 50 neighbouring genes, which are sorted by mean."""
    width = max(len(values) // 50, 1)
    used = len(values) // width * width
    return values[:used].reshape(-1, width).mean(axis=1)


def _covariance(values: Array, library: Array) -> Array:
    """Between genes, of shares of the library."""
    share = values / jnp.maximum(library, 1.0)[:, None]
    centred = share - share.mean(0)
    return centred.T @ centred / len(values)
