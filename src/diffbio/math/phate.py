"""PHATE's steps: alpha-decay kernel, landmarks, entropy of diffusion and its knee, potential and its distances."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from scipy import sparse

from .distances import squared_euclidean
from .metrics import pairwise
from .neighbors import knn

LEAST_AFFINITY = 1e-4  # weaker ones are none, as graphtools' `thresh`
SMALLEST_PROBABILITY = 1e-7  # added before the logarithm, phate's
SMALLEST_SHARE = 2.2e-16  # of a singular value, before its logarithm
LONGEST_DIFFUSION = 100  # phate's t_max
MOST_NEIGHBORS = 500  # of a cell in a sparse kernel
SPECTRAL_COMPONENTS = 100
KMEANS_BATCH = 10_000


def alpha_decay(
    distances: Float[Array, "cells others"], bandwidth: Float[Array, "cells 1"], decay: float
) -> Float[Array, "cells others"]:
    """exp(-(d_ij / s_i)^decay), and 0 where that is below 1e-4 (Moon et al. 2019).

    A cell with s_i = 0 has weight 1 to its duplicates and 0 to all others, the limit of a small s_i.
    """
    positive = bandwidth > 0
    ratio = distances / jnp.where(positive, bandwidth, 1.0)
    near = positive & (ratio > 0) & (ratio < reach(decay))
    # a large ratio to the power of 40 overflows, and its gradient with it
    affinity = jnp.exp(-(jnp.where(near, ratio, 1.0) ** decay))
    return jnp.where(near, affinity, jnp.where(distances > 0, 0.0, 1.0))


def reach(decay: float) -> float:
    """Distance, in bandwidths, at which the affinity falls to 1e-4."""
    return float((-np.log(LEAST_AFFINITY)) ** (1.0 / decay))


@partial(jax.jit, static_argnames=("k", "decay", "metric"))
def dense_kernel(
    x: Float[Array, "cells features"], k: int, decay: float, metric: str = "euclidean"
) -> Float[Array, "cells _cells"]:
    """(A + Aᵀ) / 2 with A the alpha-decay affinities, bandwidths the distances to the k-th nearest other cell."""
    distances = pairwise(x, metric)
    affinity = alpha_decay(distances, jnp.sort(distances, axis=1)[:, k : k + 1], decay)
    return (affinity + affinity.T) / 2


def sparse_kernel(x: Float[np.ndarray, "cells features"], k: int, decay: float, metric: str = "euclidean") -> Any:
    """`dense_kernel` as a scipy CSR array, of many cells, on the host; only affinities that are not 0 are kept.

    Neighbours are searched until the affinity of the farthest is 0, at most 500: a small decay (below 2, say) reaches
    farther, and loses what lies beyond. Cost n k · features beside the search.
    """
    n = len(x)
    found = min(n - 1, 3 * k)
    indices, distances = knn(x, found, metric=metric)
    bandwidth = distances[:, k - 1]
    rows, columns, values = [np.arange(n)], [np.arange(n)], [np.ones(n)]
    left = np.arange(n)
    while len(left):
        own = bandwidth[left, None]
        affinity = np.asarray(alpha_decay(jnp.asarray(distances), jnp.asarray(own), decay), float)
        short = (affinity[:, -1] > 0) & (found < min(n - 1, MOST_NEIGHBORS))
        row, place = np.nonzero(np.where(short[:, None], 0.0, affinity))
        rows.append(left[row])
        columns.append(indices[row, place])
        values.append(affinity[row, place])
        left = left[short]
        if len(left):
            found = min(n - 1, MOST_NEIGHBORS, 4 * found)
            indices, distances = _others(x, left, found, metric)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    directed = sparse.csr_array(sparse.coo_array(entries, shape=(n, n)))
    return sparse.csr_array((directed + directed.T) / 2)


def _others(x: np.ndarray, rows: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of some cells, themselves excluded."""
    indices, distances = knn(x, k + 1, metric=metric, queries=x[rows])
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True  # crowded out by duplicates
    return indices[~own].reshape(len(rows), k), distances[~own].reshape(len(rows), k)


