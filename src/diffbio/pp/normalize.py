"""Normalisation on AnnData."""

from typing import TYPE_CHECKING

from .. import slots
from ..data.transform import pearson_residuals, per_cell, shifted_log
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def normalize(
    adata: "AnnData", *, method: str = "shifted_log", layer: str | None = None, copy: bool = False
) -> None:
    """Makes the counts of cells comparable.

    Args:
        adata: cells x genes, changed in place.
        method: "shifted_log" is log(1 + x / size factor), size factors relative to the median cell; "cpm" is
            counts per million; "pearson_residuals" those of Lause et al. 2021 (dense).
        layer: of the counts; None is X.
        copy: works on a copy and returns it.

    Adds `layers["diffbio_normalized"]`.
    """
    slots.choose(method, ["shifted_log", "cpm", "pearson_residuals"], "pp.normalize")
    matrix = slots.counts(adata, layer)
    if method == "cpm":
        result = per_cell(matrix, total=1e6)
    else:
        result = shifted_log(matrix) if method == "shifted_log" else pearson_residuals(matrix)
    adata.layers[slots.NORMALIZED] = result
