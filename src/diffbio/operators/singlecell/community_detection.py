"""Communities of a graph of cells: hard ones by multilevel search, soft ones that have a gradient."""

import dataclasses
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import DataError
from ...math.modularity import ascended, links, partition, soft_modularity
from ..base import Config, Data, Operator, checked_finite, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommunityDetectionConfig(Config):
    """Settings of `DifferentiableCommunityDetection`.

    n_communities: at most so many; how many there are is found. Columns of communities that are not there are 0.
    resolution: larger gives more and smaller communities; 1 is modularity.
    temperature: in units of the share of a cell's edges; 0+ gives the hard communities of the search.
    n_iterations: steps of mirror ascent from the hard communities to the soft ones.
    """

    n_communities: int = positive(50)
    resolution: float = positive(1.0)
    temperature: float = positive(0.05)
    n_iterations: int = positive(10)


class Communities(TypedDict):
    """What `DifferentiableCommunityDetection` adds."""

    cluster_assignments: Float[Array, "cells communities"]  # rows sum to 1
    cluster_labels: Int[Array, " cells"]  # argmax of the row; numbered by size, largest first
    modularity: Float[Array, ""]  # of the assignments; as the temperature goes to 0, of the labels


class DifferentiableCommunityDetection(Operator):
    """Groups cells so that many more of a graph's edges lie within groups than chance would put there.

    Two steps. A search finds the partition of largest modularity, and with it the number of communities, by moves of
    single cells, refinement and coarsening (the scheme of Leiden, Traag et al. 2019; `math.partition`). This choice is
    discrete: no gradient goes through it. From there mirror ascent on modularity with an entropy of `temperature`
    goes to soft assignments (`math.modularity.ascended`), through whose steps gradients flow to the edge weights, and
    so to whatever made them: an embedding can be trained for its communities.

    The graph is W + Wᵀ for the lists of directed weights W: `math.modularity.fuzzy_lists` makes UMAP's graph of
    neighbours and distances, `neighbor_lists` reads any other. Where weights tell
    cells apart the search does not depend on their order, and it repeats itself. A cell without edges is a community
    of its own, unless there were more than `n_communities`: then all such cells are one, and the smallest communities
    are joined with others where that costs least.
    """

    config: CommunityDetectionConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"neighbor_indices"})

    def __init__(self, config: CommunityDetectionConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing is drawn
        self.config = config

    def __call__(
        self,
        neighbor_indices: Int[Array, "cells neighbors"],
        neighbor_weights: Float[Array, "cells neighbors"],
        start_labels: Int[Array, " cells"] | None = None,
    ) -> Communities:
        """neighbor_indices: row numbers of neighbours; an entry of the cell itself counts nothing.

        neighbor_weights: 0 or more. A pair that both cells list has the sum.
        start_labels: communities that are known, 0 to n_communities - 1; there is then no search. In a training loop
            the search may so be done once in a few steps.

        Raises:
            DataError: where values are known (not under jit): row numbers out of range, negative or missing weights,
                no edges at all, or labels out of range.
        """
        config = self.config
        self._check(neighbor_indices, neighbor_weights, start_labels)
        labels = start_labels
        if labels is None:
            labels = partition(
                neighbor_indices, neighbor_weights, n_communities=config.n_communities, resolution=config.resolution
            )
        graph = links(neighbor_indices, neighbor_weights)
        assignments = ascended(
            graph,
            labels,
            n_communities=config.n_communities,
            temperature=config.temperature,
            resolution=config.resolution,
            n_iterations=config.n_iterations,
        )
        return {
            "cluster_assignments": assignments,
            "cluster_labels": jnp.argmax(assignments, axis=1),
            "modularity": soft_modularity(graph, assignments, resolution=config.resolution),
        }

    def _check(self, indices: Array, weights: Array, labels: Array | None) -> None:
        who = type(self).__name__
        checked_finite(who, weights, key="neighbor_weights", fix="weights of edges are similarities", lowest=0.0)
        for key, values, top in (
            ("neighbor_indices", indices, len(indices)),
            ("start_labels", labels, self.config.n_communities),
        ):
            if values is None or isinstance(values, jax.core.Tracer) or not values.size:
                continue
            lowest, highest = int(np.asarray(values).min()), int(np.asarray(values).max())
            if lowest < 0 or highest >= top:
                odd = lowest if lowest < 0 else highest
                msg = f"{who}: data[{key!r}] holds {odd}, but numbers from 0 to {top - 1} are wanted."
                raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableCommunityDetection", Data]]:
        """Three groups of five cells, warm."""
        keys = jax.random.split(jax.random.key(0), 2)
        cells = jnp.arange(15)
        steps = jnp.array([1, 2, 3])
        # three others of the own group of five, and one of the next group
        own = 5 * (cells[:, None] // 5) + (cells[:, None] + steps) % 5
        indices = jnp.concatenate([own, ((cells + 7) % 15)[:, None]], axis=1)
        weights = jax.random.uniform(keys[0], (15, 4), minval=0.5) * jnp.array([1.0, 1.0, 1.0, 0.3])
        config = CommunityDetectionConfig(n_communities=4, temperature=0.3, n_iterations=3)
        data: dict[str, Any] = {"neighbor_indices": indices, "neighbor_weights": weights}
        return {"three groups": (cls(config, rngs=nnx.Rngs(0)), data)}
