"""CellTypist's side of `benchmarks.speed.annotate`; runs in the celltypist environment.

    benchmarks/envs/celltypist/bin/python -m benchmarks.speed.annotate_celltypist_side KNOWN.h5ad CELLS.h5ad

The model, which is learned from KNOWN, is kept beside CELLS.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import celltypist
import scanpy as sc


def normalised(path: str) -> tuple[Any, float]:
    """The cells of a file as CellTypist reads them, and the CPU-seconds of that."""
    adata = anndata.read_h5ad(path)
    adata.X.indptr = adata.X.indptr.astype(adata.X.indices.dtype)  # scanpy wants both alike
    start = time.process_time()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata, time.process_time() - start


def main() -> None:
    """Prints the seconds."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    known, cells = sys.argv[1:3]
    model = Path(cells).with_suffix(".celltypist.pkl")
    if sys.argv[3:] == ["--train"]:
        adata, _ = normalised(known)
        celltypist.train(
            adata, labels="cell_type", feature_selection=False, max_iter=200, n_jobs=1
        ).write(str(model))
        return
    if not model.exists():  # in a process of its own, whose memory does not count
        module = "benchmarks.speed.annotate_celltypist_side"
        subprocess.run([sys.executable, "-m", module, known, cells, "--train"], check=True)
    adata, spent = normalised(cells)
    start = time.process_time()
    found = celltypist.annotate(adata, model=str(model), majority_voting=False)
    annotated = time.process_time() - start
    called = found.predicted_labels["predicted_labels"].astype(str).to_numpy()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({
        "annotate_s": annotated, "normalise_s": spent, "rss": used.ru_maxrss * 1024,
        "cpu_s": used.ru_utime + used.ru_stime,
        "accuracy": float((called == adata.obs["cell_type"].astype(str).to_numpy()).mean()),
    }))


if __name__ == "__main__":
    main()
