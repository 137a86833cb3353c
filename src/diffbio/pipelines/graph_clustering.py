"""Communities of a neighbour graph as a stage of the pipeline: found once, then read off the nearest cells."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..math.distances import safe_sqrt
from ..math.graph import membership, smooth_knn_dist
from ..math.modularity import fuzzy_lists, listed_edges
from ..math.neighbors import knn, nearest
from ..math.partition import find_communities
from ..operators.singlecell.community_detection import CommunityDetectionConfig, DifferentiableCommunityDetection

N_NEIGHBORS = 14  # and the cell itself: scanpy's graph of 15
# Of the mean squared distance to the neighbours: so near, a cell of the fit answers with its own community.
SOFTENING = 1e-3


class GraphClustering(nnx.Module):
    """Groups cells into the communities of their neighbour graph, as many as its modularity asks for.

    `init_from` builds UMAP's graph of the cells, finds its communities and keeps positions and memberships. Any
    cell is then given by its 15 nearest cells of the fit, each weighing 1 / squared distance (Shepard 1968):
    memberships that are differentiable in the cell's position, and a cell of the fit nearly keeps its own. Before
    `init_from` the communities are those of the cells that are given.
    """

    def __init__(self, width: int, *, resolution: float = 1.0, seed: int = 0) -> None:
        self.resolution, self.seed = resolution, seed
        self.fitted = False
        self.cells = nnx.BatchStat(jnp.zeros((0, width)))
        self.memberships = nnx.BatchStat(jnp.zeros((0, 0)))  # (cells, communities)

    def mark_fitted(self) -> None:
        """Says that the stage holds what it learned."""
        self.fitted = True

    def __call__(self, embeddings: jax.Array) -> dict[str, jax.Array]:
        """Memberships (cells, communities) of cells at `embeddings` (cells, width); rows sum to 1."""
        if not len(self.cells[...]):
            return {"cluster_assignments": self._of_these(embeddings)}
        known = jnp.asarray(self.cells[...], embeddings.dtype)
        near = nearest(known, min(N_NEIGHBORS + 1, len(known)), queries=embeddings)
        squared = ((embeddings[:, None] - known[near]) ** 2).sum(axis=2)
        scale = SOFTENING * jax.lax.stop_gradient(squared.mean(axis=1, keepdims=True))
        weights = 1 / (squared + jnp.where(scale > 0, scale, 1.0))
        weights = weights / weights.sum(axis=1, keepdims=True)
        votes = jnp.asarray(self.memberships[...], embeddings.dtype)[near]
        return {"cluster_assignments": jnp.einsum("ck,ckg->cg", weights, votes)}

    def objective(self, data: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Minus the modularity, estimated from pairs of neighbours: first half of the cells heads, second half tails.

        Of edges drawn by weight, Q = E[s_head · s_tail] - resolution |E[s]|², where a cell comes as often as its
        degree says (Newman 2006, with soft memberships s).
        """
        memberships = self(data["embeddings"])["cluster_assignments"]
        n = len(memberships) // 2
        heads, tails = memberships[:n], memberships[n : 2 * n]
        within = (heads * tails).sum(axis=1).mean()
        modularity = within - self.resolution * (memberships.mean(axis=0) ** 2).sum()
        return -modularity, {"modularity": modularity}

    def init_from(self, data: dict[str, np.ndarray]) -> None:
        """Finds the communities of these cells and keeps both."""
        cells = np.asarray(data["embeddings"], np.float32)
        self.cells.set_value(jnp.asarray(cells))
        self.memberships.set_value(self._found(cells))
        self.mark_fitted()

    def _found(self, cells: np.ndarray) -> jax.Array:
        if len(cells) < 2:
            return jnp.ones((len(cells), 1))
        near, weights = fuzzy_lists(*knn(cells, min(N_NEIGHBORS, len(cells) - 1)))
        edges = listed_edges(near, np.asarray(weights))
        labels = find_communities(*edges, len(cells), resolution=self.resolution, seed=self.seed)
        config = CommunityDetectionConfig(n_communities=int(labels.max()) + 1, resolution=self.resolution)
        detection = DifferentiableCommunityDetection(config, rngs=nnx.Rngs(0))  # it draws nothing
        return detection(jnp.asarray(near), jnp.asarray(weights), jnp.asarray(labels, jnp.int32))["cluster_assignments"]

    def _of_these(self, embeddings: jax.Array) -> jax.Array:
        if len(embeddings) < 2:
            return jnp.ones((len(embeddings), 1), embeddings.dtype)
        near = nearest(embeddings, min(N_NEIGHBORS, len(embeddings) - 1))
        squared = ((embeddings[:, None] - embeddings[near]) ** 2).sum(axis=2)
        distances = safe_sqrt(squared)
        weights = membership(distances, *smooth_knn_dist(distances))
        detection = DifferentiableCommunityDetection(
            CommunityDetectionConfig(resolution=self.resolution), rngs=nnx.Rngs(0)
        )
        return detection(near, weights)["cluster_assignments"]
