"""A mixture of Gaussians of one covariance whose memberships neighbours share: where spatial domains start."""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

N_STARTS, N_KEPT = 50, 5  # one in ten starts finds the best optimum of six domains in 600 spots
SHORT, LONG = 20, 60  # rounds of each start, and of those kept
SEEN = 10_000  # spots that the starts look at
SETTLED = 1e-3  # largest change of a membership in a round


class Mixture(NamedTuple):
    """log p(x, k) = log_weights_k - |(x - centre_k) whitening|² / 2, up to a constant."""

    centers: Float[np.ndarray, "domains features"]
    whitening: Float[np.ndarray, "features features"]
    log_weights: Float[np.ndarray, " domains"]


def spatial_mixture(
    points: Float[np.ndarray, "cells features"],
    n_domains: int,
    indices: Int[np.ndarray, "cells neighbors"],
    weights: Float[np.ndarray, "cells neighbors"],
    *,
    smoothness: float,
    shrinkage: float,
    seed: int,
) -> Mixture:
    """Maximum likelihood by EM whose memberships are one mean-field round of a Potts model from those before.

    The hidden Markov random field of BayesSpace (Zhao et al. 2021), by EM instead of sampling. The best of 50
    starts (one round of k-means from k-means++) by its likelihood without the field.

    Args:
        points: finite.
        n_domains: groups; at most as many as there are different cells.
        indices: neighbours of each cell.
        weights: of the neighbours' votes, rows sum to 1.
        smoothness: strength of the field, in units of log likelihood.
        shrinkage: share, 0 to 1, of the covariance that is replaced by the sphere of the same trace.
        seed: of the starts.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    x = np.asarray(points, np.float64)
    rng = np.random.default_rng(seed)
    some = x if len(x) <= SEEN else x[rng.choice(len(x), SEEN, replace=False)]
    starts = []
    for draw in range(N_STARTS):
        first = KMeans(n_domains, n_init=1, max_iter=1, random_state=(seed + draw) % 2**31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one round is wanted
            q = np.eye(n_domains)[first.fit_predict(some)]
        starts.append(_rounds(some, q, indices, weights, 0.0, shrinkage, SHORT))
    kept = sorted(starts, key=lambda found: -found[0])[:N_KEPT]
    longer = [_rounds(x, memberships(x, mixture), indices, weights, 0.0, shrinkage, LONG) for _, _, mixture in kept]
    _, q, _ = max(longer, key=lambda found: found[0])
    return _rounds(x, q, indices, weights, smoothness, shrinkage, LONG)[2]


def memberships(x: np.ndarray, mixture: Mixture) -> np.ndarray:
    """Shares of the domains in each cell, without neighbours."""
    return _softmax(log_joint(x, mixture))


def _rounds(
    x: np.ndarray, q: np.ndarray, indices: np.ndarray, weights: np.ndarray,
    smoothness: float, shrinkage: float, n_rounds: int,
) -> tuple[float, np.ndarray, Mixture]:  # fmt: skip
    """Mean log likelihood without the field, memberships, mixture."""
    likelihood, mixture = -np.inf, _maximised(x, q, shrinkage)
    for _ in range(n_rounds):
        mixture = _maximised(x, q, shrinkage)
        logits = log_joint(x, mixture)
        top = logits.max(axis=1, keepdims=True)
        density = np.log(np.diag(mixture.whitening)).sum()  # triangular: half the log determinant of the precision
        likelihood = float((top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))).mean() + density)
        if smoothness:
            logits = logits + smoothness * sum(weights[:, j, None] * q[indices[:, j]] for j in range(indices.shape[1]))
        before, q = q, _softmax(logits)
        if np.abs(q - before).max() < SETTLED:
            break
    return likelihood, q, mixture


def log_joint(x: np.ndarray, mixture: Mixture) -> np.ndarray:
    """Log p(x, k) of each cell and domain, up to a constant."""
    center = mixture.centers.mean(axis=0)  # near it |a|² - 2ab + |b|² loses nothing in double precision
    white, goal = (x - center) @ mixture.whitening, (mixture.centers - center) @ mixture.whitening
    apart = (white**2).sum(axis=1, keepdims=True) - 2 * white @ goal.T + (goal**2).sum(axis=1)
    return np.asarray(mixture.log_weights - 0.5 * apart)


def _maximised(x: np.ndarray, q: np.ndarray, shrinkage: float) -> Mixture:
    n, width = x.shape
    size = q.sum(axis=0) + 1e-9  # a domain may lose all its cells
    centers = q.T @ x / size[:, None]
    rest = x.T @ x / n - (centers.T * size / n) @ centers
    sphere = max(float(np.trace(rest)) / width, 1e-12)
    covariance = (1 - shrinkage) * rest + (shrinkage + 1e-6) * sphere * np.eye(width)
    return Mixture(centers, np.linalg.cholesky(np.linalg.inv(covariance)), np.log(size / n))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True))
