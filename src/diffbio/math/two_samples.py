"""Distances between the distributions of one number in two weighted samples: Wasserstein-2 and MMD².

Values come sorted, so that one coupling serves every gene: it depends on the weights in rank order only, and a
permutation of the cells is a permutation of ranks, the same for all genes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FREQUENCIES = 40  # of the kernel's Fourier series: exact to 1e-6 for values over 27 standard deviations
LEAST = 1e-12
MOST = 80.0  # exponents of a p-value; beyond, float32 has none


class Coupling(NamedTuple):
    """The optimal plan on a line: `mass` goes from rank `source` of the first sample to `target` of the second."""

    source: Int[Array, " pairs"]
    target: Int[Array, " pairs"]
    mass: Float[Array, " pairs"]


class Parts(NamedTuple):
    """W2² and what it is made of (Schefzik et al. 2021, waddR); the parts sum to the whole."""

    total: Float[Array, " genes"]
    location: Float[Array, " genes"]  # (m1 - m2)²
    size: Float[Array, " genes"]  # (s1 - s2)²
    shape: Float[Array, " genes"]  # 2 s1 s2 (1 - correlation of the quantiles)


def monotone_coupling(first: Float[Array, " cells"], second: Float[Array, " cells"]) -> Coupling:
    """Of two weightings of the same ranks, each divided by its sum. Masses have gradients, ranks have none."""
    rising = [jnp.cumsum(w) / jnp.maximum(w.sum(), LEAST) for w in (first, second)]
    levels = jnp.sort(jnp.concatenate(rising))
    before = jnp.concatenate([jnp.zeros(1, levels.dtype), levels[:-1]])
    middle = jax.lax.stop_gradient((levels + before) / 2)
    last = len(first) - 1
    source, target = (jnp.minimum(jnp.searchsorted(jax.lax.stop_gradient(c), middle), last) for c in rising)
    return Coupling(source, target, levels - before)


def coupled_distance(values: Float[Array, "cells genes"], plan: Coupling) -> Float[Array, " genes"]:
    """W2² of every gene; column g of `values` is sorted."""
    return (plan.mass[:, None] * (values[plan.source] - values[plan.target]) ** 2).sum(axis=0)


@jax.jit
def wasserstein(
    values: Float[Array, "cells genes"], first: Float[Array, "cells genes"], second: Float[Array, "cells genes"]
) -> Parts:
    """W2² and its parts; weights go with the sorted values of each gene."""

    def of_gene(values: Array, first: Array, second: Array) -> tuple[Array, ...]:
        plan = monotone_coupling(first, second)
        total = (plan.mass * (values[plan.source] - values[plan.target]) ** 2).sum()
        moments = []
        for weights in (first, second):
            share = weights / jnp.maximum(weights.sum(), LEAST)
            mean = (share * values).sum()
            square = (share * (values - mean) ** 2).sum()
            moments.append((mean, jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)))
        (m1, s1), (m2, s2) = moments
        location, size = (m1 - m2) ** 2, (s1 - s2) ** 2
        return total, location, size, total - location - size

    return Parts(*jax.vmap(of_gene, in_axes=1)(values, first, second))


class Waves(NamedTuple):
    """A gene's values as cosines and sines, of which a Gaussian kernel is the inner product."""

    features: Float[Array, "cells features"]
    itself: Float[Array, ""]  # kernel of a value with itself


def kernel_waves(values: Float[Array, " cells"]) -> Waves:
    """Features of k(x, y) = exp(-(x - y)² / variance), by its Fourier series over a little more than the range.

    Cost O(cells), where the kernel itself is O(cells²).
    """
    variance = values.var()
    width = jnp.where(variance > 0, variance, 1.0)
    period = values.max() - values.min() + 4.0 * jnp.sqrt(width)
    wave = jnp.arange(FREQUENCIES)
    # roots of the series' coefficients; the high ones underflow
    root = jnp.exp(-0.5 * (jnp.pi * wave / period) ** 2 * width) * jnp.where(wave > 0, 2.0, 1.0) ** 0.5
    root = root * jnp.sqrt(jnp.sqrt(jnp.pi * width) / period)
    angles = 2 * jnp.pi * (values - values.mean())[:, None] * wave / period
    return Waves(jnp.concatenate([root * jnp.cos(angles), root * jnp.sin(angles)], axis=1), (root**2).sum())


