"""Leading eigenvectors of a sparse symmetric matrix, with a gradient that is right also where eigenvalues meet.

ARPACK finds them on the host in double precision. The gradient has two parts. Among the k vectors that were found,
perturbation theory gives 1 / (l_b - l_a), and for what does not change when vectors of one eigenvalue are rotated the
divided difference (f(l_b) - f(l_a)) / (l_b - l_a), which has the limit f' (Daleckii and Krein 1965). Towards all other
vectors, which were not found, it is the solution of (l_b - T) z = r, by conjugate gradients on their span, where
l_b - T is definite because the eigenvalues that were found are the largest by magnitude.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import sparse
from scipy.sparse.linalg import eigsh

from ..errors import ConfigError
from .callbacks import on_host
from .graph import Edges

STATIONARY = 0.9994  # an eigenvalue at or above counts as 1, as in scanpy's dpt
DENSE_UP_TO = 300  # cells of which all eigenvectors are computed: there ARPACK gains nothing
LEAST_GAP = 1e-6  # of eigenvalues; gradients of single vectors are bounded by its inverse
LEAST_SHIFT = 1e-8  # keeps l_b - T definite where the last eigenvalue found and the first one not found are equal
LEAST_SCALE = 1e-6
SINGLE_PRECISION = 1e-10  # relative error of eigenvalues that float32 does not show
MOST_STEPS = 5000  # of conjugate gradients


class Spectrum(NamedTuple):
    """Eigenvectors of the k eigenvalues of largest magnitude, the largest value first."""

    gaps: Float[Array, " components"]  # 1 - eigenvalue, exact also where that is near 1
    vectors: Float[Array, "cells components"]  # of length 1; the entry of largest magnitude is positive
    scaled: Float[Array, "cells components"]  # vectors times l / (1 - l), or times 1 where l >= 0.9994
    parts: Int[Array, " cells"]  # number of each cell's connected part of the graph


def spectrum(edges: Edges, n_cells: int, n_components: int) -> Spectrum:
    """The leading eigenpairs of a symmetric matrix with eigenvalues in [-1, 1], such as D^-1/2 K D^-1/2.

    Differentiable in the weights; see the module. Functions of `scaled` that are the same for any rotation of the
    vectors of one eigenvalue, such as distances between its rows, have their true gradient also where eigenvalues are
    exactly equal. Those of a single vector, which is then arbitrary, have a bounded one: 1 / d becomes
    d / (d² + 1e-12). Which eigenvalues count as 1, and which are the k largest, are discrete choices outside the
    gradient. Cost: some hundred products of the matrix and a vector; n³ up to 300 cells.

    Args:
        edges: of the matrix; of pairs that are not symmetric the mean counts.
        n_cells: rows of the matrix.
        n_components: eigenvectors, at most n_cells.

    Raises:
        ConfigError: n_components is out of range.
    """
    if not 1 <= n_components <= n_cells:
        msg = f"spectrum: n_components must be from 1 to {n_cells} for {n_cells} cells, got {n_components}."
        raise ConfigError(msg)
    gaps, vectors, scaled, parts = _spectrum(edges.weights, edges.rows, edges.columns, n_cells, n_components)
    # an integer that a custom gradient gives back still counts as having one; what was stopped as a float does not
    parts = jax.lax.stop_gradient(parts.astype(jnp.float32)).astype(jnp.int32)
    return Spectrum(gaps, vectors, scaled, parts)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _spectrum(
    weights: jax.Array, rows: jax.Array, columns: jax.Array, n: int, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    dtype = weights.dtype
    shapes = (
        jax.ShapeDtypeStruct((k,), dtype),
        jax.ShapeDtypeStruct((n, k), dtype),
        jax.ShapeDtypeStruct((n, k), dtype),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )
    found: tuple[jax.Array, ...] = on_host(partial(_decomposed, n=n, k=k), shapes, rows, columns, weights)
    return found[0], found[1], found[2], found[3]


Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(weights: jax.Array, rows: jax.Array, columns: jax.Array, n: int, k: int) -> tuple[Any, Kept]:
    found = _spectrum(weights, rows, columns, n, k)
    return found, (weights, rows, columns, found[0], found[1])


def _backward(n: int, k: int, kept: Kept, cotangents: Any) -> tuple[jax.Array, None, None]:
    weights = kept[0]
    shape = jax.ShapeDtypeStruct(weights.shape, weights.dtype)
    precise = 1e-11 if weights.dtype == jnp.float64 else 1e-6
    pulled = partial(_pulled_back, n=n, tolerance=precise)
    return on_host(pulled, shape, *kept, *cotangents[:3]), None, None


_spectrum.defvjp(_forward, _backward)


def symmetric_matrix(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, n: int) -> Any:
    """The mean of a listed matrix and its transpose as scipy CSR, in double precision."""
    matrix = sparse.csr_array((weights.astype(np.float64), (rows, columns)), shape=(n, n))
    return sparse.csr_array((matrix + matrix.T) * 0.5)


def scale_of(gaps: np.ndarray) -> np.ndarray:
    """L / (1 - l), the sum of all powers of an eigenvalue from the first; 1 where it counts as stationary."""
    moves = gaps > 1 - STATIONARY
    return np.where(moves, (1 - gaps) / np.where(moves, gaps, 1.0), 1.0)


def _decomposed(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, *, n: int, k: int
) -> tuple[np.ndarray, ...]:
    matrix = symmetric_matrix(rows, columns, weights, n)
    if n <= DENSE_UP_TO or k >= n:
        values, vectors = np.linalg.eigh(matrix.toarray())
        largest = np.sort(np.argsort(-np.abs(values), kind="stable")[:k])
        values, vectors = values[largest], vectors[:, largest]
    else:
        start = np.random.default_rng(0).standard_normal(n)
        precise = 0.0 if weights.dtype == np.float64 else SINGLE_PRECISION
        values, vectors = eigsh(matrix, k=k, which="LM", v0=start, tol=precise)
        order = np.argsort(values, kind="stable")
        values, vectors = values[order], vectors[:, order]
    values, vectors = values[::-1], vectors[:, ::-1]
    top = vectors[np.abs(vectors).argmax(axis=0), np.arange(k)]
    vectors = vectors * np.where(top < 0, -1.0, 1.0)
    gaps = 1.0 - values
    parts = sparse.csgraph.connected_components(matrix, directed=False)[1]
    return gaps, vectors, vectors * scale_of(gaps), parts


def _pulled_back(
    weights: np.ndarray, rows: np.ndarray, columns: np.ndarray, gaps: np.ndarray, vectors: np.ndarray,
    of_gaps: np.ndarray, of_vectors: np.ndarray, of_scaled: np.ndarray, *, n: int, tolerance: float,
) -> np.ndarray:  # fmt: skip
    """Gradient with respect to every listed weight."""
    gaps, vectors, of_gaps, of_vectors, of_scaled = (
        np.asarray(a, np.float64) for a in (gaps, vectors, of_gaps, of_vectors, of_scaled)
    )
    scale = scale_of(gaps)
    inner = _among_vectors(np.ones_like(scale), np.zeros((len(gaps),) * 2), gaps, vectors.T @ of_vectors)
    inner = inner + _among_vectors(scale, _divided(gaps, scale), gaps, vectors.T @ of_scaled) - np.diag(of_gaps)
    towards = of_vectors + of_scaled * scale
    towards = towards - vectors @ (vectors.T @ towards)
    left = vectors @ inner
    if n > len(gaps) and np.abs(towards).max() > 0:
        matrix = symmetric_matrix(rows, columns, weights, n)
        left = left + _towards_the_rest(matrix, 1.0 - gaps, vectors, towards, tolerance)
    found = np.empty(len(weights))
    for first in range(0, len(weights), 1 << 20):  # a block of edges at a time
        i, j = rows[first : first + (1 << 20)], columns[first : first + (1 << 20)]
        found[first : first + (1 << 20)] = np.einsum("ek,ek->e", left[i], vectors[j])
        found[first : first + (1 << 20)] += np.einsum("ek,ek->e", left[j], vectors[i])
    return found / 2


def _divided(gaps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Divided differences of f = scale² over all pairs of eigenvalues, f' on the diagonal, without cancellation."""
    moves = gaps > 1 - STATIONARY
    both = moves[:, None] & moves[None, :]
    product = np.where(both, gaps[:, None] * gaps[None, :], 1.0)  # of g itself: 1 / (gap_a gap_b)
    exact = (scale[:, None] + scale[None, :]) / product
    apart = gaps[:, None] - gaps[None, :]  # l_b - l_a
    mixed = moves[:, None] != moves[None, :]
    plain = (scale[None, :] ** 2 - scale[:, None] ** 2) / np.where(mixed, apart, 1.0)
    return np.where(both, exact, np.where(mixed, plain, 0.0))


