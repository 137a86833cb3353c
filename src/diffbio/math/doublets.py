"""Doublets by simulation: variable genes, pairs of cells, the Bayesian score and its threshold.

The steps are those of Scrublet (Wolock, Lopez & Klein 2019, Cell Systems 8:281). The genes, the pairs and who is whose
neighbour are discrete choices, outside the gradient; projections, distances, scores and threshold have one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .distances import safe_norm
from .neighbors import nearest

MEAN_BINS, FANO_BINS = 50, 200  # of the noise model of `v_scores`
FLOOR_PERCENTILE = 0.1  # of the genes of a bin: those without biological noise
LEAST_COUNT, LEAST_CELLS = 3.0, 3  # a gene counts if so many cells have so many (normalised) counts
SCORE_BINS, MOST_SMOOTHINGS = 256, 10_000  # of the simulated scores' histogram
TICKS = 8.0  # counts are told apart by eighths where cells are put into an order of their own
FLOATS_PER_BLOCK = 1 << 23  # of coordinates of neighbours held at once
REACH = 1.5  # neighbours looked at, as a multiple of those counted


def v_scores(mean: Float[np.ndarray, " genes"], variance: Float[np.ndarray, " genes"]) -> Float[np.ndarray, " genes"]:
    """Fano factors var / mean relative to what technical noise gives a gene of that mean; 0 for genes without counts.

    The noise model of Klein et al. 2015 (Cell 161:1187): CV² = c / mean + b. c is the most frequent Fano factor, at
    least 1; b makes the curve pass, in the L1 norm of logarithms, along the lowest CV² of genes of like mean.
    """
    scores = np.zeros(len(mean))
    used = (mean > 0) & (variance > 0)
    if not used.any():
        return scores
    mu, fano = np.asarray(mean, np.float64)[used], np.asarray(variance, np.float64)[used] / mean[used]
    frequency, edges = np.histogram(np.log(fano), FANO_BINS)
    top = int(np.argmax(frequency))
    c = max(float(np.exp((edges[top] + edges[top + 1]) / 2)), 1.0)
    at, floor = _lower_edge(np.log(mu), np.log(fano / mu))
    # an L1 fit of one parameter has its optimum where one of the residuals is 0
    candidates = np.exp(floor) - c * np.exp(-at)
    candidates = np.append(candidates[candidates > 0], 0.0)
    misfit = np.abs(np.log(c * np.exp(-at) + candidates[:, None]) - floor).sum(1)
    scores[used] = fano / (c + candidates[np.argmin(misfit)] * mu)
    return scores


def _lower_edge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of bins of equal width along x, and a low percentile of y in each; an empty bin takes the last one's."""
    width = (x.max() - x.min()) / MEAN_BINS
    if width == 0:
        return x[:1], np.array([np.percentile(y, FLOOR_PERCENTILE)])
    bins = np.minimum(((x - x.min()) / width).astype(int), MEAN_BINS - 1)
    low = np.full(MEAN_BINS, np.nan)
    for b in range(MEAN_BINS):
        inside = y[bins == b]
        low[b] = np.percentile(inside, FLOOR_PERCENTILE) if len(inside) else low[b - 1]
    return x.min() + width * (np.arange(MEAN_BINS) + 0.5), low


def most_variable(
    mean: Float[np.ndarray, " genes"],
    variance: Float[np.ndarray, " genes"],
    detected: Int[np.ndarray, " genes"],
    percentile: float,
    *,
    most: int | None = None,
) -> Bool[np.ndarray, " genes"]:
    """Which genes have a v-score at or above a percentile of all, and are detected in three cells at least.

    mean, variance: of normalised counts. detected: cells with three normalised counts or more. most: no more than so
    many, those of highest score; ties at the percentile may be more.
    """
    scores = v_scores(mean, variance)
    if not (scores > 0).any():
        return np.zeros(len(scores), bool)
    found = (scores > 0) & (scores >= np.percentile(scores[scores > 0], percentile)) & (detected >= LEAST_CELLS)
    if most is not None and found.sum() > most:
        found[np.argsort(np.where(found, -scores, np.inf), kind="stable")[most:]] = False
    return found


def content_order(counts: Float[Array, "cells genes"]) -> Int[Array, " cells"]:
    """Row numbers in an order that the cells' counts decide, and not where they stand; else as good as random.

    Sorted by two hashes of a cell's counts, rounded to eighths. So a draw of cells is the same for cells that come in
    another order.
    """
    whole = jnp.round(jax.lax.stop_gradient(counts) * TICKS).astype(jnp.int32)
    words = jnp.asarray(np.random.default_rng(0).integers(-(2**31), 2**31, (2, counts.shape[1]), np.int32) | 1)
    first, second = ((whole * word).sum(1, dtype=jnp.int32) for word in words)  # wraps around: exact in any order
    return jnp.lexsort((second, first))


