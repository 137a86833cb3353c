"""Genes along a trajectory: smooth expression with a band, weighted by fate, and correlations with fate."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import linalg, special, stats
from scipy.interpolate import BSpline

from ..errors import ConfigError, DataError

DEGREE = 3
PENALTIES = np.logspace(-4, 6, 41)  # of which cross-validation chooses
RIDGE = 1e-9  # relative; pieces of the curve without any cell are held by the penalty alone


class Trends(NamedTuple):
    """Expression of genes along a grid of times."""

    mean: Float[np.ndarray, "times genes"]
    low: Float[np.ndarray, "times genes"]
    high: Float[np.ndarray, "times genes"]


class Drivers(NamedTuple):
    """Pearson correlations of genes with fates; NaN for genes or fates that do not vary."""

    correlation: Float[np.ndarray, "genes fates"]
    low: Float[np.ndarray, "genes fates"]
    high: Float[np.ndarray, "genes fates"]
    pvalue: Float[np.ndarray, "genes fates"]
    qvalue: Float[np.ndarray, "genes fates"]  # Benjamini & Hochberg, within a fate


def trends(
    when: Float[np.ndarray, " cells"],
    expression: Float[np.ndarray, "cells genes"],
    weights: Float[np.ndarray, " cells"],
    times: Float[np.ndarray, " times"],
    *,
    n_segments: int = 20,
    confidence: float = 0.95,
) -> Trends:
    """Cubic P-splines (Eilers & Marx 1996, Stat. Sci. 11:89) of expression against time, cells weighted.

    Curvature is penalised by so much as generalised cross-validation says, for each gene. The band is the pointwise
    one of Wahba and Nychka: sigma² (B'WB + lambda P)^-1, sigma² the residual sum of squares over the sum of weights
    minus the degrees of freedom. It takes the weights as known.

    Args:
        when: time of each cell, finite.
        expression: of each cell.
        weights: 0-1, such as the probability of a fate.
        times: where the curve is wanted; within the range of the cells' times.
        n_segments: pieces of the curve.
        confidence: of the band.

    Raises:
        ConfigError: no piece, or a confidence that is not between 0 and 1.
        DataError: weights that do not add up to more than 4 cells, or one time for all cells.
    """
    if n_segments < 1 or not 0 < confidence < 1:
        msg = f"trends: n_segments must be above 0 and confidence between 0 and 1, got {n_segments} and {confidence}."
        raise ConfigError(msg)
    count = float(weights.sum())
    low, high = float(when.min()), float(when.max())
    if not count > DEGREE + 1 or not high > low:
        msg = f"trends: weights add up to {count:.3g} cells at times from {low:g} to {high:g}; that is no curve."
        raise DataError(msg)
    knots = low + (high - low) * np.arange(-DEGREE, n_segments + DEGREE + 1) / n_segments
    design = _design(when, knots)
    bend = np.diff(np.eye(design.shape[1]), 2, axis=0)
    weighted = design * weights[:, None]
    moment = weighted.T @ design
    moment += RIDGE * np.trace(moment) * np.eye(len(moment))
    root = np.linalg.cholesky(moment)
    half = linalg.solve_triangular(root, bend.T, lower=True)
    stiffness, turn = np.linalg.eigh(half @ half.T)
    stiffness = np.maximum(stiffness, 0.0)
    # in these coordinates every penalty shrinks each coefficient on its own
    back = linalg.solve_triangular(root, turn, lower=True, trans="T")
    scores = back.T @ (weighted.T @ expression)
    total = weights @ expression**2
    kept = 1 / (1 + PENALTIES[:, None] * stiffness)  # (penalties, coefficients)
    freedom = kept.sum(axis=1)
    residual = np.maximum(total - (2 * kept - kept**2) @ scores**2, 0.0)  # (penalties, genes)
    with np.errstate(divide="ignore"):
        criterion = np.where(freedom[:, None] < count, residual / (count - freedom[:, None]) ** 2, np.inf)
    best = criterion.argmin(axis=0)
    sigma2 = residual[best, np.arange(len(best))] / (count - freedom[best])
    at = _design(times, knots) @ back  # (times, coefficients)
    mean = at @ (kept[best].T * scores)
    width = special.ndtri(0.5 + confidence / 2) * np.sqrt(at**2 @ kept[best].T * sigma2)
    return Trends(mean, mean - width, mean + width)


def drivers(expression: Any, fates: Float[np.ndarray, "cells fates"], *, confidence: float = 0.95) -> Drivers:
    """Correlation of every gene with every fate, with Fisher's interval and test, as CellRank's lineage drivers.

    arctanh r is normal with variance 1 / (cells - 3) where there is no correlation. Cells of one graph are not
    independent, so p-values are too small; use them for ranking.

    Args:
        expression: (cells, genes), dense or scipy sparse.
        fates: probabilities.
        confidence: of the interval.

    Raises:
        DataError: fewer than 4 cells.
    """
    n = fates.shape[0]
    if n < 4:
        msg = f"drivers: {n} cells are too few; 4 at least."
        raise DataError(msg)
    mean = np.asarray(expression.mean(axis=0), np.float64).ravel()
    square = expression.multiply(expression) if hasattr(expression, "multiply") else expression**2
    variance = np.maximum(np.asarray(square.mean(axis=0), np.float64).ravel() - mean**2, 0.0)
    centred = fates - fates.mean(axis=0)
    shared = np.asarray(expression.T @ centred, np.float64) / n
    spread = np.outer(np.sqrt(variance), centred.std(axis=0))
    moves = (variance[:, None] > 1e-12 * (mean**2)[:, None]) & (centred.std(axis=0) > 1e-12)
    r = np.where(moves, np.clip(shared / np.where(moves, spread, 1.0), -1.0, 1.0), np.nan)
    with np.errstate(divide="ignore"):
        z = np.arctanh(r)
    error = 1 / np.sqrt(n - 3)
    reach = special.ndtri(0.5 + confidence / 2) * error
    pvalue = 2 * special.ndtr(-np.abs(z) / error)
    qvalue = np.full_like(pvalue, np.nan)
    for k in range(pvalue.shape[1]):
        tested = np.isfinite(pvalue[:, k])
        if tested.any():
            qvalue[tested, k] = stats.false_discovery_control(pvalue[tested, k])
    return Drivers(r, np.tanh(z - reach), np.tanh(z + reach), pvalue, qvalue)


def _design(when: np.ndarray, knots: np.ndarray) -> np.ndarray:
    inside = np.clip(when, knots[DEGREE], knots[-DEGREE - 1])
    return np.asarray(BSpline.design_matrix(inside, knots, DEGREE).toarray())
