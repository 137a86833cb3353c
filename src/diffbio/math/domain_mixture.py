"""A mixture of Gaussians of one covariance whose memberships neighbours share: where spatial domains start."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

N_STARTS = 20  # of k-means
N_ROUNDS = 60
SEEN = 10_000  # spots that k-means looks at
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

    The hidden Markov random field of BayesSpace (Zhao et al. 2021), by EM instead of sampling. It starts from the best
    of 20 k-means, as mixtures usually do, and not from the optimum of highest likelihood: on the tissue of
    benchmarks/quality/spatial_domains.py that splits off small groups of odd spots.

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

    x = np.asarray(points, np.float64)
    rng = np.random.default_rng(seed)
    some = x if len(x) <= SEEN else x[rng.choice(len(x), SEEN, replace=False)]
    found = KMeans(n_domains, n_init=N_STARTS, random_state=seed % 2**31).fit(some)
    q = np.eye(n_domains)[found.predict(x)]
    q = _rounds(x, q, indices, weights, 0.0, shrinkage)[0]
    return _rounds(x, q, indices, weights, smoothness, shrinkage)[1]


def _rounds(
    x: np.ndarray, q: np.ndarray, indices: np.ndarray, weights: np.ndarray, smoothness: float, shrinkage: float
) -> tuple[np.ndarray, Mixture]:
    """Memberships and mixture after rounds of EM, until these settle."""
    mixture = _maximised(x, q, shrinkage)
    for _ in range(N_ROUNDS):
        mixture = _maximised(x, q, shrinkage)
        logits = log_joint(x, mixture)
        if smoothness:
            logits = logits + smoothness * sum(weights[:, j, None] * q[indices[:, j]] for j in range(indices.shape[1]))
        before, q = q, _softmax(logits)
        if np.abs(q - before).max() < SETTLED:
            break
    return q, mixture


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
