"""Data, splits, labels and scores of the SCVI and SCANVI benchmarks; the same for both sides.

Needs numpy, scipy and scikit-learn alone once a data set is prepared (scanpy prepares `pbmc3k`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from benchmarks.quality import integration_data
from benchmarks.speed.make_counts import make_counts

REPO = integration_data.REPO
RESULTS = integration_data.RESULTS
CACHE = REPO / "benchmarks" / "cache" / "count_models"
LIKELIHOOD_DATA = ("pbmc_three_chemistries", "kang_pbmc_ifnb", "pbmc3k", "generated_20000")
LABEL_DATA = ("pbmc_three_chemistries", "scmix_cell_lines", "pbmc3k", "generated_6000")
FRACTIONS = (0.01, 0.05, 0.1)
GENERATED = {
    "generated_6000": {"n_cells": 6_000, "n_genes": 1_000, "n_types": 10, "depth": 450.0},
    "generated_20000": {"n_cells": 20_000, "n_genes": 2_000, "n_types": 12, "depth": 530.0},
}


@dataclass(frozen=True)
class Data:
    """Counts with the codes of batches and cell types."""

    name: str
    counts: sp.csr_matrix
    batch: np.ndarray
    cell_type: np.ndarray

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return int(self.batch.max()) + 1

    @property
    def n_types(self) -> int:
        """Number of cell types."""
        return int(self.cell_type.max()) + 1

    def annotated(self, cells: np.ndarray | None = None, labels: np.ndarray | None = None) -> Any:
        """An AnnData of these cells (None: all), with obs "batch" and, where given, "labels" of all cells."""
        import anndata
        import pandas as pd

        chosen = np.arange(self.counts.shape[0]) if cells is None else cells
        obs = pd.DataFrame({"batch": pd.Categorical(self.batch.astype(str))}).iloc[chosen]
        if labels is not None:
            obs["labels"] = pd.Categorical(labels[chosen])
        obs.index = chosen.astype(str)
        return anndata.AnnData(self.counts[chosen].astype(np.float32), obs=obs)


def load(name: str) -> Data:
    """One data set: at most 2,000 variable genes, raw counts; generated ones are the same every time."""
    if name in GENERATED:
        made = make_counts(**GENERATED[name])
        counts = sp.csr_matrix((made.data, made.indices, made.indptr), shape=made.shape)
        return Data(name, counts, made.batch, made.cell_type)
    if name in integration_data.DATASETS:
        data = integration_data.load(name)
        return Data(name, data.counts, data.batch, data.cell_type)
    path = CACHE / f"{name}.npz"
    if not path.exists():
        data = integration_data.prepare(name)
        integration_data._save(data, path)
    with np.load(path) as file:
        counts = sp.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
        return Data(name, counts, file["batch"], file["cell_type"])


def split(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out cells (10 %): the split that scvi-tools makes of the same seed."""
    order = np.random.RandomState(seed).permutation(n_cells)
    n_held_out = n_cells - int(np.ceil(0.9 * n_cells))
    return order[n_held_out:], order[:n_held_out]


def labelled_cells(cell_type: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mask of the labelled cells: that fraction of every type, one at least."""
    rng = np.random.default_rng(100 + seed)
    mask = np.zeros(len(cell_type), bool)
    for code in np.unique(cell_type):
        cells = np.flatnonzero(cell_type == code)
        mask[rng.permutation(cells)[: max(1, round(fraction * len(cells)))]] = True
    return mask


def principal_components(counts: sp.csr_matrix, n: int = 30) -> np.ndarray:
    """Scores of log counts per 10,000."""
    from sklearn.decomposition import PCA

    dense = counts.toarray()
    return PCA(n, svd_solver="full").fit_transform(np.log1p(1e4 * dense / dense.sum(1, keepdims=True)))


def scores(probabilities: np.ndarray, cell_type: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1, expected calibration error (15 bins) and negative log likelihood."""
    from sklearn.metrics import f1_score

    called, confidence = probabilities.argmax(1), probabilities.max(1)
    right = called == cell_type
    bins = np.minimum((confidence * 15).astype(int), 14)
    ece = sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    log_p = np.log(np.clip(probabilities[np.arange(len(called)), cell_type], 1e-12, 1.0))
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(f1_score(cell_type, called, average="macro")),
        "ece": float(ece),
        "nll": float(-log_p.mean()),
    }


def logistic_regression(x: np.ndarray, labelled: np.ndarray, cell_type: np.ndarray) -> dict[str, float]:
    """Scores on the unlabelled cells of scikit-learn's logistic regression with its defaults."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000).fit(x[labelled], cell_type[labelled])
    probabilities = np.zeros((int((~labelled).sum()), int(cell_type.max()) + 1))
    probabilities[:, fitted.classes_] = fitted.predict_proba(x[~labelled])
    return scores(probabilities, cell_type[~labelled])
