"""Mode 'cellassign' on AnnData: marker genes alone say which types the cells are of."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from ..data.markers import marker_matrix
from ..data.matrix import library_sizes
from ..data.names import align_genes
from ..errors import DataError, DataWarning
from ..fitting import fit
from ..operators.singlecell import CellAnnotatorConfig, DifferentiableCellAnnotator
from ..pipelines.inference import with_missing_genes
from ..pipelines.run import Checked, opened_source
from .asked import Asked
from .classifier import answers

if TYPE_CHECKING:
    from anndata import AnnData

FEW_CELLS = 50


def train(
    data: "AnnData | str | Path", cells: Checked, markers: Mapping[str, Sequence[str]], asked: Asked
) -> DifferentiableCellAnnotator:
    """CellAssign of these cells, by the marker genes that they have."""
    n_cells = cells.matrix.shape[0]
    if n_cells < FEW_CELLS:
        message = f"annotate: {n_cells} cells are few to learn from how high a marker is where its type is not"
        warnings.warn(message, DataWarning, stacklevel=4)
    found = marker_matrix(markers, cells.var.index, other=asked.other)
    op = DifferentiableCellAnnotator(
        CellAnnotatorConfig(
            annotation_mode="cellassign", n_cell_types=len(found.types), n_genes=len(found.genes),
            marker_matrix_shape=found.matrix.shape, gene_likelihood="nb",
        ),
        rngs=nnx.Rngs(asked.seed),
    )
    source = opened_cells(data, cells, found.columns)
    source.constants["marker_matrix"] = found.matrix
    source.keys = (*source.keys, "marker_matrix")
    fit(op, source, **asked.fit_settings())
    op.note(tuple(found.types), tuple(found.genes), n_cells=source.n_cells, labels_key=None)
    op.markers = tuple(tuple(np.array(found.genes)[row > 0].tolist()) for row in found.matrix)
    return op


def ask(op: DifferentiableCellAnnotator, data: "AnnData | str | Path", cells: Checked) -> dict[str, Any]:
    """What CellAssign says of every cell."""
    alignment = align_genes(cells.var.index, op.genes)
    for name, genes in zip(op.types, op.markers, strict=True):
        if genes and set(genes) <= set(alignment.missing):
            msg = (
                f"annotate: the data have none of the markers of the type {name!r} ({', '.join(genes[:5])}), which the "
                "model could not call; train one with markers= on these cells"
            )
            raise DataError(msg)
    columns = alignment.columns
    return answers(op, with_missing_genes(opened_cells(data, cells, columns[columns >= 0]), columns))


def opened_cells(data: "AnnData | str | Path", cells: Checked, columns: np.ndarray) -> Any:
    """The counts of some genes of the cells, and their library sizes over all: markers alone do not tell the depth."""
    source = opened_source(data, cells.places, columns, cells.matrix.shape[1])
    source.cells["library_size"] = library_sizes(cells.matrix)
    source.keys = (*source.keys, "library_size")
    return source
