"""Archetypes: corners of a cloud of cells, cells as mixtures of them, how many there are, which genes they have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from ..errors import ConfigError, DataError
from .simplex import furthest_sum, nearest_in_hull, project_simplex

MOST_STEPS = 500  # of accelerated projected gradient; a few dozen where archetypes are far apart
CELLS_PER_BLOCK = 1 << 14  # whose equations are held at once
MOST_CANDIDATES = 5_000  # cells that archetypes are made of; of more, the outermost ones
DIRECTIONS = 1_000  # in which those are looked for
MOST_WEIGHTED = 20_000  # cells that archetypes are fitted to; beyond, every second, third, ...
TURNS = 2  # of the archetypes between two rounds of weights
STARTS = 3
TRIAL_ROUNDS = 15  # of every start; the best goes on
NEAR, FEWEST_NEAR = 0.5, 5  # weight and number of cells that are near an archetype
LEAST_FALL = 1e-9  # of the residual, relative, in a round: less, and it is over


class Archetypes(NamedTuple):
    """Archetypes = mixtures @ cells; rows of `mixtures` are on the simplex, and few entries are not 0."""

    archetypes: Float[np.ndarray, "archetypes features"]
    cells: Int[np.ndarray, " used"]  # row numbers of the cells that are used
    mixtures: Float[np.ndarray, "archetypes used"]
    explained: float  # 1 - residual / variance


@jax.jit
def mixture_weights(
    x: Float[Array, "cells features"],
    archetypes: Float[Array, "archetypes features"],
    *,
    temperature: float | Array,
    start: Float[Array, "cells archetypes"] | None = None,
) -> Float[Array, "cells archetypes"]:
    """The weights w on the simplex that minimise |x - w Z|² + T s |w|² for each cell x, with its exact gradient.

    s is the mean squared distance of the archetypes Z from their centre. As T -> 0 w Z is the nearest point of the
    archetypes' hull; T keeps the weights unique where archetypes are mixtures of each other, and draws them to equal
    shares. Accelerated projected gradient finds which weights are 0, outside the gradient; the others follow from
    linear equations (Karush-Kuhn-Tucker) that carry it.
    """
    k = len(archetypes)
    centre = archetypes.mean(axis=0)
    z, x = archetypes - centre, x - centre
    gram = jnp.matmul(z, z.T, precision="highest")
    spread = jnp.trace(gram) / k
    gram = gram + temperature * jnp.where(spread > 0, spread, 1.0) * jnp.eye(k, dtype=x.dtype)
    products = jnp.matmul(x, z.T, precision="highest")
    guess = jnp.full((len(x), k), 1.0 / k, x.dtype) if start is None else start
    found = _nearest_mixture(*jax.lax.stop_gradient((gram, products, guess)))
    exact = jax.lax.map(
        lambda cell: _on_support(gram, *cell), (products, found > 0), batch_size=min(CELLS_PER_BLOCK, max(len(x), 1))
    )
    # where the support was not quite settled an entry may be a little below 0
    positive = jnp.maximum(exact, 0.0)
    return positive / positive.sum(axis=1, keepdims=True)


def _nearest_mixture(
    gram: Float[Array, "archetypes archetypes"],
    products: Float[Array, "cells archetypes"],
    start: Float[Array, "cells archetypes"],
) -> Float[Array, "cells archetypes"]:
    """Minimises w G wᵀ / 2 - c·w on the simplex for every row c of `products` (Beck & Teboulle 2009, restarted)."""
    step = 1.0 / jnp.linalg.eigvalsh(gram)[-1]
    near = 100 * jnp.finfo(products.dtype).eps

    def again(state: Any) -> Any:
        w, ahead, momentum, _, count = state
        new = project_simplex(ahead - step * (jnp.matmul(ahead, gram, precision="highest") - products))
        # a cell that has turned back starts anew (O'Donoghue & Candes 2015)
        back = ((ahead - new) * (new - w)).sum(axis=1, keepdims=True) > 0
        momentum = jnp.where(back, 1.0, momentum)
        following = (1.0 + jnp.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        ahead = new + (momentum - 1.0) / following * (new - w)
        return new, ahead, following, jnp.abs(new - w).max(), count + 1

    def goes_on(state: Any) -> Array:
        return (state[3] > near) & (state[4] < MOST_STEPS)

    begin = (start, start, jnp.ones((len(start), 1), start.dtype), jnp.asarray(jnp.inf, start.dtype), 0)
    return jax.lax.while_loop(goes_on, again, begin)[0]


def _on_support(
    gram: Float[Array, "archetypes archetypes"],
    product: Float[Array, " archetypes"],
    support: Array,
) -> Float[Array, " archetypes"]:
    """Solves G w = c + m with Σ w = 1 and w = 0 outside `support`, m the same for all."""
    inside = support.astype(gram.dtype)
    scale = jnp.trace(gram) / len(gram)
    block = (gram / scale) * inside[:, None] * inside + jnp.diag(1.0 - inside)
    equations = jnp.block([[block, inside[:, None]], [inside[None, :], jnp.zeros((1, 1), gram.dtype)]])
    right = jnp.concatenate([product / scale * inside, jnp.ones(1, gram.dtype)])
    return jnp.linalg.solve(equations, right)[:-1] * inside


def learn_archetypes(
    x: Real[Any, "cells features"], n_archetypes: int, *, n_rounds: int = 300, temperature: float = 1e-6
) -> Archetypes:
    """Minimises |X - A B X|² with the rows of A and B on the simplex (Cutler & Breiman 1994), on the host.

    Starts from cells far from each other (FurthestSum, Mørup & Hansen 2012), three times, and goes on with the best.
    A round finds the weights A of all cells, then moves each archetype to the point of the cells' hull that is best
    given the others (Wolfe's algorithm, 1976), with steps lengthened as long as the residual falls. The result does
    not depend on the order of the cells. Beyond 20,000 cells, archetypes are fitted to 20,000 of them, and made of
    those that lie outermost in about 1,000 directions.

    Raises:
        ConfigError: n_archetypes below 1.
        DataError: fewer cells than archetypes, no variance, or values that are not finite.
    """
    points = np.asarray(x, np.float64)
    _check(points, n_archetypes)
    mean = points.mean(axis=0)
    points = points - mean
    candidates = _outermost(points)
    pool = points[candidates]
    cells = points[_some(points)]
    starts = [furthest_sum(pool, n_archetypes, first) for first in _firsts(pool)]
    tried = [_refined(cells, pool, np.eye(len(pool))[start], TRIAL_ROUNDS, temperature) for start in starts]
    best = min(tried, key=lambda found: found[1])[0]
    mixtures, residual = _refined(cells, pool, best, n_rounds, temperature)
    used = mixtures.max(axis=0) > 0
    return Archetypes(
        (mixtures @ pool + mean).astype(np.float32),
        candidates[used],
        mixtures[:, used],
        1.0 - residual / float((cells**2).sum()),
    )


def _check(points: np.ndarray, n_archetypes: int) -> None:
    if n_archetypes < 1:
        msg = f"learn_archetypes: n_archetypes must be at least 1, got {n_archetypes}."
        raise ConfigError(msg)
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        msg = f"learn_archetypes: the cells hold NaN or infinity, first in row {row}."
        raise DataError(msg)
    if np.ptp(points, axis=0).max() <= 0:
        msg = "learn_archetypes: all cells are alike; there are no corners."
        raise DataError(msg)
    # cells that differ have different places along a direction that follows from nothing
    along = points @ np.random.default_rng(0).normal(size=points.shape[1])
    distinct = len(np.unique(along))
    if distinct < max(n_archetypes, 2):
        msg = (
            f"learn_archetypes: n_archetypes is {n_archetypes}, but there are only {distinct} different cells; "
            f"pass n_archetypes={max(distinct, 1)} or fewer."
        )
        raise DataError(msg)


def _firsts(points: np.ndarray) -> list[int]:
    """The outermost cell, the innermost one, and the outermost one in the first coordinate."""
    square = (points**2).sum(axis=1)
    return [int(square.argmax()), int(square.argmin()), int(points[:, 0].argmax())][:STARTS]


def _outermost(points: np.ndarray) -> np.ndarray:
    """Row numbers of all cells; of many, those that lie outermost in random directions and along the axes."""
    n, width = points.shape
    if n <= MOST_CANDIDATES:
        return np.arange(n)
    directions = np.random.default_rng(0).normal(size=(width, DIRECTIONS))
    directions = np.hstack([np.eye(width), directions])
    most, least = np.empty(directions.shape[1], np.int64), np.empty(directions.shape[1], np.int64)
    spread = points.std(axis=0)
    scaled = (points / np.where(spread > 0, spread, 1.0)).astype(np.float32)
    for start in range(0, directions.shape[1], 100):
        along = scaled @ directions[:, start : start + 100].astype(np.float32)
        most[start : start + 100], least[start : start + 100] = along.argmax(axis=0), along.argmin(axis=0)
    return np.unique(np.concatenate([most, least]))


def _some(points: np.ndarray) -> np.ndarray:
    """Row numbers of all cells; of many, evenly spaced ones in the order of the coordinates."""
    n = len(points)
    if n <= MOST_WEIGHTED:
        return np.arange(n)
    return np.lexsort(points.T[::-1])[np.linspace(0, n - 1, MOST_WEIGHTED).astype(int)]


def _refined(
    cells: np.ndarray, pool: np.ndarray, mixtures: np.ndarray, n_rounds: int, temperature: float
) -> tuple[np.ndarray, float]:
    """Rounds of weights and archetypes from `mixtures`: (mixtures, residual)."""
    on_device = jnp.asarray(cells, jnp.float32)
    square = float((cells**2).sum())

    def evaluated(z: np.ndarray, start: Any) -> tuple[float, np.ndarray, np.ndarray, Any]:
        w = mixture_weights(on_device, jnp.asarray(z, jnp.float32), temperature=temperature, start=start)
        a = np.asarray(w, np.float64)
        gram, products = a.T @ a, a.T @ cells
        return square - 2 * float((products * z).sum()) + float((gram * (z @ z.T)).sum()), gram, products, w

    z = mixtures @ pool
    start = jnp.full((len(cells), len(z)), 1.0 / len(z), jnp.float32)
    residual, gram, products, w = evaluated(z, start)
    stretch, direction = 1.0, np.zeros_like(z)
    for _ in range(n_rounds):
        # along the last step, farther each time that this pays
        new = mixtures.copy()
        aim = z + stretch * direction
        at = z.copy()
        for _ in range(TURNS):
            for j in range(len(z)):
                if gram[j, j] <= 1e-9 * len(cells):
                    continue  # no cell has it: it stays
                rest = products[j] - gram[j] @ at + gram[j, j] * at[j]
                wanted = rest / gram[j, j] + stretch * (aim[j] - z[j])
                new[j] = nearest_in_hull(wanted, pool, new[j])
                at[j] = new[j] @ pool
        before = residual
        found = evaluated(at, w)
        if found[0] > residual and stretch > 0:
            stretch, direction = 0.0, np.zeros_like(z)
            continue
        if found[0] >= residual:
            break
        direction, mixtures, z = at - z, new, at
        residual, gram, products, w = found
        stretch = min(stretch + 0.5, 3.0)
        if before - residual < LEAST_FALL * before:
            break
    return mixtures, residual


def explained_by_number(
    x: Real[Any, "cells features"], most: int = 10, *, n_rounds: int = 100
) -> Float[np.ndarray, " numbers"]:
    """Share of the variance that 1, 2, ... archetypes explain; `most` at most, fewer where there are fewer cells."""
    points = np.asarray(x)
    most = min(most, len(np.unique(points, axis=0)) if len(points) < 1000 else len(points))
    return np.asarray([learn_archetypes(points, k, n_rounds=n_rounds).explained for k in range(1, most + 1)])


def elbow(explained: Float[Any, " numbers"]) -> int:
    """The number of archetypes at the elbow: where the curve is farthest above the line from its first to its last.

    explained: of 1, 2, ... archetypes, as `explained_by_number` gives it. Curves that rise nowhere have it at 1.
    """
    curve = np.asarray(explained, float)
    if len(curve) < 3 or curve[-1] <= curve[0]:
        return 1 if len(curve) < 2 or curve[-1] <= curve[0] else 2
    chord = np.linspace(curve[0], curve[-1], len(curve))
    return int((curve - chord).argmax()) + 1


class Enrichment(NamedTuple):
    """Genes near each archetype compared with all other cells."""

    difference: Float[np.ndarray, "archetypes genes"]  # of means
    pvalues: Float[np.ndarray, "archetypes genes"]  # one-sided: higher near the archetype
    qvalues: Float[np.ndarray, "archetypes genes"]  # of Benjamini & Hochberg, within an archetype
    correlation: Float[np.ndarray, "archetypes genes"]  # of expression and weight, over all cells


def gene_enrichment(expression: Any, weights: Float[Any, "cells archetypes"], *, share: float = 0.1) -> Enrichment:
    """Which genes are high near which archetype: Welch's t-test of the cells near it against all others.

    Near are cells of a weight above 1/2, at least 5 and at most `share` of all, those of the largest weight; equal
    weights at the border all count (after Hart et al. 2015, who rank where this takes means). Archetypes were found in
    the same expression, so that p-values are small too easily: they are for sorting genes. One pass over the entries;
    sparse expression stays sparse.

    Args:
        expression: (cells, genes), log-normalised, dense or scipy sparse.
        weights: of `mixture_weights`.
        share: of the cells that are near, at most.

    Raises:
        ConfigError: share is not between 0 and 1.
        DataError: other numbers of cells, or fewer than 4.
    """
    from scipy import sparse, stats

    if not 0 < share < 1:
        msg = f"gene_enrichment: share must be between 0 and 1, got {share!r}."
        raise ConfigError(msg)
    weights = np.asarray(weights, np.float64)
    n = len(weights)
    if expression.shape[0] != n or n < 4:
        msg = f"gene_enrichment: expression has {expression.shape[0]} cells, weights have {n}; 4 or more are needed."
        raise DataError(msg)
    most = int(np.clip(np.ceil(share * n), 2, n - 2))
    n_near = np.clip((weights > NEAR).sum(axis=0), min(FEWEST_NEAR, most), most)
    near = weights >= np.take_along_axis(np.sort(weights, axis=0), (n - n_near)[None], axis=0)
    values: Any = expression if sparse.issparse(expression) else np.asarray(expression)
    squares = values.multiply(values) if sparse.issparse(expression) else values**2
    groups = np.hstack([near, ~near, weights]).astype(np.float64)
    k = weights.shape[1]
    sums = np.asarray((values.T @ groups).T)  # (3 archetypes, genes)
    powers = np.asarray((squares.T @ groups[:, : 2 * k]).T)
    count = groups[:, : 2 * k].sum(axis=0)[:, None]
    mean = sums[: 2 * k] / np.maximum(count, 1)
    variance = np.maximum(powers - count * mean**2, 0.0) / np.maximum(count - 1, 1) / np.maximum(count, 1)
    # below is rounding: a gene that does not vary
    variance[variance < 1e-12 * (1e-30 + powers / np.maximum(count, 1) ** 2)] = 0.0
    difference = mean[:k] - mean[k:]
    both = variance[:k] + variance[k:]
    varies = both > 0
    safe = np.where(varies, both, 1.0)
    freedom = safe**2 / np.maximum(
        variance[:k] ** 2 / np.maximum(count[:k] - 1, 1) + variance[k:] ** 2 / np.maximum(count[k:] - 1, 1), 1e-300
    )
    pvalues = np.where(varies, stats.t.sf(difference / np.sqrt(safe), freedom), 1.0)
    centred = weights - weights.mean(axis=0)
    total, power = sums[:k] + sums[k : 2 * k], powers[:k] + powers[k:]
    spread = np.sqrt(np.maximum(power / n - (total / n) ** 2, 0.0)) * centred.std(axis=0)[:, None]
    covariance = sums[2 * k :] / n - total / n * weights.mean(axis=0)[:, None]
    correlation = np.where(spread > 0, covariance / np.where(spread > 0, spread, 1.0), 0.0)
    return Enrichment(difference, pvalues, stats.false_discovery_control(pvalues, axis=1), correlation)
