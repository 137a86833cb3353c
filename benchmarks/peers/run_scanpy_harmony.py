"""Run scanpy's PCA and harmonypy on the integration data sets; runs in the ``scib`` environment.

    OMP_NUM_THREADS=1 nice -n 15 benchmarks/envs/scib/bin/python -m benchmarks.peers.run_scanpy_harmony

scanpy: counts to 10,000 per cell, log1p, 30 principal components, no scaling.
harmonypy: its defaults (theta 2, version 2's estimated lambda) on those components.
Embeddings go to ``benchmarks/cache``, times to ``benchmarks/results``; the scorer adds the
Leiden clusters, with the same settings for every embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version

import numpy as np
from benchmarks.quality.integration_data import (
    DATASETS,
    RESULTS,
    SEEDS,
    IntegrationData,
    load,
    save_embedding,
)

OUTPUT = RESULTS / "integration_scanpy_harmony.json"
N_COMPONENTS = 30


def run_pca(data: IntegrationData, seed: int) -> np.ndarray:
    """Return scanpy's principal components of the log-normalised counts."""
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(data.counts.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=N_COMPONENTS, random_state=seed)
    return np.asarray(adata.obsm["X_pca"], dtype=np.float32)


def run_harmony(components: np.ndarray, data: IntegrationData, seed: int) -> np.ndarray:
    """Return harmonypy's corrected components."""
    import harmonypy
    import pandas as pd

    batches = pd.DataFrame({"batch": data.batch_names[data.batch]})
    result = harmonypy.run_harmony(components, batches, "batch", random_state=seed, verbose=False)
    corrected = np.asarray(result.Z_corr, dtype=np.float32)
    return corrected if corrected.shape == components.shape else corrected.T


def timed(function, *args) -> tuple[np.ndarray, float]:
    """Call a function; return its value and the CPU seconds it took."""
    start = time.process_time()
    value = function(*args)
    return value, time.process_time() - start


def main() -> None:
    """Run both methods on every data set and seed asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    run_pca(load(args.datasets[0]), 0)  # imports and compiles, outside the times
    runs = []
    for name in args.datasets:
        data = load(name)
        for seed in args.seeds:
            components, pca_s = timed(run_pca, data, seed)
            corrected, harmony_s = timed(run_harmony, components, data, seed)
            save_embedding(data, "scanpy", seed, embedding=components)
            save_embedding(data, "harmonypy", seed, embedding=corrected)
            record = {
                "dataset": name,
                "seed": seed,
                "fingerprint": data.fingerprint(),
                "pca_cpu_s": round(pca_s, 2),
                "harmony_cpu_s": round(harmony_s, 2),
            }
            runs.append(record)
            print(json.dumps(record), flush=True)
    versions = {name: version(name) for name in ("scanpy", "harmonypy", "scikit-learn")}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
