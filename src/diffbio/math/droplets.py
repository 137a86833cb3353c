"""Which droplets of an unfiltered matrix hold a cell: EmptyDrops (Lun et al. 2019), and the profile of the soup."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Real
from scipy.interpolate import LSQUnivariateSpline
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

from ..errors import ConfigError, DataError

LOWER = 100.0  # counts: droplets with at most as many are taken for empty, as in DropletUtils and CellBender
LARGEST_ALPHA = 10_000.0  # of the Dirichlet-multinomial; beyond, it is a multinomial
DROPLETS_FOR_ALPHA = 20_000  # tell one number well enough
SKIPPED_RANKS, FEWEST_TOTALS, DEGREES_OF_FREEDOM = 50, 20, 20  # of the curve of totals against ranks
LOOKED_AT = 100  # droplets above the knee, to see whether these are cells
DRAWS_AT_ONCE = 1 << 22  # molecules of simulated droplets


class Called(NamedTuple):
    """What EmptyDrops says of every droplet."""

    is_cell: Bool[np.ndarray, " droplets"]
    pvalue: Float[np.ndarray, " droplets"]  # of looking like the soup; NaN for those taken for empty beforehand
    fdr: Float[np.ndarray, " droplets"]  # by Benjamini and Hochberg; NaN as above
    profile: Float[np.ndarray, " genes"]  # the soup's gene fractions, none of them 0 that any droplet holds
    retain: float  # droplets of at least as many counts are cells, whatever they look like
    alpha: float  # of the soup's Dirichlet-multinomial; infinity: multinomial


def soup_profile(
    matrix: Any, totals: Real[np.ndarray, " droplets"], *, lower: float | int = LOWER
) -> tuple[Integer[np.ndarray, " genes"], Bool[np.ndarray, " droplets"]]:
    """Counts of each gene summed over the droplets of 1 to `lower` counts, and which droplets these are.

    Raises:
        DataError: there are none.
    """
    empty = (totals > 0) & (totals <= lower)
    if not empty.any():
        msg = f"no droplets of 1 to {lower:g} counts, so nothing tells the soup; give the unfiltered matrix of all "
        msg += "droplets, or a higher limit (lower)"
        raise DataError(msg)
    return np.asarray(matrix[empty].sum(axis=0)).ravel().astype(np.int64), empty


def good_turing(counts: Integer[np.ndarray, " genes"]) -> Float[np.ndarray, " genes"]:
    """Proportions of genes, with what unseen genes are owed (simple Good-Turing, Gale & Sampson 1995).

    Genes seen r times share r* = (r + 1) E(N_{r+1}) / E(N_r), E by a log-linear fit of the smoothed numbers N_r of
    genes seen r times, where Turing's own estimate differs by less than 1.65 standard errors. As edgeR's
    `goodTuringProportions`, which EmptyDrops uses. Genes never seen share N_1 / total evenly (N_1 at least 1/2).
    """
    counts = np.asarray(counts, np.int64)
    total = counts.sum()
    seen, number = np.unique(counts[counts > 0], return_counts=True)
    unseen = int((counts == 0).sum())
    if not len(seen):
        return np.full(len(counts), 1.0 / max(len(counts), 1))
    singles = number[0] if seen[0] == 1 else 0
    owed = max(singles, 0.5) / total if unseen else 0.0  # 1/2: log 0 would be no number
    if len(seen) > 1:
        below = np.concatenate([[0], seen[:-1]])
        above = np.concatenate([seen[1:], [2 * seen[-1] - below[-1]]])
        slope = np.polyfit(np.log(seen), np.log(2.0 * number / (above - below)), 1, w=np.sqrt(number))[0]
        adjusted = seen * (1.0 + 1.0 / seen) ** (slope + 1.0)
        following = np.append(number[1:] * (seen[1:] == seen[:-1] + 1), 0)
        turing = (seen + 1.0) * following / number
        error = (seen + 1.0) * np.sqrt(following) / number * np.sqrt(1.0 + following / number)
        differs = (following > 0) & (np.abs(turing - adjusted) > 1.65 * error)
        switched = len(seen) if differs.all() else int(np.argmin(differs))
        adjusted[:switched] = turing[:switched]
    else:
        adjusted = seen.astype(float)
    adjusted *= (1.0 - owed) / (adjusted * number).sum()
    value = np.zeros(len(counts))
    value[counts > 0] = adjusted[np.searchsorted(seen, counts[counts > 0])]
    value[counts == 0] = owed / max(unseen, 1)
    return value / value.sum()


def call_cells(
    matrix: Any,
    *,
    lower: float | int = LOWER,
    retain: float | int | None = None,
    fdr: float = 0.001,
    n_simulations: int = 10_000,
    seed: int = 0,
) -> Called:
    """Calls the droplets that hold a cell: those whose genes are unlike the soup's, or that hold very many counts.

    EmptyDrops (Lun et al. 2019, Genome Biology 20:63): the soup's gene proportions come from the droplets of at most
    `lower` counts (Good-Turing), the spread between droplets from a Dirichlet-multinomial fitted to them; the
    probability of each larger droplet's counts under it is compared with that of simulated droplets of as many
    counts (Monte Carlo p-values), and Benjamini and Hochberg's rate of false discoveries decides. Droplets above the
    knee of the curve of totals against ranks are cells in any case; but where cells are few, that knee may lie among
    the soup, so it is used only if most of the least droplets above it are unlike the soup.

    Args:
        matrix: (droplets, genes) whole counts, scipy sparse CSR.
        lower: droplets of at most as many counts are empty.
        retain: droplets of at least as many counts are cells; None finds the knee.
        fdr: highest rate of false discoveries of a cell.
        n_simulations: simulated droplets; the smallest p-value is 1 / (n_simulations + 1).
        seed: of these.

    Raises:
        ConfigError: a setting is out of range.
        DataError: no droplets of at most `lower` counts, or none of more.
    """
    if not (lower >= 1 and 0 < fdr < 1 and n_simulations >= 100):
        msg = f"call_cells: lower must be >= 1, fdr in (0, 1) and n_simulations >= 100, got {lower:g}, {fdr:g} and "
        msg += f"{n_simulations}."
        raise ConfigError(msg)
    if retain is not None and not retain > lower:
        msg = f"call_cells: retain must be above lower ({lower:g}), got {retain!r}."
        raise ConfigError(msg)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    counts, empty = soup_profile(matrix, totals, lower=lower)
    tested = np.flatnonzero(totals > lower)
    if not len(tested):
        msg = f"no droplet has more than {lower:g} counts, so none can hold a cell; give a lower limit (lower)"
        raise DataError(msg)
    profile = good_turing(counts)
    seen_anywhere = np.asarray(matrix.sum(axis=0)).ravel() > 0
    profile = np.where(seen_anywhere, profile, 0.0)
    profile /= profile.sum()
    rng = np.random.default_rng(seed)
    alpha = _alpha(matrix, np.flatnonzero(empty), profile, rng)
    pvalue, rate = np.full(len(totals), np.nan), np.full(len(totals), np.nan)
    knee = _knee(totals[tested]) if retain is None else float(retain)
    if retain is None and not _holds_cells(matrix, totals, tested[totals[tested] >= knee], profile, alpha, rng):
        knee = np.inf
    unsure = tested[totals[tested] < knee]
    pvalue[tested] = 0.0
    if len(unsure):
        pvalue[unsure] = _pvalues(matrix[unsure], totals[unsure], profile, alpha, n_simulations, rng)
    rate[tested] = _benjamini_hochberg(pvalue[tested])
    return Called(np.nan_to_num(rate, nan=1.0) <= fdr, pvalue, rate, profile, float(knee), alpha)


def _weights(profile: np.ndarray, alpha: float) -> np.ndarray:
    """Parameters of the Dirichlet; a multinomial is one with so many pseudo-counts that none counts."""
    return profile * min(alpha, 1e9)


def _alpha(matrix: Any, empty: np.ndarray, profile: np.ndarray, rng: np.random.Generator) -> float:
    """The most likely sum of the Dirichlet's parameters, given empty droplets."""
    some = np.sort(rng.permutation(empty)[:DROPLETS_FOR_ALPHA])
    rows = matrix[some]
    totals, values, share = np.asarray(rows.sum(axis=1)).ravel(), rows.data, profile[rows.indices]

    def surprise(log_alpha: float) -> float:
        alpha = np.exp(log_alpha)
        per_droplet = gammaln(alpha) - gammaln(totals + alpha)
        return -float(per_droplet.sum() + (gammaln(values + alpha * share) - gammaln(alpha * share)).sum())

    found = minimize_scalar(surprise, bounds=(np.log(0.01), np.log(LARGEST_ALPHA)), method="bounded")
    alpha = float(np.exp(found.x))
    return np.inf if alpha > 0.95 * LARGEST_ALPHA else alpha


