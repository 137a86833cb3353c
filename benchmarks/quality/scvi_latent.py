"""Latent space of SCVI after its default training beside scvi-tools: scib-metrics, one table.

    uv run python -m benchmarks.quality.scvi_latent                  # ours anew (3 seeds, about 20 CPU minutes)
    uv run python -m benchmarks.quality.scvi_latent --stored         # print what is stored, run nothing

`diffbio.models.SCVI(adata).train()`, all defaults, on the four data sets of `integration_data.py` (2,000 variable
genes, batch_key), scored as every embedding of `integration.py` by `score_integration.py`: bio = mean(NMI, ARI,
cell-type silhouette, cLISI), batch = mean(batch silhouette, iLISI, graph connectivity), total = 0.6 bio + 0.4 batch,
NMI and ARI of Leiden on the embedding at the best of 20 resolutions. Peer: scvi-tools' SCVI, all defaults, same cells,
genes and seeds; baseline: PCA of log counts, uncorrected. Means over seeds.

Bar: total at least scvi-tools' on average over the data sets.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import sys
import time
import warnings

import numpy as np
from benchmarks.quality.integration import run_module, stored_scores
from benchmarks.quality.integration_data import DATASETS, SEEDS, embedding_path, load, save_embedding

OURS = "diffbio_scvi"
METHODS = {OURS: "ours", "scvi": "scvi-tools", "scanpy": "PCA"}


def run_ours(dataset: str, seed: int) -> None:
    """Train on one data set and keep the latent space."""
    import anndata
    import pandas as pd

    from diffbio.models import SCVI

    data = load(dataset)
    obs = pd.DataFrame({"batch": pd.Categorical(data.batch_names[data.batch])})
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(data.counts, obs=obs)
    SCVI.setup_anndata(adata, batch_key="batch")
    cpu = time.process_time()
    model = SCVI(adata, seed=seed)
    model.train(progress=False)
    cpu = time.process_time() - cpu
    save_embedding(data, OURS, seed, embedding=model.get_latent_representation())
    print(f"{dataset} {seed}: {cpu:.0f} CPU s", flush=True)


def measures(run: dict[str, float]) -> np.ndarray:
    """Bio, batch and total of one stored score, with Leiden at the best resolution."""
    bio = np.mean([run["leiden_nmi"], run["leiden_ari"], run["asw_label"], run["clisi"]])
    return np.array([bio, run["batch"], run["leiden_total"]])


def main() -> int:
    """Runs what was asked for and prints the table; exit code 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--stored", action="store_true", help="run nothing, print stored scores")
    parser.add_argument("--missing", action="store_true", help="run only what has no latent space yet")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not args.stored:
        for seed in args.seeds:
            for name in args.datasets:
                if not (args.missing and embedding_path(name, OURS, seed).exists()):
                    run_ours(name, seed)
        chosen = ["--datasets", *args.datasets, "--seeds", *map(str, args.seeds)]
        run_module("scib", "benchmarks.quality.score_integration", "--methods", OURS, *chosen)
    runs = {(run["dataset"], run["method"], run["seed"]): run for run in stored_scores()}
    print("| bio / batch / total | seeds | ours | scvi-tools | PCA | bar: total | |\n" + "|---" * 7 + "|")
    means = []
    for name in args.datasets:
        seeds = [seed for seed in args.seeds if all((name, method, seed) in runs for method in METHODS)]
        if not seeds:
            print(f"| {name} | 0 | not measured |")
            continue
        if len({runs[name, method, seed]["fingerprint"] for method in METHODS for seed in seeds}) > 1:
            raise ValueError(f"{name}: stored scores are of other cells or genes")
        means.append([np.mean([measures(runs[name, method, s]) for s in seeds], 0) for method in METHODS])
        print(_line(name, len(seeds), means[-1]))
    if len(means) < len(args.datasets):
        return 1
    average = np.mean(means, 0)
    print(_line("average", len(args.seeds), average, verdict=True))
    return int(average[0][2] < average[1][2])


def _line(name: str, n_seeds: int, rows: np.ndarray | list[np.ndarray], *, verdict: bool = False) -> str:
    cells = [" / ".join(f"{value:.3f}" for value in row) for row in rows]
    met = ("met" if rows[0][2] >= rows[1][2] else "NOT met") if verdict else ""
    return f"| {name} | {n_seeds} | {' | '.join(cells)} | {rows[1][2]:.3f} | {met} |"


if __name__ == "__main__":
    sys.exit(main())
