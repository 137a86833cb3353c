"""Local inverse Simpson index (Korsunsky et al. 2019), as harmonypy computes it."""

import numpy as np
from sklearn.neighbors import NearestNeighbors

ROUNDS = 50  # of bisection for the width of a cell's neighbourhood
TOLERANCE = 1e-5  # on its log perplexity


def lisi(x: np.ndarray, labels: np.ndarray, *, perplexity: float = 30) -> np.ndarray:
    """Effective number of labels around every cell: 1 where all neighbours agree, up to the number of labels.

    Neighbours weigh exp(-beta d), beta such that the weights have the given perplexity; the score is one over
    the probability that two of them, drawn by weight, agree.
    """
    distances = NearestNeighbors(n_neighbors=int(perplexity * 3)).fit(x).kneighbors(x)
    d, neighbors = distances[0][:, 1:], distances[1][:, 1:]
    p = _weights(d, np.log(perplexity))
    codes = np.unique(labels, return_inverse=True)[1]
    shares = np.stack([(p * (codes[neighbors] == c)).sum(1) for c in range(codes.max() + 1)])
    return 1 / (shares**2).sum(0)


def _weights(d: np.ndarray, log_perplexity: float) -> np.ndarray:
    beta, low, high = np.ones(len(d)), np.full(len(d), -np.inf), np.full(len(d), np.inf)
    for _ in range(ROUNDS):
        p = np.exp(-d * beta[:, None])
        total = p.sum(1)
        off = np.log(total) + beta * (d * p).sum(1) / total - log_perplexity
        if (np.abs(off) < TOLERANCE).all():
            break
        wide = off > 0
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        middle = (low + high) / 2
        middle = np.where(np.isinf(high), beta * 2, np.where(np.isinf(low), beta / 2, middle))
        beta = np.where(np.abs(off) < TOLERANCE, beta, middle)
    p = np.exp(-d * beta[:, None])
    return p / p.sum(1, keepdims=True)
