"""Mode 'scanvi' on AnnData: labelled and unlabelled cells together, or a reference and a query mapped onto it."""

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.genes import highly_variable_genes
from ..data.names import align_genes, column_of
from ..errors import DataError
from ..models import SCANVI, SCVI
from ..pipelines.run import Checked
from .asked import Asked
from .classifier import counts_in_memory, genes_in_both

N_TOP_GENES = 2000
BATCH, LABELS = "batch", "labels"  # columns that the models are set up with
UNLABELLED = "(unlabelled)"
REFERENCE, QUERY = "reference", "query"  # batches, where none are named


def train(known: Checked, cells: Checked, asked: Asked) -> SCANVI:
    """SCVI of the cells of `known`, then SCANVI with its labels, by their defaults; genes that `cells` have, too."""
    codes, types = asked.labels(known)
    labels = np.where(codes >= 0, np.array(types, dtype=object)[codes], UNLABELLED)
    shared = genes_in_both(known.var.index, cells.var.index)
    matrix = counts_in_memory(known.matrix)[:, shared]
    batches = _batches(known, asked.batch_key, REFERENCE)
    width = N_TOP_GENES if asked.n_top_genes is None else asked.n_top_genes
    if width and width < len(shared):
        batch_codes = None if asked.batch_key is None else pd.factorize(batches)[0]
        found = highly_variable_genes(matrix, n_top_genes=width, batch_labels=batch_codes)
        chosen = np.flatnonzero(found["highly_variable"].to_numpy())
        shared, matrix = shared[chosen], matrix[:, chosen]
    adata = _adata(matrix, known.var.index[shared], batches, labels, known.obs.index)
    SCVI.setup_anndata(adata, batch_key=BATCH, labels_key=LABELS)
    scvi = SCVI(adata, seed=asked.seed)
    scvi.train(max_epochs=asked.max_epochs, progress=asked.progress)
    model = SCANVI.from_scvi_model(scvi, UNLABELLED)
    model.train(max_epochs=_at_most(asked, model.fit_defaults["max_epochs_pretrained"]), progress=asked.progress)
    return model


def ask(model: SCANVI, cells: Checked, asked: Asked, *, own: bool) -> dict[str, Any]:
    """What SCANVI says of every cell: of its `own`, that it was trained with, or of others mapped onto them first.

    A labelled cell that it was trained with is what its label says, with probability 1.
    """
    setup = model.registry.setup
    if setup.get("batch_key") != BATCH or setup.get("labels_key") != LABELS:
        msg = "annotate: this SCANVI was set up with columns of its own; use its load_query_data, train and predict."
        raise DataError(msg)
    mapped = model if own else _mapped(model, cells, asked)
    table = mapped.predict(soft=True)
    types = tuple(map(str, table.columns))
    p = table.to_numpy()
    confidence = p.max(1)
    if own:
        assert model.adata is not None
        labels = model.adata.obs[LABELS].to_numpy(dtype=object)
        is_known = labels != UNLABELLED
        p = np.where(is_known[:, None], labels[:, None] == np.array(types, dtype=object)[None], p).astype(p.dtype)
        confidence = np.where(is_known, 1.0, confidence)
    return {
        "types": types, "probabilities": p, "confidence": confidence, "independent": None,
        "latent": mapped.get_latent_representation(), "markers": {},
    }


def _mapped(model: SCANVI, cells: Checked, asked: Asked) -> SCANVI:
    """The query on the reference (scArches): its batches get weights of their own, all others stay."""
    alignment = align_genes(cells.var.index, model.registry.var_names)
    matrix = alignment.apply(counts_in_memory(cells.matrix))
    labels = np.full(len(cells.obs), UNLABELLED, dtype=object)
    names = pd.Index(model.registry.var_names)
    query = _adata(matrix, names, _batches(cells, asked.batch_key, QUERY), labels, cells.obs.index)
    mapped = SCANVI.load_query_data(query, model)
    if len(mapped.new_batches):
        mapped.train(max_epochs=asked.max_epochs, progress=asked.progress, seed=asked.seed)
    return mapped


def _at_most(asked: Asked, epochs: int) -> int | None:
    return None if asked.max_epochs is None else min(asked.max_epochs, epochs)


def _batches(cells: Checked, key: str | None, name: str) -> np.ndarray:
    if key is None:
        return np.full(len(cells.obs), name, dtype=object)
    return column_of(cells.obs, key).astype(str).to_numpy(dtype=object)


def _adata(matrix: Any, genes: pd.Index, batches: np.ndarray, labels: np.ndarray, names: pd.Index) -> AnnData:
    obs = pd.DataFrame({BATCH: pd.Categorical(batches), LABELS: pd.Categorical(labels)}, index=names)
    return AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes))
