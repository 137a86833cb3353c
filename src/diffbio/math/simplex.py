"""The simplex and hulls of points: projections onto them, and points far from each other."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def project_simplex(v: Float[Array, "rows entries"]) -> Float[Array, "rows entries"]:
    """The nearest point of the probability simplex to each row: max(v - t, 0) with t such that it sums to 1.

    By Michelot's rule (1986): t from the entries above t, until none leaves; at most as many rounds as entries.
    """

    def level(above: Array) -> Array:
        return (jnp.where(above, v, 0.0).sum(axis=1) - 1.0) / above.sum(axis=1)

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        above, _, _ = state
        t = level(above)
        kept = above & (v > t[:, None])
        return kept, t, (kept != above).any()

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        return state[2]

    everything = jnp.ones(v.shape, bool)
    _, t, _ = jax.lax.while_loop(goes_on, again, (everything, v[:, 0], jnp.ones((), bool)))
    return jnp.maximum(v - t[:, None], 0.0)


def furthest_sum(points: Float[np.ndarray, "cells features"], k: int, first: int) -> Int[np.ndarray, " archetypes"]:
    """Finds k rows far from each other, each by its sum of distances to the others (Mørup & Hansen 2012)."""
    chosen = [first]

    def distance(i: int) -> np.ndarray:
        return np.asarray(np.linalg.norm(points - points[i], axis=1))

    total = distance(first)
    for _ in range(k + 9 if k > 1 else 0):
        if len(chosen) == k:  # all are there: the earliest is given up and chosen anew
            total = total - distance(chosen.pop(0))
        free = total.copy()
        free[chosen] = -np.inf
        chosen.append(int(free.argmax()))
        total = total + distance(chosen[-1])
    return np.asarray(chosen)


def nearest_in_hull(
    target: Float[np.ndarray, " features"],
    points: Float[np.ndarray, "cells features"],
    weights: Float[np.ndarray, " cells"],
) -> Float[np.ndarray, " cells"]:
    """Weights on the simplex of the point of the hull of `points` nearest to `target` (Wolfe 1976).

    weights: where to start, on the simplex; a start near the end saves steps.
    """
    moved = points - target
    square = (moved**2).sum(axis=1)
    slack = 1e-9 * square.max()
    support = np.flatnonzero(weights > 0)
    share = weights[support] / weights[support].sum()
    for _ in range(10 * points.shape[1] + 50):
        support, share = _affine_steps(moved, support, share)
        nearest = share @ moved[support]
        along = moved @ nearest
        best = int(along.argmin())
        if along[best] >= nearest @ nearest - slack or best in support:
            break
        support, share = np.append(support, best), np.append(share, 0.0)
    result = np.zeros(len(points))
    result[support] = share
    return result


def _affine_steps(moved: np.ndarray, support: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Goes to the point of the affine hull of the support nearest to 0, giving up points that would be negative."""
    while True:
        at = moved[support]
        size = len(support)
        gram = at @ at.T
        # the level of the border keeps the equations well scaled; a touch of ridge where points repeat
        level = np.trace(gram) / size
        gram[np.diag_indices(size)] += 1e-12 * level
        best = np.linalg.lstsq(gram + level, np.full(size, 1.0), rcond=None)[0]
        best /= best.sum()
        if (best > 1e-12).all():
            return support, best
        falls = best <= 1e-12
        room = share[falls] / np.maximum(share[falls] - best[falls], 1e-300)
        share = share + min(1.0, float(room.min())) * (best - share)
        share[falls & (share <= 1e-12)] = 0.0
        if not (share <= 0).any():
            share[np.flatnonzero(falls)[room.argmin()]] = 0.0
        kept = share > 0
        support, share = support[kept], share[kept] / share[kept].sum()
        if len(support) == 1:
            return support, np.ones(1)
