"""`tl.annotate`: the type of every cell."""

from typing import TYPE_CHECKING, Any, cast

from .. import slots
from ..annotation import Calling
from ..annotation import annotate as annotated
from ..data.write import add_results

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData


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
    target = slots.target_of(adata, copy=copy)
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