def mmd_of_waves(
    waves: Waves, first: Float[Array, "labellings cells"], second: Float[Array, "labellings cells"]
) -> Float[Array, " labellings"]:
    """Unbiased MMD² (Gretton et al. 2012, eq. 3, for weighted samples) of one gene, for each labelling."""
    shares = [w / jnp.maximum(w.sum(axis=1, keepdims=True), LEAST) for w in (first, second)]
    means = [jnp.matmul(share, waves.features, precision="highest") for share in shares]
    within = []
    for share, mean in zip(shares, means, strict=True):
        alone = (share**2).sum(axis=1)
        within.append(((mean**2).sum(axis=1) - waves.itself * alone) / jnp.maximum(1 - alone, LEAST))
    return within[0] + within[1] - 2 * (means[0] * means[1]).sum(axis=1)


def mmd(
    values: Float[Array, "cells genes"], first: Float[Array, "cells genes"], second: Float[Array, "cells genes"]
) -> Float[Array, " genes"]:
    """Unbiased MMD² of every gene; weights go with its values."""
    return jax.vmap(lambda x, a, b: mmd_of_waves(kernel_waves(x), a[None], b[None])[0], in_axes=1)(
        values, first, second
    )


@jax.jit
def null_wasserstein(
    values: Float[Array, "cells genes"],
    first: Float[Array, " cells"],
    second: Float[Array, " cells"],
    orders: Int[Array, "permutations cells"],
) -> Float[Array, "permutations genes"]:
    """W2² where the weights are dealt out anew, as `orders` say; no gradient."""

    def of_order(order: Array) -> Array:
        return coupled_distance(values, monotone_coupling(first[order], second[order]))

    values, first, second = jax.lax.stop_gradient((values, first, second))
    return jax.lax.map(of_order, orders)


@jax.jit
def null_mmd(
    values: Float[Array, "cells genes"],
    first: Float[Array, " cells"],
    second: Float[Array, " cells"],
    orders: Int[Array, "permutations cells"],
) -> Float[Array, "permutations genes"]:
    """MMD² where the weights are dealt out anew, as `orders` say; no gradient."""
    values, first, second = jax.lax.stop_gradient((values, first, second))
    dealt = first[orders], second[orders]
    return jax.lax.map(lambda x: mmd_of_waves(kernel_waves(x), *dealt), values.T).T


def permutation_share(
    statistics: Float[Array, " genes"],
    null: Float[Array, "permutations genes"],
    *,
    tail: bool,
    least: Float[Array, " genes"] | float = 0.0,
) -> Float[Array, " genes"]:
    """P-values: the share of null statistics at least as large, the observed one counted among them.

    tail: where a statistic is larger than all of the null, the tail of the null is continued by an exponential with the
        mean excess over its largest fortieth (ten at least): a weighted sum of chi-squares, which these statistics are
        in large samples, falls so.
    least: the smallest p-value that there can be: a gene that few cells have takes few values under permutation, and
        no tail goes on beyond them.
    """
    n = len(null)
    slack = 1e-5 * jnp.abs(statistics)  # the same arrangement may be summed in another order
    share = (1 + (null >= statistics - slack).sum(axis=0)) / (n + 1.0)
    count = max(n // 40, 10)
    if not tail or n < 4 * count:
        return share.astype(statistics.dtype)
    top = jax.lax.top_k(null.T, count)[0]
    edge = top[:, -1]
    excess = jnp.maximum((top - edge[:, None]).mean(axis=1), LEAST)
    beyond = count / (n + 1.0) * jnp.exp(-jnp.minimum((statistics - edge) / excess, MOST))
    largest = statistics - slack > top[:, 0]
    return jnp.where(largest, jnp.clip(beyond, jnp.minimum(least, share), share), share)


def least_share(values: Float[Array, "cells genes"]) -> Float[Array, " genes"]:
    """2^(1 - m) of a gene that m cells have above its lowest value: the chance that all of them fall to one side."""
    return 0.5 ** ((values > values.min(axis=0)).sum(axis=0) - 1.0)
