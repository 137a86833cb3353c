"""`tl.cluster`: groups of like cells."""

from typing import TYPE_CHECKING

import numpy as np
from flax import nnx

from .. import slots
from ..data.write import add_results
from ..fitting import fit
from ..operators.singlecell import SoftClusteringConfig, SoftKMeansClustering
from ..pipelines.graph_clustering import GraphClustering
from ..recording import recorded
from .applying import applied, at_most_cells

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def cluster(
    adata: "AnnData",
    *,
    method: str = "kmeans",
    n_clusters: int | None = None,
    temperature: float | None = None,
    resolution: float | None = None,
    use_rep: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Groups cells by soft k-means, or into the communities of their neighbour graph.

    Args:
        adata: cells x genes, changed in place.
        method: "kmeans" (`SoftKMeansClustering`) makes as many groups as asked for; "communities"
            (`DifferentiableCommunityDetection`) as many as the modularity of the graph of 15 neighbours has, as
            Leiden does.
        n_clusters: of k-means; None is 10.
        temperature: of k-means, in units of squared distance in the representation; None is 1.
        resolution: of communities: more finds more of them; None is 1.
        use_rep: key of `obsm`; None is the PCA of log-normalised counts of the variable genes.
        layer: of the counts that the PCA reads; None is X.
        random_state: seed.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_cluster"]` (categorical strings), `obs["diffbio_cluster_max_prob"]` and
    `obsm["diffbio_cluster_prob"]` (cells, clusters), whose rows sum to 1.

    Raises:
        ConfigError: an unknown method, a setting that the method does not have, or more clusters than cells.
    """
    slots.choose(method, ["kmeans", "communities"], "tl.cluster")
    embeddings = slots.representation(adata, use_rep, layer)
    if method == "communities":
        unused = {"n_clusters": n_clusters, "temperature": temperature}
        slots.refuse("tl.cluster", method, **{name: value is not None for name, value in unused.items()})
        wanted = 1.0 if resolution is None else resolution
        graph = GraphClustering(embeddings.shape[1], resolution=wanted, seed=random_state)
        graph.init_from({"embeddings": embeddings})
        add_results(adata, {"cluster_assignments": np.asarray(graph.memberships[...])})
        return
    slots.refuse("tl.cluster", method, resolution=resolution is not None)
    at_most_cells(n_clusters, adata, "tl.cluster")
    config = SoftClusteringConfig(
        n_clusters=10 if n_clusters is None else n_clusters,
        n_features=embeddings.shape[1],
        temperature=1.0 if temperature is None else temperature,
    )
    op = SoftKMeansClustering(config, rngs=nnx.Rngs(random_state))
    fit(op, {"embeddings": embeddings}, seed=random_state, progress=False)
    add_results(adata, applied(op, {"embeddings": embeddings}, "cluster_assignments"))
