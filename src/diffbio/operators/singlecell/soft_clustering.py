"""Soft k-means: cluster memberships that have a gradient."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import DataError
from ...math.distances import squared_euclidean
from ..base import Config, Data, Operator, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftClusteringConfig(Config):
    """Settings of `SoftKMeansClustering`.

    n_clusters: number of centroids.
    n_features: width of the embedding.
    temperature: in units of squared embedding distance; 0+ is hard k-means.
    learnable_centroids: False keeps the centroids out of the gradient, as `init_from` left them.
    """

    n_clusters: int = positive(10)
    n_features: int = positive(50)
    temperature: float = positive(1.0)
    learnable_centroids: bool = True


class Clusters(TypedDict):
    """What `SoftKMeansClustering` adds."""

    cluster_assignments: Float[Array, "cells clusters"]  # rows sum to 1
    cluster_labels: Int[Array, " cells"]  # the nearest centroid, argmax of the row
    centroids: Float[Array, "clusters features"]


class SoftKMeansClustering(Operator):
    """Assigns cell i to cluster k with weight softmax_k(-|x_i - c_k|² / T).

    As T -> 0 this is the nearest-centroid rule of Lloyd (1982), and a minimum of `objective` is a fixed
    point of Lloyd's rounds. Gradients flow to the embeddings and, unless `learnable_centroids=False`, to
    the centroids. `init_from` starts from data: the best of ten k-means++ starts (Arthur & Vassilvitskii
    2007), each followed by Lloyd's rounds to convergence.
    """

    config: SoftClusteringConfig
    init_cells: ClassVar[int | None] = 50_000
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 1024, "learning_rate": 1e-3, "max_epochs": 100}

    def __init__(self, config: SoftClusteringConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        start = jax.random.normal(rngs.params(), (config.n_clusters, config.n_features))
        self.centroids = nnx.Param(start) if config.learnable_centroids else nnx.BatchStat(start)
        # one draw per operator: `init_from` on the same data repeats itself, another seed starts elsewhere
        self.start_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        self.fitted = False

    def __call__(self, embeddings: Float[Array, "cells features"]) -> Clusters:
        """Memberships of the cells in the clusters, and the nearest centroid of each."""
        distance = self._distance(embeddings)
        return {
            "cluster_assignments": jax.nn.softmax(-distance / self.config.temperature, axis=-1),
            "cluster_labels": jnp.argmin(distance, axis=-1),
            "centroids": jnp.asarray(self.centroids[...], embeddings.dtype),
        }

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Mean over cells of the free energy -T log Σ_k exp(-|x_i - c_k|² / T).

        Its minimiser over memberships is the soft assignment (Rose 1998, deterministic annealing); as
        T -> 0 it is the k-means inertia per cell, which `metrics["inertia"]` reports at any T.
        """
        distance = self._distance(self._inputs(data)["embeddings"])
        temperature = self.config.temperature
        loss = -temperature * jax.nn.logsumexp(-distance / temperature, axis=-1).mean()
        return loss, {"inertia": distance.min(axis=-1).mean()}

    def init_from(self, data: Data) -> None:
        """Puts the centroids where k-means ends on `data["embeddings"]`.

        Raises:
            DataError: fewer cells, or fewer different cells, than clusters; or values that are not finite.
        """
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        cells = np.asarray(self._inputs(data)["embeddings"])
        n_clusters = self.config.n_clusters
        if not np.isfinite(cells).all():
            row = int(np.flatnonzero(~np.isfinite(cells).all(axis=1))[0])
            msg = f"SoftKMeansClustering: data['embeddings'] holds NaN or infinity, first in row {row}."
            raise DataError(msg)
        if len(cells) < n_clusters:
            msg = (
                f"SoftKMeansClustering: n_clusters is {n_clusters}, but data['embeddings'] has only "
                f"{len(cells)} cells; pass n_clusters={len(cells)} or fewer."
            )
            raise DataError(msg)
        kmeans = KMeans(n_clusters, n_init=10, random_state=int(self.start_seed[...]))
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                found = kmeans.fit(cells).cluster_centers_
            except ConvergenceWarning as warning:
                distinct = len(np.unique(cells, axis=0))
                msg = (
                    f"SoftKMeansClustering: n_clusters is {n_clusters}, but data['embeddings'] has only "
                    f"{distinct} different cells; pass n_clusters={distinct} or fewer."
                )
                raise DataError(msg) from warning
        self.centroids[...] = jnp.asarray(found, self.centroids[...].dtype)
        self.fitted = True

    def _distance(self, embeddings: Float[Array, "cells features"]) -> Float[Array, "cells clusters"]:
        return squared_euclidean(embeddings, jnp.asarray(self.centroids[...], embeddings.dtype))

    @classmethod
    def examples(cls) -> dict[str, tuple["SoftKMeansClustering", Data]]:
        """Learned centroids as they are born, and fixed ones from k-means."""

        def op(**settings: Any) -> SoftKMeansClustering:
            return cls(SoftClusteringConfig(n_clusters=3, n_features=4, **settings), rngs=nnx.Rngs(0))

        data = {"embeddings": jax.random.normal(jax.random.key(1), (12, 4))}
        fixed = op(learnable_centroids=False, temperature=0.3)
        fixed.init_from(data)
        return {"learned": (op(), data), "fixed, from data": (fixed, data)}
