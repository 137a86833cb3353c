"""Variable genes on AnnData."""

from typing import TYPE_CHECKING

from .. import slots
from ..data.genes import highly_variable_genes
from ..data.source import counts_of
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def highly_variable(
    adata: "AnnData",
    *,
    n_top_genes: int = 2000,
    batch_key: str | None = None,
    layer: str | None = None,
    copy: bool = False,
) -> None:
    """Finds the genes that vary more than their mean explains, batch by batch (seurat_v3).

    Adds `var["diffbio_highly_variable"]`.
    """
    found = highly_variable_genes(
        counts_of(adata, layer=layer) if adata.isbacked else slots.counts(adata, layer),
        n_top_genes=n_top_genes,
        batch_labels=slots.labels(adata, batch_key),
    )
    adata.var[slots.VARIABLE] = found["highly_variable"].to_numpy()
