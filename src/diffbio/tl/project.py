"""`tl.project`: new cells through a fitted pipeline."""

from typing import TYPE_CHECKING, Any

from .. import slots
from ..pipelines.projection import project as projected

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from ..pipelines.single_cell import SingleCellPipeline


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
    target = slots.target_of(adata, copy=copy)
    found = projected(
        target, model, batch_key=batch_key, label_key=label_key, ambient_profile=ambient_profile, layer=layer
    )
    found.add_to(target, normalized=normalized)
    return target if copy else None