def _knee(totals: np.ndarray) -> float:
    """The total where the curve of log totals against log ranks bends down most: its signed curvature is least.

    As `barcodeRanks` of DropletUtils: between the least steep and the steepest place, without the 50 largest droplets,
    where ranks are far apart, on a cubic spline of 20 degrees of freedom.
    """
    ordered = np.sort(totals)[::-1]
    value, first = np.unique(-ordered, return_index=True)
    rank = first + (np.diff(np.append(first, len(ordered))) + 1) / 2  # the middle rank of equal totals
    x, y = np.log10(rank), np.log10(-value)
    if (rank > SKIPPED_RANKS).sum() >= FEWEST_TOTALS:
        x, y = x[rank > SKIPPED_RANKS], y[rank > SKIPPED_RANKS]
    if len(x) < FEWEST_TOTALS:
        return np.inf
    # derivatives over spans of the curve: single steps of one count are noise
    grid = np.linspace(x[0], x[-1], 200)
    curve = np.interp(grid, x, y)
    knots = np.linspace(x[0], x[-1], DEGREES_OF_FREEDOM - 2)[1:-1]
    spline = LSQUnivariateSpline(grid, curve, knots)
    slope, bend = spline.derivative(1)(grid), spline.derivative(2)(grid)
    steepest = int(np.argmin(slope))
    flattest = int(np.argmax(slope[: steepest + 1]))
    curvature = (bend / (1.0 + slope**2) ** 1.5)[flattest : steepest + 1]
    return float(10 ** spline(grid[flattest + int(np.argmin(curvature))]))


