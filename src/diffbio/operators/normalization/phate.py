"""PHATE: a map of cells that keeps the distances between what diffusion sees from each of them."""

import dataclasses
import warnings
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy import sparse

from ...errors import DataError, DataWarning
from ...math.interpolation import interpolate, local_slopes, shepard_weights
from ...math.mds import classic_mds, sgd_mds, smacof
from ...math.metrics import metric_points
from ...math.phate import (
    LONGEST_DIFFUSION,
    dense_kernel,
    knee_point,
    landmark_labels,
    matrix_power,
    mixture_distances,
    nearest_of_some,
    potential,
    potential_distances,
    sparse_kernel,
    stochastic,
    von_neumann_entropy,
)
from ..base import Config, Data, Operator, checked_finite, one_of, positive, setting

MOST_DENSE = 2000  # cells of which a (cells, cells) array is made
NEIGHBORS_OF_SLOPE = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class PHATEConfig(Config):
    """Settings of `DifferentiablePHATE`; the defaults are those of phate 2.0.0 but for the method of scaling.

    input_features: width of `features`.
    n_components: dimensions of the embedding.
    n_neighbors: the neighbour whose distance is a cell's bandwidth.
    decay: exponent alpha of the kernel: 2 is Gauss's, large a step at the bandwidth.
    diffusion_t: steps of diffusion, 1 to 100; None takes the knee of the von Neumann entropy.
    gamma: of the potential: 1 is -log(P^t), 0 twice its square root; above -1.
    n_landmarks: more cells are drawn together to at most so many groups, whose potentials are scaled.
    metric: "euclidean", "cosine", "correlation" or "manhattan" distance between the cells' features.
    mds: how the potential distances are scaled: "smacof" minimises their stress, as "sgd" does by pairs; "classic" is
        where these start.
    n_iterations: steps of SMACOF, or passes of SGD over all pairs.
    """

    input_features: int = positive(50)
    n_components: int = positive(2)
    n_neighbors: int = positive(5)
    decay: float = positive(40.0)
    diffusion_t: int | None = setting(
        None, f"from 1 to {LONGEST_DIFFUSION}, or None", lambda v: 1 <= v <= LONGEST_DIFFUSION
    )
    gamma: float = setting(1.0, "above -1 and at most 1", lambda v: -1 < v <= 1)
    n_landmarks: int = setting(2000, ">= 2", lambda v: v >= 2)
    metric: str = one_of("euclidean", "cosine", "correlation", "manhattan")
    mds: str = one_of("smacof", "sgd", "classic")
    n_iterations: int = positive(30)

    @property
    def n_features(self) -> int:
        """The size of the axis `features`, under the name that messages use."""
        return self.input_features


class PHATEOutput(TypedDict):
    """What `DifferentiablePHATE` adds."""

    embedding: Float[Array, "cells components"]  # in units of potential distance
    potential_distances: Float[Array, "cells landmarks"]


class PHATEReference(NamedTuple):
    """What `init_from` keeps: landmarks and all that is known of them."""

    points: Float[Array, "landmarks coordinates"]  # in the space of the metric
    embedding: Float[Array, "landmarks components"]
    slopes: Float[Array, "landmarks components coordinates"]  # of the embedding around each
    distances: Float[Array, "landmarks _landmarks"]  # of their potentials
    entropy: Float[Array, " times"]  # of diffusion for t = 1, 2, ...
    t: Int[Array, ""]


