"""Embeddings of the halves of `benchmarks.quality.joint_integration` by scVI or harmonypy, each in its environment.

    benchmarks/envs/scvi/bin/python -m benchmarks.peers.run_joint_integration scvi --seeds 0 1 2 3 4
    benchmarks/envs/scib/bin/python -m benchmarks.peers.run_joint_integration harmonypy --seeds 0 1 2 3 4

scVI (scvi-tools' defaults, its own number of epochs) trains on the seen half and encodes the unseen one; both halves
are seen in turn. harmonypy cannot place new cells: it sees the counts of both (scanpy's 30 components, theta 2), and
only the unseen half is scored. What is stored in benchmarks/cache is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
import warnings

import numpy as np
from benchmarks.quality.integration_data import DATASETS, IntegrationData, half_path, halves, load


def scvi(data: IntegrationData, seen: np.ndarray, unseen: np.ndarray, seed: int) -> np.ndarray:
    """Latent positions of the unseen cells."""
    import anndata
    import pandas as pd
    import scvi as tools
    import torch

    torch.set_num_threads(1)
    tools.settings.seed = seed

    def cells(rows: np.ndarray) -> anndata.AnnData:
        batch = pd.Categorical(data.batch_names[data.batch[rows]], categories=list(data.batch_names))
        obs = pd.DataFrame({"batch": batch}, index=[str(row) for row in rows])
        return anndata.AnnData(data.counts[rows].copy(), obs=obs)

    train = cells(seen)
    tools.model.SCVI.setup_anndata(train, batch_key="batch")
    model = tools.model.SCVI(train)
    model.train(accelerator="cpu", enable_progress_bar=False)
    return np.asarray(model.get_latent_representation(cells(unseen)))


def harmonypy(data: IntegrationData, seen: np.ndarray, unseen: np.ndarray, seed: int) -> np.ndarray:
    """Corrected components of the unseen cells, from a run on all."""
    from benchmarks.peers.run_scanpy_harmony import run_harmony, run_pca

    return run_harmony(run_pca(data, seed), data, seed)[unseen]


def main() -> None:
    """Makes what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("scvi", "harmonypy"))
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for seed, name, turn in itertools.product(asked.seeds, asked.datasets, (0, 1)):
        path = half_path(name, asked.method, seed, turn)
        if path.exists():
            continue
        data, start = load(name), time.process_time()
        seen, unseen = halves(data, seed, turn)
        found = {"scvi": scvi, "harmonypy": harmonypy}[asked.method](data, seen, unseen, seed)
        seconds = time.process_time() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(
            temporary, dataset=name, embedding=found, fingerprint=data.fingerprint(), cpu_s=seconds, unseen=unseen
        )
        temporary.replace(path)
        print(f"{name} {asked.method} {seed}, turn {turn}: {seconds:.0f} CPU-s", flush=True)


if __name__ == "__main__":
    main()
