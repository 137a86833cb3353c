"""Mode 'celltypist' on AnnData: a classifier trained on annotated cells, asked about others by gene names."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from flax import nnx
from scipy import sparse

from ..data.matrix import DiskMatrix, row_chunks
from ..data.names import align_genes
from ..data.source import ArraySource
from ..data.type_genes import type_genes
from ..errors import DataError
from ..fitting import fit
from ..operators.singlecell import CellAnnotatorConfig, DifferentiableCellAnnotator
from ..pipelines.inference import joined, map_chunks, with_missing_genes
from ..pipelines.run import Checked, opened_source
from .asked import Asked

if TYPE_CHECKING:
    from anndata import AnnData

N_TOP_GENES = 3000
N_MARKERS = 20
CELLS_FOR_MARKERS = 100  # of a type
SPARE_DIM = 16  # of the latent space, beside what a linear classifier needs; confidence is told by them, too


def train(known: Checked, genes_there: pd.Index, asked: Asked) -> DifferentiableCellAnnotator:
    """A classifier of the labelled cells of `known`, on genes that the other cells have, too."""
    codes, types = asked.labels(known)
    labelled = np.flatnonzero(codes >= 0)
    matrix = counts_in_memory(known.matrix, labelled)
    codes = codes[labelled]
    shared = genes_in_both(known.var.index, genes_there)
    width = N_TOP_GENES if asked.n_top_genes is None else asked.n_top_genes or len(shared)
    columns = shared[type_genes(matrix[:, shared], codes, width)]
    op = DifferentiableCellAnnotator(
        CellAnnotatorConfig(
            annotation_mode="celltypist", n_cell_types=len(types), n_genes=len(columns),
            latent_dim=len(types) - 1 + SPARE_DIM, gene_likelihood="nb",
        ),
        rngs=nnx.Rngs(asked.seed),
    )
    source = ArraySource({"counts": matrix[:, columns], "labels": codes})
    fit(op, source, **asked.fit_settings())
    genes = tuple(map(str, known.var.index[columns]))
    op.note(tuple(types), genes, n_cells=len(labelled), labels_key=asked.labels_key)
    op.markers = top_markers(op, source, codes)
    return op


def ask(op: DifferentiableCellAnnotator, data: "AnnData | str | Path", cells: Checked) -> dict[str, Any]:
    """What the classifier says of every cell."""
    columns = align_genes(cells.var.index, op.genes).columns
    # depth is told by the model's genes alone: other genes of the cells, more or fewer, then make no difference
    source = opened_source(data, cells.places, columns[columns >= 0], cells.matrix.shape[1])
    return answers(op, with_missing_genes(source, columns))


def answers(op: DifferentiableCellAnnotator, source: Any) -> dict[str, Any]:
    """Answers of an operator about all cells of a source, as `Annotation` holds them."""
    graph, state = nnx.split(op)
    found = joined(map_chunks(lambda state, batch: nnx.merge(graph, state).judge(batch), state, source))
    return {
        "types": op.types, "probabilities": found["probabilities"], "confidence": found["confidence"],
        "independent": found.get("independent"), "latent": found["latent"],
        "markers": dict(zip(op.types, map(list, op.markers), strict=True)),
    }


def top_markers(op: DifferentiableCellAnnotator, source: ArraySource, codes: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """For each type the genes that raise its logit most, over some of its cells."""
    some = np.concatenate([np.flatnonzero(codes == k)[:CELLS_FOR_MARKERS] for k in range(len(op.types))])
    scores = np.asarray(op.marker_scores({**source.take(some)}))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :N_MARKERS]
    return tuple(tuple(op.genes[g] for g in row if scores[t, g] > 0) for t, row in enumerate(order))


def genes_in_both(reference: pd.Index, cells: pd.Index) -> np.ndarray:
    """Positions in the reference of the genes that the cells have, too.

    Raises:
        DataError: there are hardly any.
    """
    shared = np.flatnonzero(reference.isin(cells))
    if len(shared) < 2:
        msg = (
            f"annotate: the reference's {len(reference)} genes ({', '.join(map(str, reference[:3]))}, ...) and the "
            f"{len(cells)} of the cells ({', '.join(map(str, cells[:3]))}, ...) have {len(shared)} names in common; "
            "use the same names, symbols or identifiers"
        )
        raise DataError(msg)
    return shared


def counts_in_memory(matrix: Any, rows: np.ndarray | None = None) -> Any:
    """Counts of the cells `rows` (ascending; None: all) as CSR, of a matrix that may lie on disk."""
    if not isinstance(matrix, DiskMatrix):
        held = cast("Any", sparse.csr_array)(matrix)
        return held if rows is None else held[rows]
    parts = []
    for start, chunk in row_chunks(matrix):
        n = len(chunk.starts) - 1
        shape = (n, matrix.shape[1])
        part = cast("Any", sparse.csr_array)((chunk.values, chunk.columns, chunk.starts), shape=shape)
        wanted = np.arange(n) if rows is None else rows[(rows >= start) & (rows < start + n)] - start
        parts.append(part[wanted])
    return sparse.vstack(parts, format="csr")
