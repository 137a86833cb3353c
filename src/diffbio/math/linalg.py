"""Principal components on the host, exact and the same on every run."""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from ..errors import ConfigError

EXACT_UP_TO = 5_000  # size of a symmetric eigenproblem that a laptop solves in seconds
ROWS_PER_BLOCK = 4096


class PCA(NamedTuple):
    """Scores = (x - mean) @ components.T; rows of `components` are orthonormal, largest variance first."""

    scores: Float[np.ndarray, "cells components"]  # float32
    components: Float[np.ndarray, "components features"]
    mean: Float[np.ndarray, " features"]
    variance: Float[np.ndarray, " components"]  # of the scores, with n - 1 in the denominator


def pca(x: Any, n_components: int) -> PCA:
    """Finds the directions of largest variance of the rows of `x`, without centring a sparse `x` in memory.

    Exact: from the covariance of the features up to 5,000 of them, or from a singular value decomposition
    where there are fewer cells; beyond, Lanczos iterations (ARPACK) to machine precision. The sign of each
    component is such that its largest loading is positive.

    Args:
        x: (cells, features), dense (NumPy or JAX) or scipy sparse.
        n_components: at most min(cells, features).

    Raises:
        ConfigError: n_components is out of range.
    """
    x = x.tocsr() if hasattr(x, "tocsr") else np.asarray(x)
    n, width = x.shape
    if not 1 <= n_components <= min(n, width):
        msg = f"pca: n_components must be from 1 to {min(n, width)} for {n} cells x {width} features, "
        msg += f"got {n_components}."
        raise ConfigError(msg)
    mean = np.asarray(x.mean(axis=0, dtype=np.float64)).ravel()
    if n < width and n <= EXACT_UP_TO:
        components = scipy.linalg.svd(_block(x, 0, n) - mean, full_matrices=False)[2][:n_components]
    elif width <= EXACT_UP_TO:
        components = _top_eigenvectors(_scatter(x, mean), n_components)
    else:
        components = _lanczos(x, mean, n_components)
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = (components * np.where(largest < 0, -1.0, 1.0)).astype(np.float32)
    scores = np.empty((n, n_components), np.float32)
    shift = mean @ components.T  # x stays sparse: (x - mean) C = x C - mean C
    for start in range(0, n, ROWS_PER_BLOCK):
        scores[start : start + ROWS_PER_BLOCK] = x[start : start + ROWS_PER_BLOCK] @ components.T - shift
    variance = scores.var(axis=0, ddof=1, dtype=np.float64) if n > 1 else np.zeros(n_components)
    return PCA(scores, components, mean.astype(np.float32), variance.astype(np.float32))


def _block(x: Any, start: int, stop: int) -> np.ndarray:
    rows = x[start:stop]
    return np.asarray(rows.toarray() if hasattr(rows, "toarray") else rows, dtype=np.float32)


def _scatter(x: Any, mean: np.ndarray) -> np.ndarray:
    """Sum of (x_i - mean)(x_i - mean)ᵀ: float32 products of centred blocks, added up in float64."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], ROWS_PER_BLOCK):
        centred = _block(x, start, start + ROWS_PER_BLOCK) - mean.astype(np.float32)
        total += centred.T @ centred
    return total


def _top_eigenvectors(symmetric: np.ndarray, count: int) -> np.ndarray:
    last = len(symmetric) - 1
    return np.asarray(scipy.linalg.eigh(symmetric, subset_by_index=(last - count + 1, last))[1].T[::-1])


def _lanczos(x: Any, mean: np.ndarray, count: int) -> np.ndarray:
    from scipy.sparse.linalg import LinearOperator, svds

    centred = LinearOperator(
        x.shape,
        matvec=lambda v: x @ v - mean @ v,
        rmatvec=lambda u: x.T @ u - mean * u.sum(),
        matmat=lambda v: x @ v - mean @ v,
        rmatmat=lambda u: x.T @ u - np.outer(mean, u.sum(axis=0)),
        dtype=np.float64,
    )
    _, values, components = svds(centred, k=count, v0=np.ones(min(x.shape)))
    return np.asarray(components[np.argsort(values)[::-1]])