class DifferentiablePHATE(Operator):
    """Maps cells so that their distances are those of log diffusion probabilities (PHATE).

    Moon et al. 2019, Nature Biotechnology 37:1482. P is the Markov chain of the alpha-decay kernel; row i of
    -log(P^t) is the potential of cell i; metric multidimensional scaling keeps the distances between potentials.
    P, t and potential are those of phate 2.0.0. Differences: SMACOF from classic scaling in place of random pairs, to
    the same stress; the embedding is in units of potential distance; and where there are more cells than landmarks,
    they are placed among the nearest ones by interpolation with slopes (by Euclidean distance for "manhattan", too),
    where phate takes the mean of all landmarks by affinity.

    Without `init_from`, `apply` embeds the cells it is given (2000 at most), and the gradient goes through all of
    it; which cells are neighbours, t and the landmarks' groups are discrete, outside the gradient. `init_from` does
    the same for any number of cells, on the host in double precision, and keeps the landmarks: then `apply` places
    cells one by one among their nearest landmarks (see `math.interpolation`). A landmark itself, which each cell is
    where they are n_landmarks or fewer, lands exactly where it was put; the gradient there is the slope of the map
    around it, and 0 for its potential distances.

    There are no weights. The columns of `potential_distances` are the landmarks in an order of their own, the same for
    any order of the cells.
    """

    config: PHATEConfig

    def __init__(self, config: PHATEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # one draw per operator: where k-means starts
        self.start_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        empty = self._no_reference()
        self.reference_points = nnx.BatchStat(empty.points)
        self.reference_embedding = nnx.BatchStat(empty.embedding)
        self.reference_slopes = nnx.BatchStat(empty.slopes)
        self.reference_distances = nnx.BatchStat(empty.distances)
        self.reference_entropy = nnx.BatchStat(empty.entropy)
        self.reference_t = nnx.BatchStat(empty.t)

    def __call__(self, features: Float[Array, "cells features"]) -> PHATEOutput:
        """features: such as principal components.

        Raises:
            DataError: values that are not finite; and without `init_from` more than 2000 cells, n_neighbors or
                fewer, or cells that are all alike (where values are known, not under jit).
        """
        checked_finite("DifferentiablePHATE", features, key="features")
        reference = self.reference
        if reference is not None:
            return self._placed(features, reference)
        n = len(features)
        self._check_enough(n)
        if n > MOST_DENSE:
            msg = (
                f"DifferentiablePHATE: data['features'] has {n} cells, but without landmarks only {MOST_DENSE} can be "
            )
            msg += "embedded; call op.init_from(data) first."
            raise DataError(msg)
        if not isinstance(features, jax.core.Tracer):
            self._check_unlike(features)
        return self._among_themselves(features)

    def init_from(self, data: Data) -> None:
        """Embeds the cells of `data` and keeps the landmarks: from now on `apply` places any cells among them.

        Raises:
            DataError: n_neighbors cells or fewer, all cells alike, or values that are not finite.
        """
        features = np.asarray(self._inputs(data)["features"], np.float64)
        checked_finite("DifferentiablePHATE", features, key="features")
        self._check_enough(len(features))
        self._check_unlike(features)
        features = features[_order(features, np)]
        with jax.enable_x64(True):  # noqa: FBT003
            found = self._learn(features)
        self._keep(jax.tree.map(lambda v: np.asarray(v, np.float32 if v.dtype == np.float64 else np.int32), found))

    def clear_reference(self) -> None:
        """Forgets the landmarks: `apply` again embeds the cells it is given by themselves."""
        self._keep(self._no_reference())

    @property
    def reference(self) -> PHATEReference | None:
        """The landmarks; None before `init_from`."""
        stored = PHATEReference(
            self.reference_points[...], self.reference_embedding[...], self.reference_slopes[...],
            self.reference_distances[...], self.reference_entropy[...], self.reference_t[...],
        )  # fmt: skip
        return stored if len(stored.points) else None

    def _learn(self, features: np.ndarray) -> PHATEReference:
        config, n = self.config, len(features)
        points = np.asarray(metric_points(jnp.asarray(features), config.metric))
        if n <= MOST_DENSE:
            dense = dense_kernel(jnp.asarray(features), config.n_neighbors, config.decay, config.metric)
            kernel = sparse.csr_array(np.asarray(dense))
        else:
            kernel = sparse_kernel(features, config.n_neighbors, config.decay, config.metric)
        self._check_connected(kernel)
        if n > config.n_landmarks:
            labels = landmark_labels(kernel, config.n_landmarks, seed=int(self.start_seed[...]))
            groups = sparse.csr_array((np.ones(n), (np.arange(n), labels)))
            points = (groups.T @ points) / groups.sum(axis=0)[:, None]
            towards = kernel @ groups  # (cells, landmarks)
            operator = (_stochastic(towards.T) @ _stochastic(towards)).toarray()
        else:
            operator = _stochastic(kernel).toarray()
        embedding, distances, entropy, t = self._embedded(jnp.asarray(operator))
        slopes = local_slopes(jnp.asarray(points), embedding, min(NEIGHBORS_OF_SLOPE, len(points) - 1))
        return PHATEReference(jnp.asarray(points), embedding, slopes, distances, entropy, t)

    def _embedded(self, operator: Array) -> tuple[Array, Array, Array, Array]:
        """Positions, potential distances, entropy and t of a Markov chain."""
        config = self.config
        return embedded(
            operator, config.diffusion_t, gamma=config.gamma, n_components=config.n_components, mds=config.mds,
            n_iterations=config.n_iterations,
        )  # fmt: skip

    def _among_themselves(self, features: Array) -> PHATEOutput:
        config, n = self.config, len(features)
        order = _order(jax.lax.stop_gradient(features), jnp)
        ordered = features[order]
        kernel = dense_kernel(ordered, config.n_neighbors, config.decay, config.metric)
        if not isinstance(kernel, jax.core.Tracer):
            self._check_connected(np.asarray(kernel))
        if n <= config.n_landmarks:
            embedding, distances, _, _ = self._embedded(stochastic(kernel))
        else:
            points = metric_points(jax.lax.stop_gradient(ordered), config.metric)
            labels = nearest_of_some(points, config.n_landmarks, jax.random.key(self.start_seed[...]))
            towards = jax.ops.segment_sum(kernel.T, labels, config.n_landmarks).T
            weights = stochastic(towards)
            operator = jnp.matmul(stochastic(towards.T), weights, precision="highest")
            positions, among, _, _ = self._embedded(operator)
            embedding = jnp.matmul(weights, positions, precision="highest")
            distances = mixture_distances(weights, among)
        back = jnp.argsort(order)
        return {"embedding": embedding[back], "potential_distances": distances[back]}

    def _placed(self, features: Array, reference: PHATEReference) -> PHATEOutput:
        reference = jax.tree.map(lambda v: jnp.asarray(v, features.dtype), reference)
        points, m = metric_points(features, self.config.metric), len(reference.points)
        nearest, weights = shepard_weights(points, reference.points, min(3 * self.config.n_neighbors + 1, m))
        embedding = interpolate(points, reference.points, reference.embedding, reference.slopes, nearest, weights)
        spread = jnp.zeros((len(features), m), features.dtype)
        spread = spread.at[jnp.arange(len(features))[:, None], nearest].add(weights)
        return {"embedding": embedding, "potential_distances": mixture_distances(spread, reference.distances)}

    def _check_enough(self, n_cells: int) -> None:
        if n_cells <= self.config.n_neighbors:
            msg = (
                f"DifferentiablePHATE: n_neighbors is {self.config.n_neighbors}, but there are only {n_cells} cells, "
                f"and a cell is not its own neighbour; pass n_neighbors={max(n_cells - 1, 1)}."
            )
            raise DataError(msg)

    def _check_unlike(self, features: Any) -> None:
        if (features == features[0]).all():
            msg = f"DifferentiablePHATE: all {len(features)} cells of data['features'] are alike; there is no map."
            raise DataError(msg)

    def _check_connected(self, kernel: Any) -> None:
        parts = sparse.csgraph.connected_components(kernel, directed=False)[0]
        if parts > 1:
            msg = (
                f"DifferentiablePHATE: the graph of the cells falls into {parts} parts at n_neighbors "
                f"{self.config.n_neighbors}; how far they lie apart in the embedding says nothing. More neighbours may "
                "join them"
            )
            warnings.warn(msg, DataWarning, stacklevel=4)

    def _no_reference(self) -> PHATEReference:
        width = self.config.input_features + (self.config.metric in ("cosine", "correlation"))
        components = self.config.n_components
        return PHATEReference(
            points=jnp.zeros((0, width)),
            embedding=jnp.zeros((0, components)),
            slopes=jnp.zeros((0, components, width)),
            distances=jnp.zeros((0, 0)),
            entropy=jnp.zeros(LONGEST_DIFFUSION),
            t=jnp.zeros((), jnp.int32),
        )

    def _keep(self, reference: PHATEReference) -> None:
        reference = jax.tree.map(jnp.asarray, reference)
        self.reference_points.set_value(reference.points)
        self.reference_embedding.set_value(reference.embedding)
        self.reference_slopes.set_value(reference.slopes)
        self.reference_distances.set_value(reference.distances)
        self.reference_entropy.set_value(reference.entropy)
        self.reference_t.set_value(reference.t)

    def _fixed_axes(self) -> dict[str, int]:
        return {"features": self.config.input_features, "components": self.config.n_components}

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiablePHATE", Data]]:
        """Cells that embed themselves by landmarks, and new cells among landmarks that were kept."""

        def cells(seed: int) -> Data:
            along = jnp.linspace(0.0, 3.0, 14)[:, None] * jnp.array([[1.0, 0.3, -0.5, 0.2]])
            return {"features": along + 0.4 * jax.random.normal(jax.random.key(seed), (14, 4))}

        def op(**settings: Any) -> DifferentiablePHATE:
            settings = {"input_features": 4, "n_neighbors": 4, "n_iterations": 8, **settings}
            return cls(PHATEConfig(**settings), rngs=nnx.Rngs(0))

        kept = op(decay=6.0, metric="cosine")
        kept.init_from(cells(seed=1))
        return {
            "landmarks": (op(n_landmarks=11, decay=6.0, diffusion_t=3), cells(seed=0)),
            "kept": (kept, cells(seed=2)),
        }


@partial(jax.jit, static_argnames=("t", "gamma", "n_components", "mds", "n_iterations"))
def embedded(
    operator: Float[Array, "points _points"],
    t: int | None = None,
    *,
    gamma: float = 1.0,
    n_components: int = 2,
    mds: str = "smacof",
    n_iterations: int = 30,
) -> tuple[Float[Array, "points components"], Float[Array, "points _points"], Float[Array, " times"], Int[Array, ""]]:
    """Scales the potential of a Markov chain: (positions, potential distances, entropy for t = 1, 2, ..., t).

    Cost points³ for the entropy and the powers.
    """
    entropy = von_neumann_entropy(operator)
    chosen = knee_point(entropy) if t is None else jnp.asarray(t)
    distances = potential_distances(potential(matrix_power(operator, chosen), gamma))
    positions = classic_mds(distances, n_components)
    if mds == "smacof":
        positions = smacof(distances, positions, n_steps=n_iterations)
    elif mds == "sgd":
        positions = sgd_mds(distances, positions, n_passes=n_iterations)
    return positions, distances, entropy, chosen


def _order(features: Any, xp: Any) -> Any:
    """Order of the cells by a projection; the results are computed in it, so that the cells' own does not matter."""
    return xp.argsort(features @ xp.cos(xp.arange(features.shape[1], dtype=features.dtype)))


def _stochastic(weights: Any) -> Any:
    """Rows of a scipy array divided by their sums."""
    return sparse.csr_array(weights.multiply(1.0 / weights.sum(axis=1)[:, None]))
