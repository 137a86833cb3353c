"""`tl.pipeline`: the whole workflow on an AnnData."""

from typing import TYPE_CHECKING, Any

from .. import slots
from ..errors import ConfigError
from ..pipelines.run import analyse

if TYPE_CHECKING:
    from anndata import AnnData


def pipeline(
    adata: "AnnData",
    *,
    batch_key: str | None = None,
    n_clusters: int | None = None,
    n_top_genes: int | None = 2000,
    ambient_profile: str | None = None,
    layer: str | None = None,
    normalized: bool = False,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
    **settings: Any,
) -> Any:
    """Denoises, normalises, integrates, embeds and clusters cells with a `SingleCellPipeline` fitted to them.

    Args:
        adata: cells x genes, changed in place.
        batch_key: column of `obs`; None, or one batch, skips the batch correction.
        n_clusters: number of clusters of k-means; None is 10.
        n_top_genes: how many variable genes to use (seurat_v3, batch by batch); None uses all.
        ambient_profile: column of `var` with the soup's gene fractions; None takes "ambient_profile" if it is
            there, and skips the ambient removal if not.
        layer: of the counts; None is X.
        normalized: adds the gene fractions of the chosen genes, too.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns (copy, pipeline).
        settings: fields of `SingleCellPipelineConfig`, such as integration ("harmony", "mmd", "wgan", "scvi"),
            embedding ("umap", "phate") and clustering ("kmeans", "communities"), and settings of `diffbio.fit`, such
            as max_epochs.

    Adds `obsm["X_diffbio_latent"]`, `obsm["X_diffbio_harmony"]` and `obsm["X_diffbio_umap"]` (or under the name of what
    ran instead; "scvi" gives the latent space alone), `obs["diffbio_cluster"]`, `obs["diffbio_cluster_max_prob"]`,
    `obsm["diffbio_cluster_prob"]`, `var["diffbio_highly_variable"]`, with ambient removal
    `layers["diffbio_decontaminated"]` and `obs["diffbio_ambient_fraction"]`, and `uns["diffbio"]["pipeline"]`, which
    says what was skipped and why.

    Returns:
        The fitted pipeline.
    """
    if "seed" in settings:
        msg = "tl.pipeline: the seed is called random_state here."
        raise ConfigError(msg)
    if n_clusters is not None:
        settings["n_clusters"] = n_clusters
    target = slots.target_of(adata, copy=copy)
    analysis = analyse(
        target,
        batch_key=batch_key,
        n_top_genes=n_top_genes,
        ambient_profile=ambient_profile,
        layer=layer,
        seed=random_state,
        progress=progress,
        **settings,
    )
    analysis.add_to(target, normalized=normalized)
    return (target, analysis.pipeline) if copy else analysis.pipeline
