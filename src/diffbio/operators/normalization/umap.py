"""Parametric UMAP: a network that embeds cells so that neighbours stay neighbours."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError
from ...math.distances import unit_rows
from ...math.graph import Edges, find_ab_params, fuzzy_simplicial_set
from ...math.linalg import pca
from ...math.metrics import centred_rows
from ...math.neighbors import knn
from ..base import Config, Data, Operator, nonnegative, one_of, positive, setting

SOFTENING = 1e-3  # umap's: squared embedding distance below which repulsion stops growing
REPEATS = 4  # draws of the random pairs in each step: noise halves, and only 2-d distances are computed anew
START_WIDTH = 3.0  # of the first coordinate before training, in units of spread: about a third of the final
MOST_STEPS, FEWEST_STEPS = 50, 10  # of an epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMAPConfig(Config):
    """Settings of DifferentiableUMAP.

    input_features: width of `features`.
    n_components: dimensions of the embedding.
    n_neighbors: cells in a neighbourhood, the cell itself counted, as in umap-learn; more keep coarser
        structure.
    min_dist: embedding distance below which neighbours are not pulled closer.
    spread: scale of the embedding; at least min_dist.
    metric: "euclidean", "cosine", "correlation" or "manhattan" distance between the cells' features.
    hidden_dim: width of the network's layers.
    n_layers: how many hidden layers; 0 is a linear map.
    n_negatives: weight of the random pairs pushed apart against the pairs of neighbours pulled together.
    jitter: in training each cell of a pair moves in a random direction, by this fraction of the distance to
        the other: a smoother map that places new cells better.
    """

    input_features: int = positive(50)
    n_components: int = positive(2)
    n_neighbors: int = setting(15, ">= 2", lambda v: v >= 2)
    min_dist: float = nonnegative(0.1)
    spread: float = positive(1.0)
    metric: str = one_of("euclidean", "cosine", "correlation", "manhattan")
    hidden_dim: int = positive(100)
    n_layers: int = nonnegative(3)
    n_negatives: int = positive(5)
    jitter: float = nonnegative(0.4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_dist > self.spread:
            msg = f"UMAPConfig.min_dist must be at most spread ({self.spread}), got {self.min_dist}."
            raise ConfigError(msg)

    @property
    def n_features(self) -> int:
        """The size of the axis `features`, under the name that messages use."""
        return self.input_features


class UMAPOutput(TypedDict):
    """embedding: coordinates of each cell."""

    embedding: Float[Array, "cells components"]


class DifferentiableUMAP(Operator):
    """Embeds cells by a network trained on the cross entropy of fuzzy neighbour graphs (parametric UMAP).

    McInnes et al. 2018 for graph and loss, Sainburg et al. 2021 for the network. Which cells are neighbours
    and their weights come once from all the training data, outside the gradient; minibatches of edges, drawn
    by weight, and random pairs train the network, which then embeds new cells too. In place of a spectral
    layout the network is a linear map plus a correction, and the linear map starts from the principal
    components, so that the arrangement of distant groups starts from the data.
    """

    config: UMAPConfig
    batches_by_place = True  # heads, then tails
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 100, "batch_size": 2048, "learning_rate": 8e-3, "validation": 0.0,
    }

    def __init__(self, config: UMAPConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.a, self.b = find_ab_params(config.spread, config.min_dist)
        self.center = nnx.BatchStat(jnp.zeros(config.input_features))
        self.scale = nnx.BatchStat(jnp.ones(()))
        widths = [config.input_features] + [config.hidden_dim] * config.n_layers
        self.layers = nnx.List(
            [nnx.Linear(before, after, rngs=rngs) for before, after in itertools.pairwise(widths)]
        )
        # small, so that the map starts from the linear part
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        self.head = nnx.Linear(widths[-1], config.n_components, kernel_init=small, rngs=rngs)
        self.linear = nnx.Linear(config.input_features, config.n_components, use_bias=False, rngs=rngs)
        self.noise = rngs.noise.fork()

    def __call__(self, features: Float[Array, "cells features"]) -> UMAPOutput:
        """features: such as principal components, on the scale of those that the operator was fitted to."""
        x = self._standardised(features)
        h = x
        for layer in self.layers:
            h = jax.nn.silu(layer(h))
        return {"embedding": self.linear(x) + self.head(h)}

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Cross entropy of a batch whose first half are edges' heads and second half their tails.

        -log q(head, tail), plus n_negatives / 2 times the mean of -log(1 - q) over pairs of a head and
        another edge's tail, where q = 1 / (1 + a d^(2b)). Which pairs: random in train mode, fixed in eval
        mode. An odd last cell is left out.

        Raises:
            DataError: the batch holds fewer than two edges, so that there are no negatives.
        """
        x = self._inputs(data)["features"]
        n = len(x) // 2
        if n < 2:
            msg = f"DifferentiableUMAP: a batch needs at least 4 cells (2 heads, 2 tails), got {len(x)}."
            raise DataError(msg)
        x = self._jittered(x[: 2 * n]) if self.training else x[: 2 * n]
        heads, tails = jnp.split(self(x)["embedding"], 2)
        others = tails[(jnp.arange(n) + self._shifts(n)[:, None]) % n]
        # q = sigmoid(-logit), so that -log q = softplus(logit) and -log(1 - q) = softplus(-logit)
        attraction = jax.nn.softplus(self._logit(heads - tails)).mean()
        # half: umap moves only the head of a random pair, here both ends follow the gradient
        repulsion = self.config.n_negatives / 2 * jax.nn.softplus(-self._logit(heads - others)).mean()
        return attraction + repulsion, {"attraction": attraction, "repulsion": repulsion}

    def init_from(self, data: dict[str, np.ndarray]) -> None:
        """Takes centre and scale from `data`; the linear map becomes its principal components."""
        x = np.asarray(data["features"], np.float32)
        x = np.asarray(self._seen(jnp.asarray(x)))
        center = x.mean(axis=0)
        scale = float(np.sqrt(((x - center) ** 2).mean()))
        self.center[...] = jnp.asarray(center)
        self.scale[...] = jnp.asarray(scale if scale > 0 else 1.0, jnp.float32)
        found = pca(x, min(self.config.n_components, *x.shape))
        start = np.zeros((self.config.input_features, self.config.n_components), np.float32)
        width = float(np.sqrt(found.variance[0]))
        if width > 0:
            gain = START_WIDTH * self.config.spread * scale / width
            start[:, : len(found.components)] = gain * found.components.T
        self.linear.kernel[...] = jnp.asarray(start)

    def sampler(self, data: dict[str, np.ndarray]) -> "EdgeSampler":
        """Builds the fuzzy neighbour graph of all cells; `fit` draws its minibatches from it.

        Raises:
            ConfigError: n_neighbors is larger than the number of cells.
        """
        features, k = data["features"], self.config.n_neighbors
        if k > len(features):
            msg = f"UMAPConfig.n_neighbors must be at most the number of cells, {len(features)}, got {k}."
            raise ConfigError(msg)
        return EdgeSampler(fuzzy_simplicial_set(*knn(features, k - 1, metric=self.config.metric)))

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableUMAP", Data]]:
        """One for each metric."""
        data = {"features": 2.0 * jax.random.normal(jax.random.key(0), (24, 6)) + 1.0}
        return {
            metric: (
                cls(UMAPConfig(input_features=6, n_neighbors=5, hidden_dim=8, n_layers=2, metric=metric),
                    rngs=nnx.Rngs(0)),
                data,
            )
            for metric in ("euclidean", "cosine")
        }

    def _standardised(self, features: Float[Array, "cells features"]) -> Float[Array, "cells features"]:
        return (self._seen(features) - self.center[...]) / self.scale[...]

    def _seen(self, features: Float[Array, "cells features"]) -> Float[Array, "cells features"]:
        """What the metric leaves of the features: "cosine" knows no length, "correlation" no mean either."""
        if self.config.metric not in ("cosine", "correlation"):
            return features
        return unit_rows(centred_rows(features) if self.config.metric == "correlation" else features)

    def _logit(self, gap: Float[Array, "*pairs components"]) -> Float[Array, "*pairs"]:
        """log(a d^(2b)) of embedding differences."""
        return jnp.log(self.a) + self.b * jnp.log((gap**2).sum(axis=-1) + SOFTENING)

    def _shifts(self, n: int) -> Int[Array, " shifts"]:
        """Partner of head i: the tail of edge i + shift; never its own."""
        count = REPEATS * self.config.n_negatives
        if self.training:
            return jax.random.randint(self.noise(), (count,), 1, n)
        return 1 + jnp.arange(count) * (n - 1) // count

    def _jittered(self, x: Float[Array, "cells features"]) -> Float[Array, "cells features"]:
        heads, tails = jnp.split(x, 2)
        # no gradient goes through the size of the noise, so the root needs no guard
        reach = jax.lax.stop_gradient(jnp.sqrt(((heads - tails) ** 2).mean(axis=1, keepdims=True)))
        moved = jax.random.normal(self.noise(), x.shape, x.dtype)
        return x + self.config.jitter * jnp.concatenate([reach, reach]) * moved

    def _fixed_axes(self) -> dict[str, int]:
        return {"features": self.config.input_features, "components": self.config.n_components}


class EdgeSampler:
    """Draws the edges of a weighted graph, each about as often as its weight says."""

    def __init__(self, edges: Edges) -> None:
        self.rows, self.columns = edges.rows, edges.columns
        self.cumulative = np.cumsum(np.asarray(edges.weights, np.float64))

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Row numbers of an epoch's batches (steps, batch_size): heads, then tails.

        An epoch passes once over the edges, in 10 to 50 batches: few cells need as many steps of the network
        as thousands, and of very many cells a part is enough.
        """
        pairs = batch_size // 2
        total = self.cumulative[-1]
        steps = int(np.clip(np.ceil(total / pairs), FEWEST_STEPS, MOST_STEPS))
        # evenly spaced along the cumulative weight: less noise than independent draws
        at = (np.arange(steps * pairs) + rng.random()) * (total / (steps * pairs))
        drawn = np.minimum(np.searchsorted(self.cumulative, at, side="right"), len(self.cumulative) - 1)
        drawn = rng.permutation(drawn).reshape(steps, pairs)
        return np.concatenate([self.rows[drawn], self.columns[drawn]], axis=1)
