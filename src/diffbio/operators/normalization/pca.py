"""Principal components as operators: exact, and by products with the data only."""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ...errors import DataError
from ...math.principal import bounded_eigh, principal_components
from ..base import Config, Data, Operator, checked_finite, nonnegative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCAConfig(Config):
    """Settings of `DifferentiablePCA`.

    n_components: at most the number of cells and that of features.
    """

    n_components: int = positive(50)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixFreePCAConfig(Config):
    """Settings of `MatrixFreePCA`.

    n_components: at most the number of cells and that of features.
    n_iterations: rounds of subspace iteration; more separate close components better.
    oversampling: directions carried along beside the components.
    """

    n_components: int = positive(50)
    n_iterations: int = nonnegative(4)
    oversampling: int = nonnegative(10)


class Components(TypedDict):
    """What both add; the sign of each component is such that its largest loading is positive.

    n cells have n - 1 directions: with n_components = n, the last component has no variance.
    """

    pca: Float[Array, "cells components"]  # scores of the cells
    # largest variance first; rows of components with variance are orthonormal, those without may be zero
    pca_components: Float[Array, "components features"]
    explained_variance: Float[Array, " components"]  # of the scores, with n - 1


class DifferentiablePCA(Operator):
    """Principal components of the cells, with a gradient that stays bounded where two variances meet.

    Equal to scikit-learn's PCA up to the signs. The gradient is that of the eigendecomposition with each
    1 / (l_j - l_i) broadened; see `math.principal.bounded_eigh`. Cost n g min(n, g).
    """

    config: PCAConfig

    def __init__(self, config: PCAConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing random
        self.config = config

    def __call__(self, features: Float[Array, "cells features"]) -> Components:
        """The components of these cells."""
        width = _checked(features, self.config.n_components, "DifferentiablePCA")
        found = principal_components(features, width)
        return {"pca": found.scores, "pca_components": found.components, "explained_variance": found.variance}

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiablePCA", Data]]:
        """Three components of six features."""
        return {"pca": (cls(PCAConfig(n_components=3), rngs=nnx.Rngs(0)), {"features": _cells()})}


class MatrixFreePCA(Operator):
    """Leading principal components by randomized subspace iteration (Halko, Martinsson & Tropp 2011, alg. 4.4, 5.1).

    Only products with the data, cost n g (components + oversampling) per round, and no matrix of genes by genes; the
    centred data are never made. Equal to the exact components where n_iterations separates the spectrum. Every step
    has a gradient: orthonormal bases come from Cholesky factors, and the small eigenproblem's gradient is bounded.
    """

    config: MatrixFreePCAConfig

    def __init__(self, config: MatrixFreePCAConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # drawn once: an operator repeats itself, another seed starts elsewhere
        self.start_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))

    def __call__(self, features: Float[Array, "cells features"]) -> Components:
        """The components of these cells."""
        n, width = features.shape
        k = _checked(features, self.config.n_components, "MatrixFreePCA")
        rank = min(k + self.config.oversampling, n, width)
        mean = features.mean(axis=0)
        basis = jax.random.normal(jax.random.key(self.start_seed[...]), (width, rank), features.dtype)
        for _ in range(self.config.n_iterations + 1):
            basis = _orthonormal(_transposed(features, mean, _product(features, mean, basis)))
        scores = _product(features, mean, basis)
        values, turn = bounded_eigh(scores.T @ scores / max(n - 1, 1))
        values, turn = values[::-1][:k], turn[:, ::-1][:, :k]
        components = (basis @ turn).T
        largest = jnp.take_along_axis(components, jnp.abs(components).argmax(axis=1)[:, None], axis=1)
        components = components * jnp.where(largest < 0, -1.0, 1.0)
        return {
            "pca": _product(features, mean, components.T),
            "pca_components": components,
            "explained_variance": jnp.maximum(values, 0.0),
        }

    @classmethod
    def examples(cls) -> dict[str, tuple["MatrixFreePCA", Data]]:
        """Two components of six features, one direction more carried along."""
        config = MatrixFreePCAConfig(n_components=2, oversampling=1, n_iterations=2)
        return {"randomized": (cls(config, rngs=nnx.Rngs(0)), {"features": _cells()})}


def _checked(features: Any, n_components: int, who: str) -> int:
    most = min(features.shape)
    if n_components > most:
        msg = (
            f"{who}: n_components is {n_components}, but data['features'] has {features.shape[0]} cells and "
            f"{features.shape[1]} features; pass n_components={most} or fewer."
        )
        raise DataError(msg)
    checked_finite(who, features, key="features")
    return n_components


def _product(x: Array, mean: Array, right: Array) -> Array:
    """(x - mean) right, without centring x in memory."""
    return x @ right - mean @ right


def _transposed(x: Array, mean: Array, left: Array) -> Array:
    """(x - mean)ᵀ left."""
    return x.T @ left - jnp.outer(mean, left.sum(axis=0))


def _orthonormal(columns: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """An orthonormal basis of the columns' span by two Cholesky factors (CholeskyQR2); no direction is lost to zeros.

    The gradient of a QR decomposition has no value for dependent columns; that of a Cholesky factor with a little
    added to its diagonal has.
    """
    for _ in range(2):
        squares = (columns**2).sum(axis=0)
        some = squares > jnp.finfo(columns.dtype).tiny * 1e6
        columns = columns / jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 1.0)
        gram = columns.T @ columns
        ridge = 10 * jnp.finfo(columns.dtype).eps * gram.shape[0]
        factor = jnp.linalg.cholesky(gram + ridge * jnp.eye(gram.shape[0], dtype=columns.dtype))
        columns = jax.scipy.linalg.solve_triangular(factor, columns.T, lower=True).T
    return columns


def _cells() -> Array:
    return jax.random.normal(jax.random.key(0), (12, 6)) * jnp.array([3.0, 2.5, 1.8, 1.2, 0.8, 0.5])
