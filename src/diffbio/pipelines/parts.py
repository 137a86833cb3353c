"""The stages of a `SingleCellPipeline` that there is a choice of: integration, map, clusters."""

from typing import Any

from flax import nnx

from ..operators.base import Operator
from ..operators.normalization.phate import DifferentiablePHATE, PHATEConfig
from ..operators.normalization.umap import DifferentiableUMAP, UMAPConfig
from ..operators.singlecell.harmony import BatchCorrectionConfig, DifferentiableHarmony
from ..operators.singlecell.mmd_batch_correction import DifferentiableMMDBatchCorrection, MMDBatchCorrectionConfig
from ..operators.singlecell.soft_clustering import SoftClusteringConfig, SoftKMeansClustering
from ..operators.singlecell.wgan_batch_correction import DifferentiableWGANBatchCorrection, WGANBatchCorrectionConfig
from .graph_clustering import GraphClustering

# Harmony's diversity penalty. The decoder already knows the batch, so that the latent space is mixed where types
# are shared; a penalty on top (2 in the publication, which corrects PCs) merges types that some batch lacks: on
# the lung cancer lines of benchmarks/quality/integration.py it lowers the purity of neighbourhoods from 0.99 to 0.86.
PIPELINE_THETA = 0.0

type Integration = DifferentiableHarmony | DifferentiableMMDBatchCorrection | DifferentiableWGANBatchCorrection
type Map = DifferentiableUMAP | DifferentiablePHATE
type Clustering = SoftKMeansClustering | GraphClustering


def integration(
    method: str, *, width: int, n_batches: int, n_clusters: int, n_iterations: int, rngs: nnx.Rngs
) -> Integration | None:
    """What corrects the latent space; None for "scvi", where the decoder's knowledge of the batches is all.

    Args:
        method: "harmony", "mmd", "wgan" or "scvi".
        width: of the latent space, and of the corrected one.
        n_batches: labels are 0 ... n_batches - 1.
        n_clusters: of Harmony.
        n_iterations: of Harmony.
        rngs: for the weights.
    """
    if method == "harmony":
        harmony = BatchCorrectionConfig(
            n_clusters=n_clusters, n_features=width, n_batches=n_batches, n_iterations=n_iterations,
            theta=PIPELINE_THETA,
        )  # fmt: skip
        return DifferentiableHarmony(harmony, rngs=rngs)
    if method == "mmd":
        mmd = MMDBatchCorrectionConfig(n_genes=width, latent_dim=width, n_batches=n_batches)
        return DifferentiableMMDBatchCorrection(mmd, rngs=rngs)
    if method == "wgan":
        wgan = WGANBatchCorrectionConfig(n_genes=width, latent_dim=width, n_batches=n_batches)
        return DifferentiableWGANBatchCorrection(wgan, rngs=rngs)
    return None


def map_of(method: str, *, width: int, n_components: int, rngs: nnx.Rngs) -> Map:
    """What draws the cells: "umap" or "phate"."""
    if method == "umap":
        return DifferentiableUMAP(UMAPConfig(n_components=n_components, input_features=width), rngs=rngs)
    return DifferentiablePHATE(PHATEConfig(n_components=n_components, input_features=width), rngs=rngs)


def clustering(
    method: str, *, width: int, n_clusters: int, temperature: float, resolution: float, rngs: nnx.Rngs
) -> Clustering:
    """What groups the cells: "kmeans" into n_clusters, "communities" into as many as the graph has."""
    if method == "kmeans":
        config = SoftClusteringConfig(n_clusters=n_clusters, n_features=width, temperature=temperature)
        return SoftKMeansClustering(config, rngs=rngs)
    return GraphClustering(width, resolution=resolution)


def integration_inputs(part: Operator, embedding: Any, batch_labels: Any) -> dict[str, Any]:
    """The data of an integration stage: what it calls its first input differs."""
    return {next(iter(part.requires)): embedding, "batch_labels": batch_labels}
