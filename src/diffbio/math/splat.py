"""The Splat model (Zappia 2017) as smooth maps of uniform and normal draws: quantiles, factors, paths, noise.

Zappia, Phipson and Oshlack, Genome Biology 18:174. Draws of continuous laws are quantiles of uniform numbers, so their
derivative with respect to a parameter is the implicit one, -∂F/∂θ / f (Figurnov 2018), exact also for mixtures.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammainc, ndtr
from jaxtyping import Array, Float, Int

TINY = 1e-30  # of a mean: keeps the logarithm of 0 finite
LEAST_SHAPE = 1e-8  # of a gamma distribution: draws are 0 below it


def quantile(
    cdf: Callable[..., Array], theta: tuple[Any, ...], u: Float[Array, "..."], low: float, high: float
) -> Float[Array, "..."]:
    """Solves cdf(y, *theta) = u for y in [low, high] by bisection and one Newton step.

    The Newton step carries the derivative: dy = (du - ∂F/∂θ dθ) / f. `cdf` rises in y.
    """
    held, target = jax.lax.stop_gradient((theta, u))

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bounds
        middle = (lower + upper) / 2
        below = cdf(middle, *held) < target
        return jnp.where(below, middle, lower), jnp.where(below, upper, middle)

    start = (jnp.full_like(target, low), jnp.full_like(target, high))
    y = sum(jax.lax.fori_loop(0, 32, halve, start)) / 2
    density = jax.jvp(lambda y: cdf(y, *held), (y,), (jnp.ones_like(y),))[1]
    # far in a tail, or between two modes, rounding leaves no density: no step there
    width = jnp.where(density > 1e-9, density, jnp.inf)
    return y - jnp.clip((cdf(y, *theta) - u) / width, -1.0, 1.0)


def folded_cdf(y: Array, loc: Array, scale: Array) -> Array:
    """P(|N(loc, scale²)| <= y)."""
    return ndtr((y - loc) / scale) - ndtr((-y - loc) / scale)


@jax.jit
def log_gene_means(
    u: Float[Array, " genes"],
    *,
    shape: Float[Array, ""],
    rate: Float[Array, ""],
    log_median: Float[Array, ""],
    out_prob: Float[Array, ""],
    out_loc: Float[Array, ""],
    out_scale: Float[Array, ""],
) -> Float[Array, " genes"]:
    """Log of gene means: Gamma(shape, rate), of which a share `out_prob` is median * exp(|N(out_loc, out_scale²)|).

    The quantile of the whole mixture at `u`. The median is that of the law, where Splatter takes the one of the genes
    drawn. Where outliers lie far from all others, their share moves the few genes between: its gradient is noisy.

    Args:
        u: uniform.
        shape: of the gamma law.
        rate: of the gamma law.
        log_median: log of the median of Gamma(shape, 1), see `log_gamma_quantiles`.
        out_prob: share of outliers.
        out_loc: mean of the normal.
        out_scale: its standard deviation.
    """

    def cdf(y: Array, shape: Array, share: Array, loc: Array, scale: Array, median: Array) -> Array:
        excess = jnp.maximum(y - median, 0.0)
        return (1 - share) * _gamma_cdf(y, shape) + share * folded_cdf(excess, loc, scale)

    return quantile(cdf, (shape, out_prob, out_loc, out_scale, log_median), u, -60.0, 20.0) - jnp.log(rate)


@jax.jit
def log_gamma_quantiles(u: Float[Array, " genes"], shape: Float[Array, "..."]) -> Float[Array, " genes"]:
    """Log of the quantiles at `u` of Gamma(shape, 1), above exp(-60)."""
    return quantile(_gamma_cdf, (shape,), u, -60.0, 20.0)


def _gamma_cdf(y: Array, shape: Array) -> Array:
    return gammainc(jnp.broadcast_to(shape, y.shape), jnp.exp(y))


@jax.jit
def log_factors(
    u: Float[Array, "*rows genes"],
    *,
    prob: Float[Array, "..."] | float,
    down: Float[Array, "..."] | float,
    loc: Float[Array, "..."],
    scale: Float[Array, "..."],
) -> Float[Array, "*rows genes"]:
    """Log of Splatter's factors (getLNormFactors): 0 with probability 1 - prob, else ±|N(loc, scale²)|.

    Minus with probability `down`. As a quantile at `u`: lowered, unchanged, raised, in this order. That is continuous
    in u, so the derivative in every parameter, `prob` and `down` too, is unbiased; where loc is many scales above 0,
    `prob` and `down` move the few small factors only, and their gradient is noisy.
    """
    lowered, raised = jnp.asarray(prob * down, u.dtype), jnp.asarray(prob * (1 - down), u.dtype)
    is_down, is_up = u < lowered, u > 1 - raised
    v_down = (lowered - u) / jnp.where(lowered > 0, lowered, 1.0)
    v_up = (u - 1 + raised) / jnp.where(raised > 0, raised, 1.0)
    v = jnp.where(is_down, v_down, jnp.where(is_up, v_up, 0.5))
    size = quantile(folded_cdf, (loc, scale), jnp.clip(v, 0.0, 1 - 1e-6), 0.0, 60.0)
    return jnp.where(is_down, -size, jnp.where(is_up, size, 0.0))


def path_position(u: Float[Array, "*rows"], skew: Float[Array, "..."]) -> Float[Array, "*rows"]:
    """Where on its path a cell is, from 0 to 1: a draw of the density that goes from 2 skew to 2 (1 - skew).

    Splatter's steps, in the limit of many; a skew of 0.5 is even, of 0 piles up at the end.
    """
    a = 1 - 2 * skew  # cdf: 2 skew t + a t²
    b = jnp.broadcast_to(skew, u.shape)
    root = jnp.sqrt(jnp.maximum(b**2 + a * u, 1e-12))
    return u / (b + root)


@functools.partial(jax.jit, static_argnames="path_from")
def path_table(
    ends: Float[Array, "paths genes"],
    path_from: tuple[int, ...],
    *,
    sigma: Float[Array, "paths genes"],
    noise: Float[Array, "steps paths genes"],
) -> Float[Array, "paths places genes"]:
    """Log factors along every path: from the end of `path_from` (0 is the origin) to its own, plus Brownian bridges.

    In log factors, where Splatter bridges the factors themselves and cuts at 0.

    Args:
        ends: change of each path, on top of where it starts.
        path_from: for each path 0 or the number of an earlier path, counted from 1.
        sigma: standard deviation of the bridge's motion over the whole path; 0 is a straight line.
        noise: standard normal; the number of steps is its length plus 1.
    """
    n_steps = len(noise) + 1
    t = jnp.linspace(0.0, 1.0, n_steps, dtype=ends.dtype)[:, None]
    walk = jnp.concatenate([jnp.zeros_like(noise[:1]), noise.cumsum(axis=0) / jnp.sqrt(n_steps - 1.0)])
    paths: list[Array] = []
    for k, start in enumerate(path_from):
        origin = jnp.zeros_like(ends[0]) if start == 0 else paths[start - 1][-1]
        bridge = walk[:, k] - t * walk[-1, k]
        paths.append(origin + t * ends[k] + sigma[k] * bridge)
    return jnp.stack(paths)


def along(table: Float[Array, "steps genes"], position: Float[Array, " cells"]) -> Float[Array, "cells genes"]:
    """Rows of `table` at positions from 0 to 1, interpolated."""
    place = jnp.clip(position, 0.0, 1.0) * (table.shape[0] - 1)
    step = jnp.clip(jax.lax.stop_gradient(place).astype(int), 0, table.shape[0] - 2)
    part = (place - step)[:, None]
    return (1 - part) * table[step] + part * table[step + 1]


def choice(
    gumbel: Float[Array, "cells options"], logits: Float[Array, " options"], temperature: float
) -> tuple[Int[Array, " cells"], Float[Array, "cells options"]]:
    """Options drawn with probabilities softmax(logits), and Gumbel-softmax weights (Jang 2017, Maddison 2017)."""
    score = jax.nn.log_softmax(logits) + gumbel
    return score.argmax(axis=-1), jax.nn.softmax(score / temperature, axis=-1)


def gate(
    u: Float[Array, "..."], prob: Float[Array, ""], temperature: float
) -> tuple[Array, Float[Array, "..."]]:
    """A yes with probability `prob`, and its relaxation sigmoid((logit prob + logistic noise) / temperature)."""
    score = jnp.log(prob) - jnp.log1p(-prob) + jnp.log(u) - jnp.log1p(-u)
    return score > 0, jax.nn.sigmoid(score / temperature)


def trend_shape(
    mean: Float[Array, "cells genes"], bcv_common: Float[Array, ""], spread: Float[Array, " genes"]
) -> Float[Array, "cells genes"]:
    """1 / BCV², the gamma shape of a mean: BCV = (bcv_common + 1 / sqrt(mean)) * spread, as in Splatter.

    `spread` is sqrt(df / chi²_df), of every gene. Written so that a mean of 0 gives shape 0.
    """
    return jnp.maximum(mean / ((1 + bcv_common * jnp.sqrt(mean + TINY)) * spread) ** 2, LEAST_SHAPE)


def dropout_probability(mean: Float[Array, "cells genes"], mid: Array, shape: Array) -> Float[Array, "cells genes"]:
    """1 / (1 + exp(-shape (log mean - mid))): for a shape below 0 it falls with the mean, from 1 to 0."""
    return jax.nn.sigmoid(shape * (jnp.log(mean + TINY) - mid))


def zero_probability(mean: Array, shape: Array) -> Array:
    """P(count = 0) of a Poisson whose mean is gamma distributed: (1 + mean / shape)^-shape."""
    return jnp.exp(-shape * jnp.log1p(mean / shape))