def _among_vectors(scale: np.ndarray, divided: np.ndarray, gaps: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """The gradient in the basis of the vectors, for outputs vectors * scale; `overlap` is vectorsᵀ cotangent.

    x = overlap_ab, y = overlap_ba. For a function of vectors scale² vectorsᵀ alone, x / scale_b = y / scale_a: this
    part takes the divided difference, what is left the bounded 1 / (l_b - l_a).
    """
    apart = gaps[:, None] - gaps[None, :]
    inverse = apart / (apart**2 + LEAST_GAP**2)
    usable = np.abs(scale) > LEAST_SCALE
    safe = np.where(usable, scale, 1.0)
    x, y = overlap / safe[None, :], overlap.T / safe[:, None]
    square = scale**2
    found = (x + y) / 4 * divided + (x - y) / 4 * (square[:, None] + square[None, :]) * inverse
    plain = (overlap * scale[None, :] - overlap.T * scale[:, None]) / 2 * inverse
    return np.where(usable[:, None] & usable[None, :], found, plain)


def _towards_the_rest(
    matrix: Any, values: np.ndarray, vectors: np.ndarray, wanted: np.ndarray, tolerance: float
) -> np.ndarray:
    """Solves (l_b - T) z_b = r_b for every column, orthogonal to all `vectors`, by conjugate gradients."""
    sign = np.where(values < 0, -1.0, 1.0)
    size = np.linalg.norm(wanted, axis=0)
    z = np.zeros_like(wanted)
    open_ = np.flatnonzero(size > 0)
    residual = (sign * wanted)[:, open_]
    direction = residual.copy()
    square = (residual**2).sum(axis=0)
    for _ in range(MOST_STEPS):
        if not len(open_):
            break
        shift = np.abs(values[open_]) + LEAST_SHIFT
        image = direction * shift - (matrix @ direction) * sign[open_]
        image -= vectors @ (vectors.T @ image)
        curvature = (direction * image).sum(axis=0)
        step = np.where(curvature > 0, square / np.where(curvature > 0, curvature, 1.0), 0.0)
        z[:, open_] += step * direction
        residual = residual - step * image
        after = (residual**2).sum(axis=0)
        going = (np.sqrt(after) > tolerance * size[open_]) & (step > 0)
        direction = (residual + after / square * direction)[:, going]
        residual, square, open_ = residual[:, going], after[going], open_[going]
    return z
