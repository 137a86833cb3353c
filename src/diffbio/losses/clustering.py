"""Losses on an embedding: how tight its clusters are, how well its batches mix."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..errors import ConfigError, DataError
from ..math.distances import safe_norm, squared_euclidean

PAIRS_PER_BLOCK = 1 << 22  # distances held at once by BatchMixingLoss


@dataclasses.dataclass(frozen=True)
class ClusteringCompactnessLoss:
    """Σ_k a_ik |x_i - c_k|², mean over cells, plus a penalty on pairs of centroids closer than a margin.

    The penalty is separation_weight times the mean over pairs of max(0, min_separation - |c_k - c_l|)².

    separation_weight: >= 0.
    min_separation: >= 0, in units of embedding distance.

    Raises:
        ConfigError: a setting is negative.
    """

    separation_weight: float = 1.0
    min_separation: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "separation_weight", self.separation_weight >= 0, ">= 0")
        _check(self, "min_separation", self.min_separation >= 0, ">= 0")

    def __call__(
        self,
        embeddings: Float[Array, "cells features"],
        assignments: Float[Array, "cells clusters"],
        centroids: Float[Array, "clusters features"] | None = None,
    ) -> Float[Array, ""]:
        """The loss for memberships whose rows sum to 1.

        centroids: None takes the mean of each cluster's cells, weighted by membership; a cluster without
            cells then takes no part in the separation.
        """
        mass = assignments.sum(axis=0)
        present = jnp.ones_like(mass, bool)
        if centroids is None:
            present = mass > 0
            total = jnp.matmul(assignments.T, embeddings, precision="highest")
            centroids = total / jnp.where(present, mass, 1)[:, None]
        within = (assignments * squared_euclidean(embeddings, centroids)).sum(axis=1).mean()
        one, other = np.triu_indices(len(centroids), k=1)
        if len(one) == 0:
            return within
        apart = safe_norm(centroids[one] - centroids[other])
        pairs = present[one] & present[other]
        close = jnp.where(pairs, jnp.maximum(self.min_separation - apart, 0) ** 2, 0)
        return within + self.separation_weight * close.sum() / jnp.maximum(pairs.sum(), 1)


@dataclasses.dataclass(frozen=True)
class BatchMixingLoss:
    """Minus the entropy of the batches among a cell's nearest neighbours, mean over cells: 0 apart, -1 mixed.

    A neighbour at squared distance d counts (1 - u / sqrt(1 + u²)) / 2, u = (d - edge) / (T · spread): a
    smooth step from 1 to 0 at the edge of the neighbourhood, between the k-th neighbour and the next;
    `spread` is how far, on average, the k neighbours lie inside it. As T -> 0 these are the shares of the k
    nearest neighbours, as in the entropy of batch mixing (Haghverdi et al. 2018). The step has a power-law
    tail and each cell sees the k nearest cells of every batch, so that batches far apart still attract one
    another. Which cells those are is discrete; their distances carry the gradient. The entropy is divided
    by log(n_batches).

    n_neighbors: k; more than there are other cells means all of them.
    n_batches: number of batches, at least 2; labels are 0 ... n_batches - 1.
    temperature: softness of the edge, in units of the spread of the neighbours' squared distances.

    Raises:
        ConfigError: a setting out of its range.
    """

    n_neighbors: int = 15
    n_batches: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "n_neighbors", self.n_neighbors >= 1, ">= 1")
        _check(self, "n_batches", self.n_batches >= 2, ">= 2")
        _check(self, "temperature", self.temperature > 0, "> 0")

    def __call__(
        self, embeddings: Float[Array, "cells features"], batch_labels: Int[Array, " cells"]
    ) -> Float[Array, ""]:
        """The loss, in [-1, 0]. Time grows as cells², memory as cells · n_neighbors · n_batches.

        Raises:
            DataError: fewer than two cells, or a label out of range (under `jax.jit` such a cell is no
                neighbour of any other).
        """
        n = len(embeddings)
        if n < 2:
            msg = f"BatchMixingLoss: a cell needs neighbours, but there is only {n} cell."
            raise DataError(msg)
        self._check_labels(batch_labels)
        entropy = _neighbor_entropy(
            embeddings,
            batch_labels,
            k=min(self.n_neighbors, n - 1),
            n_batches=self.n_batches,
            temperature=self.temperature,
            rows=max(1, min(n, PAIRS_PER_BLOCK // n)),
        )
        return -entropy.mean() / math.log(self.n_batches)

    def _check_labels(self, batch_labels: Array) -> None:
        if isinstance(batch_labels, jax.core.Tracer):
            return
        labels = np.asarray(batch_labels)
        if labels.max() >= self.n_batches or labels.min() < 0:
            odd = labels.max() if labels.max() >= self.n_batches else labels.min()
            msg = (
                f"BatchMixingLoss: batch_labels holds label {odd}, but n_batches is {self.n_batches}; "
                f"labels must be 0 ... n_batches - 1."
            )
            raise DataError(msg)


@partial(jax.jit, static_argnames=("k", "n_batches", "rows"))
def _neighbor_entropy(
    cells: Array, labels: Array, *, k: int, n_batches: int, temperature: float | Array, rows: int
) -> Array:
    """Entropy of the batches around every cell, in nats; `rows` cells at a time."""
    n = len(cells)

    def around(index: Array) -> Array:
        distance = squared_euclidean(cells[index], cells)
        distance = jnp.where(index[:, None] == jnp.arange(n), jnp.inf, distance)
        near = -jax.lax.top_k(-distance, k + 1)[0]
        last, beyond = near[:, k - 1 : k], near[:, k:]
        # no cell beyond where all others are neighbours: then the next is as far again
        edge = (last + jnp.where(jnp.isfinite(beyond), beyond, 2 * last)) / 2
        spread = (edge - near[:, :k]).mean(axis=1, keepdims=True)
        spread = jnp.where(spread > 0, spread, 1)  # duplicates: all neighbours at one distance

        def mass(batch: Array) -> Array:
            d = -jax.lax.top_k(-jnp.where(labels == batch, distance, jnp.inf), k)[0]
            there = jnp.isfinite(d)
            u = (jnp.where(there, d, 0) - edge) / (temperature * spread)
            root = jnp.sqrt(1 + u**2)
            # far outside, where 1 and u / root cancel: (root - u) (root + u) = 1
            outside, inside = 1 / (root * (root + jnp.abs(u))), 1 - u / root
            return jnp.where(there, jnp.where(u > 0, outside, inside) / 2, 0).sum(axis=1)

        masses = jax.lax.map(mass, jnp.arange(n_batches))  # (batches, rows)
        total = masses.sum(axis=0)
        share = masses / jnp.where(total > 0, total, 1)
        return -(share * jnp.log(jnp.where(share > 0, share, 1))).sum(axis=0)

    index = jnp.arange(math.ceil(n / rows) * rows).reshape(-1, rows)
    # recomputed in the backward pass: a block of distances is never kept
    return jax.lax.map(jax.checkpoint(around), jnp.minimum(index, n - 1)).reshape(-1)[:n]


def _check(loss: object, name: str, holds: bool, wanted: str) -> None:  # noqa: FBT001
    if not holds:
        msg = f"{type(loss).__name__}: {name} must be {wanted}, got {getattr(loss, name)!r}."
        raise ConfigError(msg)