def draw_pairs(key: jax.Array, order: Int[Array, " cells"], n_pairs: int) -> Int[Array, "doublets parents"]:
    """Row numbers of two different random cells for each simulated doublet."""
    keys = jax.random.split(key)
    first = jax.random.randint(keys[0], (n_pairs,), 0, len(order))
    other = (first + jax.random.randint(keys[1], (n_pairs,), 1, len(order))) % len(order)
    return order[jnp.stack([first, other], axis=1)]


@jax.jit
def doublet_positions(
    scores: Float[Array, "cells components"],
    library: Float[Array, " cells"],
    pairs: Int[Array, "doublets parents"],
) -> Float[Array, "doublets components"]:
    """Where the sums of two cells' counts lie, after normalisation by their total, in a linear projection.

    (x_i + x_j) / (t_i + t_j) is the mean of x_i / t_i and x_j / t_j weighted by t, and an affine map keeps weighted
    means: so no counts of doublets are ever made.
    """
    totals = library[pairs]
    weight = totals / totals.sum(1, keepdims=True)
    return (weight[..., None] * scores[pairs]).sum(1)


def simulated_share(
    observed: Float[Array, "cells components"],
    simulated: Float[Array, "doublets components"],
    reference: Int[Array, " reference"] | None,
    *,
    k: int,
    temperature: float,
) -> tuple[Float[Array, " cells"], Float[Array, " doublets"]]:
    """Share of simulated doublets among the k nearest of all points, of each cell and of each simulated doublet.

    A neighbour at distance d weighs sigmoid((b - d) / (T (e - b))): b is midway between the k-th and the next distance,
    e that of the farthest candidate (the 1.5 k nearest). As T -> 0 the share is that of the k nearest, exactly.

    reference: cells that are neighbours; None is all. k: below their number plus that of the doublets.
    """
    kept = observed if reference is None else observed[reference]
    points = jnp.concatenate([kept, simulated])
    reach = min(max(int(REACH * k), k + 1), len(points) - 1)
    own = nearest(points, reach)
    shares = _shares(points, points, own, len(kept), k, temperature)
    if reference is None:
        return shares[: len(kept)], shares[len(kept) :]
    others = jnp.ones(len(observed), bool).at[reference].set(False)
    rest = jnp.nonzero(others, size=len(observed) - len(kept))[0]
    found = nearest(points, reach, queries=observed[rest])
    of_rest = _shares(points, observed[rest], found, len(kept), k, temperature)
    of_cells = jnp.zeros(len(observed), shares.dtype).at[reference].set(shares[: len(kept)]).at[rest].set(of_rest)
    return of_cells, shares[len(kept) :]


