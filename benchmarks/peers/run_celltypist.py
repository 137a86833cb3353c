"""CellTypist on the splits of ``benchmarks.quality.celltypist``; runs in the ``celltypist`` environment.

    OMP_NUM_THREADS=1 benchmarks/envs/celltypist/bin/python -m benchmarks.peers.run_celltypist

``normalize_total(1e4)``, ``log1p``, ``celltypist.train(feature_selection=False, max_iter=200, n_jobs=1)``,
``celltypist.annotate`` without majority voting. A cell's confidence is its largest probability (the sigmoid of the
decision score). One row for every split in ``benchmarks/results/celltypist_peer.json``; CPU-seconds, one thread.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from importlib.metadata import version

import anndata
import celltypist
import pandas as pd
import scanpy as sc
from benchmarks.quality.celltypist import PEER_RESULTS, Split, load, scores, splits


def annotated(split: Split) -> dict[str, float]:
    """Scores on the split's test cells, and CPU-seconds of training and of prediction."""
    data = load(split.data)
    parts = []
    for cells in (split.train, split.test):
        part = anndata.AnnData(data.counts[cells].copy(), var=pd.DataFrame(index=data.genes))
        sc.pp.normalize_total(part, target_sum=1e4)
        sc.pp.log1p(part)
        parts.append(part)
    reference, query = parts
    reference.obs["labels"] = data.labels(split.key)[split.train]
    start = time.process_time()
    model = celltypist.train(reference, labels="labels", feature_selection=False, max_iter=200, n_jobs=1)
    trained = time.process_time()
    found = celltypist.annotate(query, model=model, majority_voting=False)
    end = time.process_time()
    called = found.predicted_labels["predicted_labels"].astype(str).to_numpy()
    confidence = found.probability_matrix.to_numpy().max(1)
    return {**scores(split, called, confidence), "cpu_s": trained - start, "predict_cpu_s": end - trained}


def main() -> None:
    """All splits anew."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    rows = []
    for split in splits():
        found = {key: round(value, 4) for key, value in annotated(split).items()}
        rows.append({"split": split.name, **found})
        print(json.dumps(rows[-1]), flush=True)
    body = ",\n ".join(map(json.dumps, rows))
    head = ", ".join(f'"{name}": "{version(name)}"' for name in ("celltypist", "scikit-learn"))
    PEER_RESULTS.write_text(f'{{{head}, "threads": 1, "rows": [\n {body}\n]}}\n')


if __name__ == "__main__":
    main()