def landmark_labels(kernel: Any, n_landmarks: int, *, seed: int = 0) -> Int[np.ndarray, " cells"]:
    """Number of the landmark of each cell: spectral clusters of a sparse symmetric kernel, as in graphtools.

    K-means of P V, with V the leading 100 singular vectors of the kernel divided by the roots of its sums. Some
    clusters come out empty and are left out: there are n_landmarks at most. Depends on the order of the cells: pass
    them in one that does not.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils.extmath import randomized_svd

    n = kernel.shape[0]
    total = kernel.sum(axis=1)
    halves = sparse.diags_array(1.0 / np.sqrt(total))
    width = min(SPECTRAL_COMPONENTS, n - 1)
    vectors = randomized_svd(sparse.csr_matrix(halves @ kernel @ halves), width, random_state=seed)[2].T
    points = (kernel @ vectors) / total[:, None]
    rounds = int(np.clip(100 * KMEANS_BATCH / n, 5, 100))  # over all cells
    kmeans = MiniBatchKMeans(
        n_landmarks, init="random", n_init=1, batch_size=KMEANS_BATCH, max_iter=rounds, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different cells than landmarks
        labels = kmeans.fit_predict(points.astype(np.float32))
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def nearest_of_some(
    points: Float[Array, "cells coordinates"], n_landmarks: int, key: Key[Array, ""]
) -> Int[Array, " cells"]:
    """Number of the landmark of each cell: the nearest of random cells, each of which is its own. Inside jit too."""
    chosen = jax.random.permutation(key, len(points))[:n_landmarks]
    labels = squared_euclidean(points, points[chosen]).argmin(axis=1)
    return labels.at[chosen].set(jnp.arange(n_landmarks))  # also among duplicates: no group is empty


def stochastic(weights: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """Rows divided by their sums."""
    total = weights.sum(axis=1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def von_neumann_entropy(
    operator: Float[Array, "points _points"], t_max: int = LONGEST_DIFFUSION
) -> Float[Array, " times"]:
    """Entropy of the singular values of P, normalised to sum 1, to the power t, at t = 1 ... t_max (phate 2.0.0)."""
    values = jax.lax.stop_gradient(jnp.linalg.svd(operator, compute_uv=False))
    values = values / jnp.where(values[0] > 0, values[0], 1.0)  # powers of it do not overflow
    powers = values ** jnp.arange(1, t_max + 1, dtype=values.dtype)[:, None]
    shares = powers / powers.sum(axis=1, keepdims=True) + SMALLEST_SHARE
    return -(shares * jnp.log(shares)).sum(axis=1)


def knee_point(curve: Float[Array, " times"]) -> Int[Array, ""]:
    """Index where two straight lines, fitted to the left and the right, leave the least absolute error (phate 2.0.0).

    Each line is of least squares. As in phate the right line is fitted to one point more than its error counts.
    """
    n = len(curve)
    x = jnp.arange(n, dtype=curve.dtype)
    # row b: the points up to b, or from b on
    upto = x[None, :] <= x[:, None]
    onward = x[None, :] >= x[:, None]
    left = jnp.abs(_line(x, curve, upto) - curve)
    right = jnp.abs(jnp.roll(_line(x, curve, onward), 1, axis=0) - curve)
    error = jnp.where(upto, left, 0.0).sum(axis=1) + jnp.where(onward, right, 0.0).sum(axis=1)
    return jnp.argmin(error[1 : n - 1]) + 1


def _line(x: jax.Array, y: jax.Array, of: jax.Array) -> jax.Array:
    """Least-squares line through the points of each row of a mask, at all x; constant through a single point."""
    count = of.sum(axis=1, keepdims=True)
    x_mean, y_mean = ((of * v).sum(axis=1, keepdims=True) / count for v in (x, y))
    centred = jnp.where(of, x - x_mean, 0.0)
    spread = (centred**2).sum(axis=1, keepdims=True)
    slope = (centred * (y - y_mean)).sum(axis=1, keepdims=True) / jnp.where(spread > 0, spread, 1.0)
    return y_mean + slope * (x - x_mean)


def matrix_power(operator: Float[Array, "points _points"], t: Int[Array, ""]) -> Float[Array, "points _points"]:
    """P^t for a whole number t from 0 to 127 that need not be known when the program is compiled, by squaring."""
    square, power = operator, jnp.eye(len(operator), dtype=operator.dtype)
    for bit in range(7):
        power = jax.lax.cond((t >> bit) & 1 == 1, _product, lambda power, _: power, power, square)
        # no bit is left: a square would be in vain
        square = jax.lax.cond(t >> (bit + 1) > 0, _product, lambda square, _: square, square, square)
    return power


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def potential(diffused: Float[Array, "points others"], gamma: float = 1.0) -> Float[Array, "points others"]:
    """-log(P^t + 1e-7) at gamma 1; else (P^t)^c / c with c = (1 - gamma) / 2, so that 0 is twice the square root.

    The informational distances of Moon et al. 2019, as in phate 2.0.0.
    """
    if gamma == 1:
        return -jnp.log(diffused + SMALLEST_PROBABILITY)
    c = (1 - gamma) / 2
    some = diffused > 0
    return jnp.where(some, jnp.where(some, diffused, 1.0) ** c, 0.0) / c


def potential_distances(potentials: Float[Array, "points others"]) -> Float[Array, "points _points"]:
    """Euclidean distances between rows of the potential: symmetric, 0 on the diagonal."""
    square = squared_euclidean(potentials, potentials)
    square = (square + square.T) / 2
    apart = (square > 0) & ~jnp.eye(len(square), dtype=bool)
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def mixture_distances(
    weights: Float[Array, "cells landmarks"], distances: Float[Array, "landmarks _landmarks"]
) -> Float[Array, "cells landmarks"]:
    """Distance of Σ_k w_k u_k to each u_j, from distances between the u_j and weights that sum to 1.

    |Σ_k w_k u_k - u_j|² = Σ_k w_k d_kj² - Σ_kl w_k w_l d_kl² / 2.
    """
    mixed = jnp.matmul(weights, distances**2, precision="highest")
    square = mixed - (mixed * weights).sum(axis=1, keepdims=True) / 2
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