def _holds_cells(
    matrix: Any, totals: np.ndarray, above: np.ndarray, profile: np.ndarray, alpha: float, rng: np.random.Generator
) -> bool:
    """Whether most of the droplets just above the knee are unlike the soup, so that those above are cells."""
    if not len(above):
        return False
    least = above[np.argsort(totals[above], kind="stable")][:LOOKED_AT]
    pvalue = _pvalues(matrix[least], totals[least], profile, alpha, 199, rng)
    return bool((pvalue <= 0.01).mean() > 0.5)


def _pvalues(
    rows: Any, totals: np.ndarray, profile: np.ndarray, alpha: float, n_simulations: int, rng: np.random.Generator
) -> np.ndarray:
    """(simulated droplets of the same total that are no more probable + 1) / (n_simulations + 1).

    One long droplet of the largest total is drawn at a time; its first n molecules are a droplet of n.
    """
    weights = _weights(profile, alpha)
    row = np.repeat(np.arange(len(totals)), np.diff(rows.indptr))
    # of the probability, what depends on more than the total
    own = gammaln(rows.data + weights[rows.indices]) - gammaln(weights[rows.indices]) - gammaln(rows.data + 1.0)
    observed = np.bincount(row, own, minlength=len(totals))
    order = np.argsort(totals, kind="stable")
    length = int(totals.max())
    at_once = max(1, DRAWS_AT_ONCE // length)
    lower = np.zeros(len(totals), np.int64)
    genes = np.flatnonzero(weights > 0)
    for start in range(0, n_simulations, at_once):
        many = min(at_once, n_simulations - start)
        drawn = _droplets(weights[genes], alpha, many, length, rng)
        before = _seen_before(drawn)
        part = weights[genes][drawn]
        likely = np.cumsum(np.log((before + part) / (before + 1.0)), axis=1)
        for some in np.array_split(order, max(1, len(order) * many // DRAWS_AT_ONCE)):
            at = totals[some].astype(np.int64) - 1
            # sums of the same terms in another order: equal but for rounding
            lower[some] += (likely[:, at] <= observed[some] + 1e-9 * np.abs(observed[some])).sum(axis=0)
    return (lower + 1.0) / (n_simulations + 1.0)


def _droplets(
    weights: np.ndarray, alpha: float, many: int, length: int, rng: np.random.Generator
) -> Integer[np.ndarray, "droplets molecules"]:
    """Genes of the molecules of droplets that hold soup alone."""
    if np.isinf(alpha):
        edges = np.cumsum(weights)
        return np.searchsorted(edges[:-1], rng.random((many, length)) * edges[-1], side="right")
    drawn = np.empty((many, length), np.int64)
    for i in range(many):
        edges = np.cumsum(rng.standard_gamma(weights))
        drawn[i] = np.searchsorted(edges[:-1], rng.random(length) * edges[-1], side="right")
    return drawn


def _seen_before(drawn: Integer[np.ndarray, "droplets molecules"]) -> Integer[np.ndarray, "droplets molecules"]:
    """How often the gene of each molecule came earlier in its droplet."""
    order = np.argsort(drawn, axis=1, kind="stable")
    genes = np.take_along_axis(drawn, order, axis=1)
    position = np.broadcast_to(np.arange(drawn.shape[1]), drawn.shape)
    first = np.ones(drawn.shape, bool)
    first[:, 1:] = genes[:, 1:] != genes[:, :-1]
    start = np.maximum.accumulate(np.where(first, position, 0), axis=1)
    before = np.empty_like(drawn)
    np.put_along_axis(before, order, position - start, axis=1)
    return before


def _benjamini_hochberg(pvalue: np.ndarray) -> np.ndarray:
    order = np.argsort(pvalue)[::-1]
    scaled = pvalue[order] * len(pvalue) / np.arange(len(pvalue), 0, -1)
    rate = np.empty(len(pvalue))
    rate[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return rate
