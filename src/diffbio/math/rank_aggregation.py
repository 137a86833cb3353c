"""Robust rank aggregation of several scores of the same items (Kolde et al. 2012), with soft ranks."""

from math import comb

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted_ranks(
    scores: Float[Array, " items"], weights: Float[Array, " items"], temperature: float
) -> Float[Array, " items"]:
    """Ranks from the highest score, 1 first, counting every item as often as its weight says.

    r_i = 1/2 + Σ_j w_j clip(1/2 + (s_j - s_i) / (2 width), 0, 1), width = temperature times the standard deviation of
    the scores. At temperature 0, or where scores do not vary, that is the mean rank of equal scores. By sorting and
    prefix sums, in O(items log items).
    """
    order = jnp.argsort(scores)
    ordered, weight = scores[order], weights[order]
    zero = jnp.zeros(1, scores.dtype)
    before = jnp.concatenate([zero, jnp.cumsum(weight)])
    if temperature == 0:
        first = jnp.searchsorted(ordered, scores, side="left")
        last = jnp.searchsorted(ordered, scores, side="right")
        return 0.5 + before[-1] - before[last] + (before[last] - before[first]) / 2
    total = jnp.where(before[-1] > 0, before[-1], 1.0)
    center = (weights * scores).sum() / total
    variance = (weights * (scores - center) ** 2).sum() / total
    flat = variance <= 1e-12 * center**2
    width = temperature * jnp.sqrt(jnp.where(flat, 1.0, variance))
    # about the mean: prefix sums of small numbers lose less
    moment = jnp.concatenate([zero, jnp.cumsum(weight * (ordered - center))])
    first = jnp.searchsorted(ordered, scores - width, side="left")
    last = jnp.searchsorted(ordered, scores + width, side="right")
    inside = before[last] - before[first]
    difference = moment[last] - moment[first] - (scores - center) * inside
    return 0.5 + before[-1] - before[last] + inside / 2 + difference / (2 * width)


def robust_rank_aggregate(
    ranks: Float[Array, "items lists"], weights: Float[Array, " items"]
) -> Float[Array, " items"]:
    """How unlikely it is by chance that an item is so high in so many lists; small is high.

    Ranks are divided by the largest of each list. Of the k-th smallest of K uniform numbers, P(U_(k) <= r) = Σ_{j >= k}
    C(K, j) r^j (1 - r)^(K - j); the result is K times the lowest of these over k, at most 1 (Kolde et al. 2012, eq. 2).

    Args:
        ranks: 1 is the highest.
        weights: items of weight above 1/2 decide on the largest rank.
    """
    counted = jax.lax.stop_gradient(weights) > 0.5
    largest = jnp.where(counted[:, None], ranks, -jnp.inf).max(axis=0)
    largest = jnp.where(jnp.isfinite(largest), largest, 1.0)
    share = jnp.sort(jnp.clip(ranks / largest, 0.0, 1.0), axis=1)
    n = ranks.shape[1]
    terms = [comb(n, j) * share**j * (1.0 - share) ** (n - j) for j in range(1, n + 1)]
    chances = [sum(term[:, k] for term in terms[k:]) for k in range(n)]
    return jnp.minimum(n * jnp.stack(chances).min(axis=0), 1.0)
