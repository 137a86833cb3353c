"""Decisions made smooth: gates that sum to k or open by chance, ranks, medians and their spread."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BISECTIONS = 80  # more than the bits of any float between the two ends
STEPS = 8192  # in a unit of the scores of soft_rank
TAIL = 40.0  # temperatures from the threshold at which a sigmoid has reached 0 or 1


@functools.partial(jax.jit, static_argnames="k")
def soft_top_k(scores: Float[Array, " items"], k: int, temperature: float | Array) -> Float[Array, " items"]:
    """Gates sigmoid((s_i - t) / T) with t such that they sum to k: as T -> 0 the k largest scores have gate 1.

    The threshold t is found by bisection and carries its exact gradient, dt = Σ w_i ds_i / Σ w_i with
    w_i = g_i (1 - g_i), by the implicit function theorem. Cost O(items). Equal scores share what is left. With k at
    least the number of items all gates are 1.
    """
    if k >= scores.shape[0]:
        return jnp.ones_like(scores) + 0.0 * scores
    fixed = jax.lax.stop_gradient(scores)
    width = jax.lax.stop_gradient(jnp.asarray(temperature, scores.dtype))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) / 2
        too_many = jax.nn.sigmoid((fixed - middle) / width).sum() > k
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    ends = (fixed.min() - TAIL * width, fixed.max() + TAIL * width)
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, ends)
    found = low + (high - low) / 2
    gates = jax.nn.sigmoid((scores - found) / temperature)
    slope = jax.lax.stop_gradient(gates * (1 - gates)).sum()
    # a Newton step: 0 in value, the implicit derivative in the gradient
    surplus = gates.sum() - jax.lax.stop_gradient(gates.sum())
    threshold = found + width * surplus / jnp.maximum(slope, jnp.finfo(scores.dtype).tiny)
    return jax.nn.sigmoid((scores - threshold) / temperature)


def top_k_mask(scores: Float[Array, " items"], k: int) -> Float[Array, " items"]:
    """1 at the k largest scores, 0 elsewhere; of equal scores the first. No gradient."""
    fixed = jax.lax.stop_gradient(scores)
    _, chosen = jax.lax.top_k(fixed, min(k, scores.shape[0]))
    return jnp.zeros_like(fixed).at[chosen].set(1.0)


def straight_through(hard: Array, soft: Array) -> Array:
    """The value of `hard` with the gradient of `soft` (Bengio et al. 2013, arXiv:1308.3432)."""
    return soft + jax.lax.stop_gradient(hard - soft)


@jax.jit
def soft_rank(scores: Float[Array, " items"], width: float | Array) -> Float[Array, " items"]:
    """Position of each score from the largest, 0 first; scores closer than `width` share their places smoothly.

    r_i = Σ_{j≠i} clip(1/2 + (s_j - s_i) / (2 width), 0, 1), by sorting and prefix sums in O(items log items). As the
    width goes to 0, the rank; equal scores get their mean rank.
    """
    ordered = jnp.sort(scores)
    first = jnp.searchsorted(ordered, scores - width, side="left")
    last = jnp.searchsorted(ordered, scores + width, side="right")
    inside = last - first
    # Σ (s_j - s_i) over the window in two parts: whole steps, exact as integers even where their sums wrap around,
    # and what is left of each score, which is small. Prefix sums of floats would lose what small widths need.
    steps = jnp.round(jax.lax.stop_gradient(ordered) * STEPS).astype(jnp.int32)
    left = ordered - steps / jnp.asarray(STEPS, scores.dtype)
    own_steps = jnp.round(jax.lax.stop_gradient(scores) * STEPS).astype(jnp.int32)
    own_left = scores - own_steps / jnp.asarray(STEPS, scores.dtype)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(steps, dtype=jnp.int32)])
    before_left = jnp.concatenate([jnp.zeros(1, scores.dtype), jnp.cumsum(left)])
    whole = before[last] - before[first] - inside.astype(jnp.int32) * own_steps
    rest = before_left[last] - before_left[first] - inside * own_left
    difference = whole.astype(scores.dtype) / STEPS + rest
    return scores.shape[0] - last + inside / 2 + difference / (2 * width) - 0.5


def hard_rank(scores: Float[Array, " items"]) -> Int[Array, " items"]:
    """Position of each score from the largest, 0 first; of equal scores the first. No gradient."""
    return jnp.argsort(jnp.argsort(-scores, stable=True), stable=True)


def log_gate(value: Array, location: Array, slope: Array) -> Array:
    """The log of sigmoid(slope (value - location)): 0 far above the location, a straight line far below."""
    return jax.nn.log_sigmoid(slope * (value - location))


def stochastic_gate(
    mu: Float[Array, " items"], sigma: float | Array, key: Array | None = None
) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
    """Gates clip(mu + sigma noise, 0, 1) and their probabilities of being open, Phi(mu / sigma).

    Yamada et al. 2020, Feature selection using stochastic gates, eq. 4-6. Without a key there is no noise in the gates.
    """
    noisy = mu if key is None else mu + sigma * jax.random.normal(key, mu.shape, mu.dtype)
    return jnp.clip(noisy, 0.0, 1.0), jax.scipy.stats.norm.cdf(mu / sigma)


def median_and_mad(values: Float[Array, " items"]) -> tuple[Array, Array]:
    """Median, and median absolute deviation from it (unscaled, as scipy's)."""
    median = jnp.median(values)
    return median, jnp.median(jnp.abs(values - median))
