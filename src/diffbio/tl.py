"""Tools on AnnData: `diffbio.tl.cluster(adata, n_clusters=8)`; each writes what its docstring lists."""

from typing import TYPE_CHECKING, Any, cast

from flax import nnx

from . import slots
from .annotation import Calling
from .annotation import annotate as annotated
from .data.source import ArraySource
from .data.write import add_results
from .errors import ConfigError
from .fitting import fit
from .operators.base import Operator
from .operators.normalization import DifferentiableUMAP, UMAPConfig, VAENormalizer, VAENormalizerConfig
from .operators.singlecell import (
    BatchCorrectionConfig,
    DifferentiableHarmony,
    SoftClusteringConfig,
    SoftKMeansClustering,
)
from .pipelines.inference import apply_in_chunks, joined
from .pipelines.projection import project as projected
from .pipelines.run import analyse
from .recording import recorded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

    from .pipelines.single_cell import SingleCellPipeline


def pipeline(
    adata: "AnnData",
    *,
    batch_key: str | None = None,
    n_clusters: int = 10,
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
        n_clusters: number of clusters.
        n_top_genes: how many variable genes to use (seurat_v3, batch by batch); None uses all.
        ambient_profile: column of `var` with the soup's gene fractions; None takes "ambient_profile" if it is
            there, and skips the ambient removal if not.
        layer: of the counts; None is X.
        normalized: adds the gene fractions of the chosen genes, too.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns (copy, pipeline).
        settings: fields of `SingleCellPipelineConfig` and settings of `diffbio.fit`, such as max_epochs.

    Adds `obsm["X_diffbio_latent"]`, `obsm["X_diffbio_harmony"]`, `obsm["X_diffbio_umap"]`,
    `obs["diffbio_cluster"]`, `obs["diffbio_cluster_max_prob"]`, `obsm["diffbio_cluster_prob"]`,
    `var["diffbio_highly_variable"]`, with ambient removal `layers["diffbio_decontaminated"]` and
    `obs["diffbio_ambient_fraction"]`, and `uns["diffbio"]["pipeline"]`, which says what was skipped and why.

    Returns:
        The fitted pipeline.
    """
    if "seed" in settings:
        msg = "tl.pipeline: the seed is called random_state here."
        raise ConfigError(msg)
    target = (adata.to_memory() if adata.isbacked else adata.copy()) if copy else adata
    analysis = analyse(
        target,
        batch_key=batch_key,
        n_clusters=n_clusters,
        n_top_genes=n_top_genes,
        ambient_profile=ambient_profile,
        layer=layer,
        seed=random_state,
        progress=progress,
        **settings,
    )
    analysis.add_to(target, normalized=normalized)
    return (target, analysis.pipeline) if copy else analysis.pipeline


def project(
    adata: "AnnData",
    model: "SingleCellPipeline | str | Path",
    *,
    batch_key: str | None = None,
    label_key: str | None = None,
    ambient_profile: str | None = None,
    layer: str | None = None,
    normalized: bool = False,
    copy: bool = False,
) -> Any:
    """Normalises, integrates, embeds and clusters new cells by a pipeline that was fitted to others.

    Genes are found by name, in any order; up to 20 % of them may be missing and count as zero.

    Args:
        adata: cells x genes, changed in place.
        model: what `tl.pipeline` returned, or the folder that its `save` wrote.
        batch_key: column of `obs` with batches that the pipeline was trained on.
        label_key: column of `obs` that the clusters are compared with.
        ambient_profile: column of `var` with the soup's gene fractions, as in `tl.pipeline`.
        layer: of the counts; None is X.
        normalized: adds the gene fractions of the pipeline's genes, too.
        copy: works on a copy and returns it.

    Adds what `tl.pipeline` adds.

    Raises:
        DataError: an unknown batch, or too many genes missing.
        ModelFileError: the folder is no pipeline's.
    """
    target = (adata.to_memory() if adata.isbacked else adata.copy()) if copy else adata
    found = projected(
        target, model, batch_key=batch_key, label_key=label_key, ambient_profile=ambient_profile, layer=layer
    )
    found.add_to(target, normalized=normalized)
    return target if copy else None


@recorded
def vae(
    adata: "AnnData",
    *,
    batch_key: str | None = None,
    n_latent: int = 10,
    likelihood: str = "zinb",
    normalized: bool = False,
    max_epochs: int = 400,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Embeds cells by the variational autoencoder of scVI (`VAENormalizer`), trained on them.

    Reads the genes of `var["diffbio_highly_variable"]` if `pp.highly_variable` has run, else all.

    Adds `obsm["X_diffbio_latent"]` and, with `normalized=True`, `layers["diffbio_normalized"]`: gene
    fractions, NaN for genes that were not read.
    """
    genes = adata.var[slots.VARIABLE].to_numpy(bool) if slots.VARIABLE in adata.var else slice(None)
    data = {"counts": slots.counts(adata, layer)[:, genes]}
    n_batches = 1
    if batch_key is not None:
        data["batch_labels"], names = slots.batches(adata, batch_key)
        n_batches = len(names)
    config = VAENormalizerConfig(
        n_genes=data["counts"].shape[1], latent_dim=n_latent, likelihood=likelihood, n_batches=n_batches
    )
    op = VAENormalizer(config, rngs=nnx.Rngs(random_state))
    fit(op, data, max_epochs=max_epochs, seed=random_state, progress=progress)
    keys = ["latent_mean", "normalized"] if normalized else ["latent_mean"]
    result = _applied(op, data, *keys)
    adata.obsm[slots.LATENT] = result["latent_mean"]
    if normalized:
        adata.layers[slots.NORMALIZED] = slots.all_genes(result["normalized"], genes, adata.n_vars)


@recorded
def integrate(
    adata: "AnnData",
    *,
    batch_key: str,
    method: str = "harmony",
    n_clusters: int | None = None,
    theta: float = 2.0,
    use_rep: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Removes batch effects from an embedding (`DifferentiableHarmony`).

    Args:
        adata: cells x genes, changed in place.
        batch_key: column of `obs`.
        method: "harmony".
        n_clusters: of Harmony; None is one for every 30 cells, 100 at most, as published.
        theta: weight of the diversity penalty.
        use_rep: key of `obsm`; None is the PCA of log-normalised counts of the variable genes.
        layer: of the counts that PCA reads; None is X.
        random_state: recorded only; Harmony draws nothing at random.
        copy: works on a copy and returns it.

    Adds `obsm["X_diffbio_integrated"]`.
    """
    slots.choose(method, ["harmony"], "tl.integrate")
    labels, names = slots.batches(adata, batch_key)
    embeddings = slots.representation(adata, use_rep, layer)
    _at_most_cells(n_clusters, adata, "tl.integrate")
    config = BatchCorrectionConfig(
        n_clusters=max(1, min(100, round(len(embeddings) / 30))) if n_clusters is None else n_clusters,
        n_features=embeddings.shape[1],
        n_batches=len(names),
        theta=theta,
    )
    data = {"embeddings": embeddings, "batch_labels": labels}
    op = DifferentiableHarmony(config, rngs=nnx.Rngs(random_state))
    op.init_from(data)
    adata.obsm[slots.INTEGRATED] = _applied(op, data, "corrected_embeddings")["corrected_embeddings"]


@recorded
def embed(
    adata: "AnnData",
    *,
    method: str = "umap",
    use_rep: str | None = None,
    n_components: int = 2,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Draws cells on a map where neighbours stay neighbours (`DifferentiableUMAP`).

    `use_rep` None is the PCA of log-normalised counts of the variable genes.

    Adds `obsm["X_diffbio_umap"]`.
    """
    slots.choose(method, ["umap"], "tl.embed")
    features = slots.representation(adata, use_rep, layer)
    config = UMAPConfig(
        input_features=features.shape[1],
        n_components=n_components,
        n_neighbors=n_neighbors,
        min_dist=min_dist,
    )
    op = DifferentiableUMAP(config, rngs=nnx.Rngs(random_state))
    data = {"features": features}
    fit(op, data, seed=random_state, progress=progress)
    adata.obsm[slots.UMAP] = _applied(op, data, "embedding")["embedding"]


@recorded
def cluster(
    adata: "AnnData",
    *,
    method: str = "kmeans",
    n_clusters: int | None = None,
    temperature: float = 1.0,
    use_rep: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Groups cells by soft k-means (`SoftKMeansClustering`).

    `n_clusters` None is 10; `temperature` is in units of squared distance in the representation; `use_rep`
    None is the PCA of log-normalised counts of the variable genes.

    Adds `obs["diffbio_cluster"]` (categorical strings), `obs["diffbio_cluster_max_prob"]` and
    `obsm["diffbio_cluster_prob"]` (cells, clusters), whose rows sum to 1.
    """
    slots.choose(method, ["kmeans"], "tl.cluster")
    data = {"embeddings": slots.representation(adata, use_rep, layer)}
    _at_most_cells(n_clusters, adata, "tl.cluster")
    config = SoftClusteringConfig(
        n_clusters=10 if n_clusters is None else n_clusters,
        n_features=data["embeddings"].shape[1],
        temperature=temperature,
    )
    op = SoftKMeansClustering(config, rngs=nnx.Rngs(random_state))
    fit(op, data, seed=random_state, progress=False)
    add_results(adata, _applied(op, data, "cluster_assignments"))


def annotate(
    adata: "AnnData",
    *,
    mode: str | None = None,
    reference: "AnnData | str | Path | None" = None,
    labels_key: str | None = None,
    markers: "Mapping[str, Sequence[str]] | pd.DataFrame | str | Path | None" = None,
    model: Any = None,
    unlabeled_category: str = "Unknown",
    batch_key: str | None = None,
    other: str | None = None,
    min_confidence: float = 0.0,
    min_probability: float | None = None,
    multi_label: bool = False,
    majority_voting: bool = False,
    over_clustering: str | None = None,
    min_share: float = 0.0,
    n_top_genes: int | None = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    allow_non_integer: bool = False,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> Any:
    """Says which type every cell is (`DifferentiableCellAnnotator`; 'scanvi': `diffbio.models.SCANVI`).

    Genes are found by name, in any order; up to 20 % of a model's genes may be missing and count as zero.

    Args:
        adata: cells x genes, changed in place.
        mode: "celltypist": a classifier trained on labelled cells. "cellassign": marker genes alone. "scanvi":
            labelled and unlabelled cells together; a reference comes first, and these cells are mapped onto it as
            new batches (scArches), unless their batches are the reference's. None: by what is given, "celltypist"
            with labels.
        reference: annotated cells, an AnnData or a file; None: those of `adata` that have a label.
        labels_key: column of `obs` with the types.
        markers: {type: [genes]}, a table, or a .csv, .tsv, .yaml, .json or .gmt file.
        model: what an earlier call returned, or the folder that its `save` wrote; in place of reference and markers.
        unlabeled_category: value of labels_key for cells without a type (as are missing values and "NA").
        batch_key: column of `obs`, in the reference, too; "scanvi" reads it.
        other: name of one more type for cells without the markers of any; "cellassign" reads it.
        min_confidence: a cell whose confidence is lower is called "unassigned". In "celltypist" confidence is how usual
            the cell is for its nearest type; in "cellassign" how usual its counts are for the called type, times the
            probability; in "scanvi" the probability.
        min_probability: a cell is not called a type of lower probability, but "unassigned"; None is 0, with
            multi_label 0.5.
        multi_label: "celltypist" calls a cell every type whose probability by itself is at least min_probability,
            joined by "|".
        majority_voting: groups of like cells, or the clusters of a column over_clustering, take their commonest type.
        over_clustering: column of `obs`; None groups the cells by their latent positions, about 30 to a group.
        min_share: the share of a group that its commonest type must have; "Heterogeneous" below.
        n_top_genes: genes to train on; None is what suits the mode, 0 all.
        max_epochs: passes over the cells at most; None is what the mode prefers.
        layer: of the counts, in both data sets; None is X.
        allow_non_integer: accepts values that are not whole, such as decontaminated counts.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns (copy, model).

    Adds `obs["diffbio_cell_type"]` (categorical), `obs["diffbio_cell_type_max_prob"]`, `obs["diffbio_confidence"]`,
    `obsm["diffbio_cell_type_prob"]` (cells, types), whose rows sum to 1 and whose columns are
    `uns["diffbio"]["annotate"]["types"]`, with majority_voting `obs["diffbio_cell_type_voted"]`, with multi_label
    `obsm["diffbio_cell_type_independent_prob"]`, and `uns["diffbio"]["annotate"]`, which says how it was done.

    Returns:
        The annotator, for `model=` or its `save(folder)`.

    Raises:
        ConfigError: what is given contradicts itself, or does not suffice.
        DataError: the data are no counts, or lack the genes of the model.
    """
    calling = Calling(
        min_confidence=min_confidence, multi_label=multi_label, min_probability=min_probability,
        majority_voting=majority_voting, over_clustering=over_clustering, min_share=min_share,
    )
    target = (adata.to_memory() if adata.isbacked else adata.copy()) if copy else adata
    found = annotated(
        target, mode=mode, reference=reference, labels_key=labels_key, markers=markers, model=model,
        unlabeled_category=unlabeled_category, batch_key=batch_key, other=other, layer=layer, n_top_genes=n_top_genes,
        max_epochs=max_epochs, seed=random_state, progress=progress, calling=calling,
        allow_non_integer=allow_non_integer,
    )
    for slot, name in (("obs", "diffbio_cell_type_voted"), ("obsm", "diffbio_cell_type_independent_prob")):
        held: Any = getattr(target, slot)
        if name in held:  # of an earlier annotation
            del held[name]
    add_results(target, found.results(cast("pd.DataFrame", target.obs), seed=random_state))
    return (target, found.model) if copy else found.model


def _at_most_cells(n_clusters: int | None, adata: "AnnData", who: str) -> None:
    if n_clusters is not None and n_clusters > adata.n_obs:
        msg = f"{who}: n_clusters must be at most the number of cells, {adata.n_obs}, got {n_clusters}."
        raise ConfigError(msg)


def _applied(op: Operator, data: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The outputs `keys` of a fitted operator on all cells, some at a time."""
    return joined(apply_in_chunks(op, ArraySource(data), keys))
