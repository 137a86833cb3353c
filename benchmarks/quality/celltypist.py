"""Data and splits (to be completed)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.sparse as sp
from benchmarks.quality.integration_data import RESULTS, data_dir

PEER_RESULTS = RESULTS / "celltypist_peer.json"
SEEDS = range(5)
CHEMISTRIES = ("10x_3p_v2", "10x_3p_v3", "10x_5p")


@dataclass(frozen=True)
class Cells:
    """Counts of genes seen in at least 3 cells, with what is known of the cells."""

    counts: sp.csr_matrix
    genes: np.ndarray
    obs: dict[str, np.ndarray]

    def labels(self, key: str) -> np.ndarray:
        """Names of the types."""
        return self.obs[key]


@dataclass(frozen=True)
class Split:
    """Cells to train on and to call; `unknown` is the type that training does not see."""

    name: str
    data: str
    key: str
    train: np.ndarray
    test: np.ndarray
    unknown: str | None = None


@cache
def load(name: str) -> Cells:
    """One data set; cells without a type are left out."""
    import anndata

    a = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    a = a[a.obs["cell_type"].astype(str) != "NA"]
    counts = sp.csr_matrix(a.X).astype(np.float32)
    seen = np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= 3)
    keys = [key for key in ("cell_type", "cell_type_fine", "batch") if key in a.obs]
    obs = {key: a.obs[key].astype(str).to_numpy() for key in keys}
    return Cells(counts[:, seen].tocsr(), a.var_names.to_numpy().astype(str)[seen], obs)


def splits() -> list[Split]:
    """All of them: 70/30 of two data sets, one chemistry held out, one type held out."""
    from sklearn.model_selection import train_test_split

    found = []
    for name in ("pbmc4k_ambient", "pbmc3k"):
        labels = load(name).labels("cell_type")
        for seed in SEEDS:
            train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
            found.append(Split(f"{name} {seed}", name, "cell_type", train, test))
    name = "pbmc_three_chemistries"
    batch = load(name).labels("batch")
    for key in ("cell_type", "cell_type_fine"):
        for held_out in CHEMISTRIES:
            new = batch == held_out
            found.append(Split(f"{key} {held_out}", name, key, np.flatnonzero(~new), np.flatnonzero(new)))
    labels = load("pbmc3k").labels("cell_type")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    for unknown in np.unique(labels):
        known, new = train[labels[train] != unknown], np.flatnonzero(labels == unknown)
        asked = np.concatenate([test[labels[test] != unknown], new])
        found.append(Split(f"unknown {unknown}", "pbmc3k", "cell_type", known, asked, str(unknown)))
    return found


def scores(split: Split, called: np.ndarray, confidence: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1; where a type is held out, the AUROC of 1 - confidence for it."""
    from sklearn.metrics import f1_score, roc_auc_score

    truth = load(split.data).labels(split.key)[split.test]
    if split.unknown is not None:
        return {"auroc": float(roc_auc_score(truth == split.unknown, 1.0 - confidence))}
    macro = f1_score(truth, called, average="macro")
    return {"accuracy": float((called == truth).mean()), "macro_f1": float(macro)}
