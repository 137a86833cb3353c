"""Pseudotime: how far every cell is along a process, from a root cell, on a diffusion map of the cells."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError, DataWarning, MissingKeyError
from ...math.branching import branch_labels
from ...math.diffusion_maps import (
    adaptive_kernel,
    density_normalized,
    diffusion_distances,
    scaled_to_one,
    symmetric_transitions,
)
from ...math.graph import Edges
from ...math.neighbors import nearest
from ...math.palantir import multiscale_space, path_lengths, refined_pseudotime, waypoints
from ...math.spectrum import Spectrum, spectrum
from ...math.transitions import connectivities, list_distances, normalized_rows
from ..all_cells import AllCells
from ..base import Config, Data, Operator, checked_finite, nonnegative, one_of, setting

WHO = "DifferentiablePseudotime"
NEIGHBORS = {"dpt": 15, "palantir": 30}
WAYPOINTS = 1200


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudotimeConfig(Config):
    """Settings of `DifferentiablePseudotime`.

    method: "dpt", diffusion pseudotime; "palantir", shortest paths between waypoints on the diffusion components.
    n_neighbors: size of a neighbourhood, the cell itself counted as in scanpy and Palantir; None is 15 for "dpt" and
        30 for "palantir".
    n_diffusion_components: eigenvectors of the Markov chain, the constant first one among them.
    root_cell_index: row number of the cell that the process starts from; None reads it from the data.
    metric: "euclidean", "cosine", "correlation" or "manhattan" distance between the cells' embeddings.
    n_branchings: how often a segment of the trajectory is divided into its branches, see `branches`.
    n_waypoints: of "palantir" only: cells that paths start from; None is 1200.
    learn_metric: what `diffbio.fit` learns of the distance: "none"; "weights", one per feature; "linear", a map of the
        embeddings.
    n_features: width of `embeddings`; needed to learn a metric, else None takes any.
    metric_rank: of "linear" only: dimensions that the map leads to; None is n_features.
    """

    method: str = one_of("dpt", "palantir")
    n_neighbors: int | None = setting(None, ">= 2, or None", lambda v: v >= 2)
    n_diffusion_components: int = setting(10, ">= 2", lambda v: v >= 2)
    root_cell_index: int | None = setting(None, ">= 0, or None", lambda v: v >= 0)
    metric: str = one_of("euclidean", "cosine", "correlation", "manhattan")
    n_branchings: int = nonnegative(0)
    n_waypoints: int | None = setting(None, ">= 1, or None", lambda v: v >= 1)
    learn_metric: str = one_of("none", "weights", "linear")
    n_features: int | None = setting(None, "> 0, or None", lambda v: v > 0)
    metric_rank: int | None = setting(None, "> 0, or None", lambda v: v > 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_waypoints is not None and self.method != "palantir":
            msg = f"PseudotimeConfig.n_waypoints does nothing for method {self.method!r}; leave it None."
            raise ConfigError(msg)
        if self.learn_metric != "none" and self.n_features is None:
            msg = f"PseudotimeConfig.n_features must be given to learn a metric ({self.learn_metric!r}), got None."
            raise ConfigError(msg)
        if self.metric_rank is not None and self.learn_metric != "linear":
            msg = f"PseudotimeConfig.metric_rank does nothing for learn_metric {self.learn_metric!r}; leave it None."
            raise ConfigError(msg)


class Pseudotime(TypedDict):
    """What `DifferentiablePseudotime` adds."""

    pseudotime: Float[Array, " cells"]  # 0 to 1; infinite in parts of the graph that the root is not in
    diffusion_components: Float[Array, "cells diffusion_components"]  # the first belongs to eigenvalue 1
    eigenvalues: Float[Array, " diffusion_components"]  # of the Markov chain, largest first
    branches: Int[Array, " cells"]  # number of the segment, that nearest the root 0; -1 in other parts of the graph
    transition_rows: Int[Array, " edges"]
    transition_columns: Int[Array, " edges"]
    transition_weights: Float[Array, " edges"]  # P(row -> column); pairs listed twice add up, rows sum to 1


class DifferentiablePseudotime(Operator):
    """Orders cells along a process by their diffusion distance, or path length, from a root cell.

    "dpt" is diffusion pseudotime (Haghverdi et al. 2016) exactly as scanpy 1.12 computes it: UMAP's graph, made
    independent of the sampling density, the leading eigenvectors psi of its symmetric transition matrix, and
    d_ij² = sum (l / (1 - l))² (psi_i - psi_j)², with weight 1 where l >= 0.9994; the distance from the root over the
    largest one. `diffusion_components` are scanpy's X_diffmap up to signs.

    "palantir" is Palantir (Setty et al. 2019) in the steps of palantir 1.4.5, but for waypoints that are not drawn at
    random: an adaptive kernel, the components before the largest gap of the eigenvalues scaled to [0, 1], shortest
    paths from waypoints, and their weighted views refined until they stay. There paths start from that extreme cell of
    the components that is nearest the root.

    `transition_*` is the chain itself, for fates. `branches` divides the cells at branching points as Haghverdi et al.
    (see `math.branching`), in either mode by diffusion distances.

    Gradients go through the eigenvectors (`math.spectrum`): that of the DPT pseudotime is right also where eigenvalues
    are equal, those of single components, and of Palantir's times, are bounded there. Which cells are neighbours,
    which eigenvalues count as 1, the farthest cell, the waypoints and the edges that paths go along are discrete
    choices outside the gradient. A pseudotime of infinity has gradient 0.

    With `learn_metric` the embeddings are first weighted, or mapped, by parameters; `objective` is 1 - Pearson's
    correlation of pseudotime with `time`, of the cells whose time is known, through the whole of it. All cells are one
    batch: they are each other's neighbours.
    """

    config: PseudotimeConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"root_cell_index", "transition_rows", "transition_columns"})
    rough_in: ClassVar[dict[str, str]] = {"time": "only the objective reads it"}
    fit_defaults: ClassVar[Mapping[str, Any]] = {"max_epochs": 60, "learning_rate": 0.03, "validation": 0.0}

    @property
    def names_cells(self) -> bool:
        """Whether the config names the root."""
        return self.config.root_cell_index is not None

    def __init__(self, config: PseudotimeConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing is drawn
        self.config = config
        self.learned = nnx.data(None)
        width = config.n_features or 0
        if config.learn_metric == "weights":
            self.learned = nnx.Param(jnp.zeros(width))  # logarithms
        elif config.learn_metric == "linear":
            self.learned = nnx.Param(jnp.eye(width, config.metric_rank or width))
        self.fitted = config.learn_metric == "none"

    def __call__(
        self,
        embeddings: Float[Array, "cells features"],
        root_cell_index: Int[Array, ""] | None = None,
        time: Float[Array, " cells"] | None = None,
    ) -> Pseudotime:
        """embeddings: of the cells, such as principal components.

        root_cell_index: row number of the cell that the process starts from, unless the config names it.
        time: of cells of which it is known, 0 or more; NaN, infinity or -1 of others. Only `objective` reads it.

        Raises:
            MissingKeyError: neither config nor data name the root cell.
            DataError: both do; fewer cells than n_neighbors or n_diffusion_components; and, where values are known (not
                under jit): the root is no row number, all cells are alike, or values are not finite.
        """
        del time
        config, n = self.config, len(embeddings)
        checked_finite(WHO, embeddings, key="embeddings")
        self._check_cells(embeddings)
        root = self._root(root_cell_index, n)
        points = self.mapped(embeddings)
        kernel = self._kernel(points)
        matrix, total = symmetric_transitions(kernel, n)
        found = spectrum(matrix, n, config.n_diffusion_components)
        self._check_connected(found.parts)
        components = found.vectors
        if config.method == "dpt":
            distances = diffusion_distances(found.scaled, root)
        else:
            components = components / jnp.sqrt(total)[:, None]
            components = components / jnp.linalg.norm(components, axis=0)
            distances = self._palantir(found, components, root)
        chain = normalized_rows(kernel, n)
        return {
            "pseudotime": scaled_to_one(distances, found.parts, root),
            "diffusion_components": components,
            "eigenvalues": 1.0 - found.gaps,
            "branches": branch_labels(found.scaled, found.parts, root, config.n_branchings),
            "transition_rows": jnp.asarray(chain.rows),
            "transition_columns": jnp.asarray(chain.columns),
            "transition_weights": chain.weights,
        }

    def mapped(self, embeddings: Float[Array, "cells features"]) -> Float[Array, "cells coordinates"]:
        """The embeddings in the learned metric."""
        if self.learned is None:
            return embeddings
        learned = self.learned[...].astype(embeddings.dtype)
        if self.config.learn_metric == "weights":
            return embeddings * jnp.exp(learned)
        return jnp.matmul(embeddings, learned, precision="highest")

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """1 - Pearson's correlation of pseudotime and `time`, over the cells whose time is known.

        Raises:
            MissingKeyError: there is no `time`.
            DataError: fewer than two different times are known (where values are known).
        """
        inputs = self._inputs(data)
        if "time" not in inputs:
            msg = f"{WHO}: to learn a metric, data['time'] must hold the times that are known; data has "
            msg += f"{', '.join(sorted(data))}."
            raise MissingKeyError(msg)
        time = inputs["time"]
        known = jnp.isfinite(time) & (time >= 0)
        if not isinstance(time, jax.core.Tracer) and _different_times(np.asarray(time)) < 2:
            msg = f"{WHO}: data['time'] must hold at least two different known times (0 or more); it does not."
            raise DataError(msg)
        found = self(**inputs)["pseudotime"]
        used = known & jnp.isfinite(found)
        correlation = _correlation(jnp.where(used, found, 0.0), jnp.where(used, time, 0.0), used.astype(found.dtype))
        return 1.0 - correlation, {"correlation": correlation}

    def sampler(self, data: Data) -> AllCells:
        """Every minibatch is all cells: they are each other's neighbours."""
        return AllCells(len(data["embeddings"]))

    def _kernel(self, points: Array) -> Edges:
        config, n = self.config, len(points)
        size = config.n_neighbors or NEIGHBORS[config.method]
        if config.method == "dpt":
            return density_normalized(connectivities(points, size, metric=config.metric), n)
        indices = nearest(points, size - 1, metric=config.metric)
        return adaptive_kernel(indices, list_distances(points, indices, metric=config.metric))

    def _palantir(self, found: Spectrum, components: Array, root: Array) -> Array:
        config = self.config
        space = multiscale_space(found.gaps, components)
        chosen = waypoints(space, root, config.n_waypoints or WAYPOINTS)
        lengths = path_lengths(space, chosen.cells, config.n_neighbors or NEIGHBORS["palantir"])
        return refined_pseudotime(lengths, chosen)[0]

    def _root(self, given: Array | None, n_cells: int) -> Array:
        index = self.config.root_cell_index
        if index is None and given is None:
            msg = f"{WHO} needs data['root_cell_index'], the row number of the first cell; or config.root_cell_index."
            raise MissingKeyError(msg)
        if index is not None and given is not None:
            msg = f"{WHO}: config.root_cell_index is {index}, and data has one too; leave one of them out."
            raise DataError(msg)
        root = jnp.asarray(index if given is None else given)
        if not isinstance(root, jax.core.Tracer) and not 0 <= int(root) < n_cells:
            name = "config.root_cell_index" if given is None else "data['root_cell_index']"
            msg = f"{WHO}: {name} is {int(root)}, but row numbers of {n_cells} cells are 0 to {n_cells - 1}."
            raise DataError(msg)
        return root

    def _check_cells(self, embeddings: Array) -> None:
        config, n = self.config, len(embeddings)
        size = config.n_neighbors or NEIGHBORS[config.method]
        if n < size:
            msg = (
                f"{WHO}: n_neighbors is {size}, the cell itself counted, but there are only {n} cells; pass "
                f"n_neighbors={max(n, 2)}."
            )
            raise DataError(msg)
        if n < config.n_diffusion_components:
            msg = (
                f"{WHO}: n_diffusion_components is {config.n_diffusion_components}, but there are only {n} cells; "
                f"pass n_diffusion_components={max(n, 2)}."
            )
            raise DataError(msg)
        if isinstance(embeddings, jax.core.Tracer):
            return
        values = np.asarray(embeddings)
        if (values == values[0]).all():
            msg = f"{WHO}: all {n} cells of data['embeddings'] are alike; there is no order."
            raise DataError(msg)

    def _check_connected(self, parts: Array) -> None:
        if isinstance(parts, jax.core.Tracer):
            return
        sizes = np.sort(np.bincount(np.asarray(parts)))[::-1]
        if len(sizes) > 1:
            said = ", ".join(f"{size:,}" for size in sizes[:8]) + (", ..." if len(sizes) > 8 else "")
            msg = (
                f"{WHO}: the graph of the cells falls into {len(sizes)} parts of {said} cells; pseudotime is infinite "
                "in those that the root is not in. More neighbours may join them"
            )
            warnings.warn(msg, DataWarning, stacklevel=4)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiablePseudotime", Data]]:
        """A noisy line by diffusion distances, and in a learned metric; a noisy arc by Palantir's waypoints."""
        along = jnp.linspace(0.0, 1.0, 16)
        noise = jax.random.normal(jax.random.key(0), (16, 3))
        line = jnp.stack([4.0 * along, along**2, jnp.zeros(16)], axis=1) + 0.2 * noise
        arc = jnp.stack([jnp.cos(3 * along), jnp.sin(3 * along), jnp.zeros(16)], axis=1) + 0.05 * noise
        root = jnp.array(1)

        def op(**settings: Any) -> DifferentiablePseudotime:
            return cls(PseudotimeConfig(n_neighbors=6, **settings), rngs=nnx.Rngs(0))

        time = jnp.where(jnp.arange(16) % 3 == 1, jnp.nan, jnp.floor(4.0 * along))
        weights = op(n_diffusion_components=4, learn_metric="weights", n_features=3)
        return {
            "dpt": (op(n_diffusion_components=4), {"embeddings": line, "root_cell_index": root, "time": time}),
            "palantir": (op(n_diffusion_components=5, method="palantir"), {"embeddings": arc, "root_cell_index": root}),
            "learned metric": (weights, {"embeddings": line, "root_cell_index": root, "time": time}),
        }


def _different_times(time: np.ndarray) -> int:
    """In numpy: inside jit, jax traces even what is done to constants."""
    return len(np.unique(time[np.isfinite(time) & (time >= 0)]))


def _correlation(a: Array, b: Array, weight: Array) -> Array:
    """Pearson's, of the entries with weight 1."""
    count = jnp.maximum(weight.sum(), 1.0)
    a, b = (weight * (x - (weight * x).sum() / count) for x in (a, b))
    square = (a * a).sum() * (b * b).sum()
    varies = square > 0
    return jnp.where(varies, (a * b).sum() / jnp.sqrt(jnp.where(varies, square, 1.0)), 0.0)
