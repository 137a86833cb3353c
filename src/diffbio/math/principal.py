"""Principal components on the device, differentiable also where eigenvalues meet."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..errors import ConfigError

ROWS_PER_BLOCK = 4096  # centred at once, so that no second array of the size of the data is made


class Principal(NamedTuple):
    """Scores = (x - mean) @ components.T; rows of `components` are orthonormal, largest variance first."""

    scores: Float[Array, "cells components"]
    components: Float[Array, "components features"]
    mean: Float[Array, " features"]
    variance: Float[Array, " components"]  # of the scores, with n - 1 in the denominator


def principal_components(x: Float[Array, "cells features"], n_components: int, *, gap_eps: float = 1e-6) -> Principal:
    """Finds the directions of largest variance of the rows of `x`; exact, differentiable, inside jit too.

    From the covariance of the features, or where there are fewer cells from the products of the cells. Cost
    n g min(n, g) and an eigenproblem of size min(n, g). The sign of each component is such that its largest loading
    is positive. Directions of no variance are zero where the cells are fewer than the features.

    Args:
        x: dense.
        n_components: at most min(cells, features).
        gap_eps: see `bounded_eigh`.

    Raises:
        ConfigError: n_components is out of range.
    """
    n, width = x.shape
    if not 1 <= n_components <= min(n, width):
        msg = f"principal_components: n_components must be from 1 to {min(n, width)} for {n} cells x {width} "
        msg += f"features, got {n_components}."
        raise ConfigError(msg)
    mean = x.mean(axis=0)
    scale = max(n - 1, 1)
    if n < width:
        centred = x - mean
        values, vectors = bounded_eigh(centred @ centred.T / scale, gap_eps)
        values, vectors = values[::-1][:n_components], vectors[:, ::-1][:, :n_components]
        # a direction that is rounding alone would be divided by nearly 0
        real = values > jnp.finfo(x.dtype).eps * n * jnp.maximum(values[0], jnp.finfo(x.dtype).tiny)
        length = jnp.sqrt(jnp.where(real, values, 1.0) * scale)
        components = jnp.where(real, (centred.T @ vectors) / length, 0.0).T
    else:
        values, vectors = bounded_eigh(_scatter(x, mean) / scale, gap_eps)
        values, components = values[::-1][:n_components], vectors[:, ::-1][:, :n_components].T
    largest = jnp.take_along_axis(components, jnp.abs(components).argmax(axis=1)[:, None], axis=1)
    components = components * jnp.where(largest < 0, -1.0, 1.0)
    scores = x @ components.T - mean @ components.T
    return Principal(scores, components, mean, jnp.maximum(values, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded_eigh(
    symmetric: Float[Array, "size size"], gap_eps: float = 1e-6
) -> tuple[Float[Array, " size"], Float[Array, "size size"]]:
    """Eigenvalues, smallest first, and eigenvectors in columns of a symmetric matrix; its gradient is bounded.

    The gradient of eigenvectors holds 1 / (l_j - l_i), without bound where eigenvalues meet. It becomes
    d / (d² + e²) with d = l_j - l_i and e = gap_eps times the largest eigenvalue (the Lorentzian broadening of Liao
    et al. 2019, Differentiable programming tensor networks, Phys. Rev. X 9:031041): the same away from ties, and 0 at
    a tie, where a function of the subspace has no such part at all.
    """
    values, vectors = jnp.linalg.eigh(symmetric)
    return values, vectors


Eigen = tuple[jax.Array, jax.Array]


def _forward(symmetric: jax.Array, gap_eps: float) -> tuple[Eigen, Eigen]:
    found = bounded_eigh(symmetric, gap_eps)
    return found, found


def _backward(gap_eps: float, found: Eigen, cotangents: Eigen) -> tuple[jax.Array]:
    values, vectors = found
    of_values, of_vectors = cotangents
    gap = values[None, :] - values[:, None]
    floor = jnp.maximum(gap_eps * jnp.abs(values).max(), jnp.sqrt(jnp.finfo(values.dtype).tiny))  # all may be 0
    # divided before squaring: the squares of small gaps underflow
    share = gap / floor
    inverse = share / (share**2 + 1.0) / floor
    inner = jnp.diag(of_values) + inverse * (vectors.T @ of_vectors)
    grad = vectors @ inner @ vectors.T
    return ((grad + grad.T) / 2,)


bounded_eigh.defvjp(_forward, _backward)


def _scatter(x: Float[Array, "cells features"], mean: Float[Array, " features"]) -> Float[Array, "features features"]:
    """Sum of (x_i - mean)(x_i - mean)ᵀ over the cells, block by block."""
    n, width = x.shape
    whole = n // ROWS_PER_BLOCK
    total = jnp.zeros((width, width), x.dtype)
    if whole:

        def step(total: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
            centred = rows - mean
            return total + centred.T @ centred, None

        blocks = x[: whole * ROWS_PER_BLOCK].reshape(whole, ROWS_PER_BLOCK, width)
        total, _ = jax.lax.scan(jax.checkpoint(step), total, blocks)
    rest = x[whole * ROWS_PER_BLOCK :] - mean
    return total + rest.T @ rest