@functools.partial(jax.jit, static_argnames=("n_observed", "k"))
def _shares(
    points: jax.Array, asked: jax.Array, neighbors: jax.Array, n_observed: int, k: int, temperature: Any
) -> jax.Array:
    n, reach = neighbors.shape

    def share(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        position, near = rows
        distance = safe_norm(points[near] - position)
        inside, _ = _inside(distance, k, temperature)
        return (inside * (near >= n_observed)).sum() / inside.sum()

    step = max(1, FLOATS_PER_BLOCK // (reach * points.shape[1]))
    return jax.lax.map(jax.checkpoint(share), (asked, neighbors), batch_size=min(step, n))


def _inside(distance: jax.Array, k: int, temperature: Any) -> tuple[jax.Array, jax.Array]:
    """Weights of neighbours by their distances, nearest first, and the distance at which the weight is one half."""
    border = (distance[k - 1] + distance[min(k, len(distance) - 1)]) / 2
    width = temperature * (distance[-1] - border)
    return jax.nn.sigmoid((border - distance) / jnp.where(width > 0, width, 1.0)), border


def bayesian_score(
    share: Float[Array, " points"], *, ratio: float, expected_rate: float
) -> Float[Array, " points"]:
    """Probability of being a doublet whose neighbours are to a share q simulated doublets (Wolock 2019, eq. 1).

    score = (q rho / r) / (1 - rho - q (1 - rho - rho / r)), between 0 and 1. ratio r: simulated doublets for each
    observed cell. expected_rate rho: of doublets among the observed cells.
    """
    rho, r = expected_rate, ratio
    return share * rho / r / (1 - rho - share * (1 - rho - rho / r))


def bayesian_error(
    share: Float[Array, " points"], *, k: int, ratio: float, expected_rate: float, rate_sd: float
) -> Float[Array, " points"]:
    """Standard error of `bayesian_score`: from the k neighbours counted and the uncertainty of the expected rate."""
    rho, r = expected_rate, ratio
    of_share = jnp.sqrt(share * (1 - share) / (k + 3)) / share * (1 - rho)
    of_rate = rate_sd / rho * (1 - share)
    slope = share * rho / r / (1 - rho - share * (1 - rho - rho / r)) ** 2
    return slope * jnp.sqrt(of_share**2 + of_rate**2)


def smoothed_share(share: Float[Array, " points"], *, k: int) -> Float[Array, " points"]:
    """(k q + 1) / (k + 2), the mean of the share's posterior under a flat prior: never 0 or 1."""
    return (k * share + 1) / (k + 2)


class Threshold(NamedTuple):
    """value: scores above it are called. found: whether there are two modes, and it lies between them."""

    value: Float[Array, ""]
    found: Bool[Array, ""]


def minimum_between_modes(scores: Float[Array, " points"]) -> Threshold:
    """The lowest place between the two modes of a histogram, smoothed until no more than two are left.

    256 bins from the smallest score to the largest, running means of three (Prewitt & Mendelsohn 1966, as in Glasbey
    1993). Which bin it is has no gradient, where that bin lies has.
    """
    low, high = scores.min(), scores.max()
    fixed = jax.lax.stop_gradient((scores - low) / jnp.where(high > low, high - low, 1.0))
    bins = jnp.minimum((fixed * SCORE_BINS).astype(int), SCORE_BINS - 1)
    counts = jnp.zeros(SCORE_BINS, jnp.float32).at[bins].add(1.0)

    def smooth(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, rounds = state
        padded = jnp.concatenate([h[:1], h, h[-1:]])
        return (padded[:-2] + padded[1:-1] + padded[2:]) / 3, rounds + 1

    def rough(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (_maxima(state[0]).sum() > 2) & (state[1] < MOST_SMOOTHINGS)

    h, _ = jax.lax.while_loop(rough, smooth, smooth((counts, jnp.zeros((), int))))
    maxima = _maxima(h)
    first = jnp.argmax(maxima)
    last = SCORE_BINS - 1 - jnp.argmax(maxima[::-1])
    at = jnp.arange(SCORE_BINS)
    lowest = jnp.argmin(jnp.where((at >= first) & (at <= last), h, jnp.inf))
    return Threshold(low + (high - low) * (lowest + 0.5) / SCORE_BINS, (maxima.sum() == 2) & (high > low))


def _maxima(h: jax.Array) -> jax.Array:
    """Where a histogram starts to fall after it rose; of a plateau, its end."""
    steps = jnp.sign(jnp.diff(h))
    at = jax.lax.cummax(jnp.where(steps != 0, jnp.arange(len(steps)), -1))  # the last step that was not level
    before = jnp.concatenate([jnp.full(1, -1), at[:-1]])
    rising = jnp.where(before >= 0, steps[before], 1.0) > 0
    return jnp.append(rising & (steps < 0), jnp.zeros(1, bool))


def share_near(
    points: Float[Array, "cells components"],
    reference: Float[Array, "reference components"],
    is_doublet: Float[Array, " reference"],
    *,
    k: int,
    temperature: float,
) -> Float[Array, " cells"]:
    """Share of simulated doublets among the k points of `reference` nearest to each point, itself left out.

    Neighbours are weighted as in `simulated_share`. A point may be in the reference itself, under rounding: what lies
    nearer than some hundredths of the distance to the border is given no weight, 1 - exp(-(20 d / border)²).
    """
    k = min(k, len(reference) - 2)
    reach = min(max(int(REACH * k), k + 1) + 1, len(reference))
    return _shares_near(points, reference, is_doublet, nearest(reference, reach, queries=points), k + 1, temperature)


@functools.partial(jax.jit, static_argnames="k")
def _shares_near(
    points: jax.Array, reference: jax.Array, is_doublet: jax.Array, neighbors: jax.Array, k: int, temperature: Any
) -> jax.Array:
    def share(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        position, near = rows
        distance = safe_norm(reference[near] - position)
        inside, border = _inside(distance, k, temperature)
        other = 1 - jnp.exp(-((20 * distance / jnp.where(border > 0, border, 1.0)) ** 2))
        weight = inside * other
        total = weight.sum()
        doublets = (weight * is_doublet[near]).sum() / jnp.where(total > 0, total, 1.0)
        return jnp.where(total > 0, doublets, is_doublet[near].mean())

    step = max(1, FLOATS_PER_BLOCK // (neighbors.shape[1] * points.shape[1]))
    return jax.lax.map(jax.checkpoint(share), (points, neighbors), batch_size=min(step, len(points)))
