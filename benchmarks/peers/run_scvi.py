"""Train scVI (scvi-tools defaults) on the integration data sets; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 nice -n 15 benchmarks/envs/scvi/bin/python -m benchmarks.peers.run_scvi

Saves the latent space of every data set and seed in ``benchmarks/cache`` and adds times and
held-out likelihood to ``benchmarks/results/integration_scvi.json``. The clusters are made by
the scorer (Leiden, as for every other embedding). Finished runs are skipped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings

import numpy as np
from benchmarks.quality.integration_data import (
    DATASETS,
    RESULTS,
    SEEDS,
    IntegrationData,
    embedding_path,
    load,
    save_embedding,
)

OUTPUT = RESULTS / "integration_scvi.json"


def train(data: IntegrationData, seed: int, max_epochs: int | None) -> dict[str, object]:
    """Train one SCVI model with default settings, save its latent space, return the figures."""
    import anndata
    import pandas as pd
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = seed
    obs = pd.DataFrame({"batch": pd.Categorical(data.batch_names[data.batch])})
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(data.counts, obs=obs)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    wall, cpu = time.perf_counter(), time.process_time()
    model.train(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    held_out = model.validation_indices
    elbo = [float(model.get_elbo(indices=held_out)) for _ in range(5)]
    error = [float(model.get_reconstruction_error(indices=held_out)["reconstruction_loss"]) for _ in range(5)]
    latent = model.get_latent_representation()
    save_embedding(data, "scvi", seed, embedding=latent, held_out=np.asarray(held_out))
    return {
        "dataset": data.name,
        "seed": seed,
        "fingerprint": data.fingerprint(),
        "scvi_tools": scvi.__version__,
        "torch": torch.__version__,
        "epochs": len(next(iter(model.history.values()))),
        "train_cpu_s": round(cpu, 1),
        "train_wall_s": round(wall, 1),
        "n_held_out": len(held_out),
        "held_out_elbo": round(float(np.mean(elbo)), 3),
        "held_out_reconstruction": round(float(np.mean(error)), 3),
    }


def append(record: dict[str, object]) -> None:
    """Add one run to the results file, replacing an older run of the same data set and seed."""
    runs = json.loads(OUTPUT.read_text())["runs"] if OUTPUT.exists() else []
    key = (record["dataset"], record["seed"])
    runs = [run for run in runs if (run["dataset"], run["seed"]) != key]
    runs = sorted([*runs, record], key=lambda run: (run["dataset"], run["seed"]))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"method": "scvi", "threads": 1, "runs": runs}, indent=1) + "\n")


def main() -> None:
    """Run every data set and seed asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--max-epochs", type=int, help="default: scVI's own heuristic")
    parser.add_argument("--force", action="store_true", help="run again what is already there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for seed in args.seeds:
        for name in args.datasets:
            if embedding_path(name, "scvi", seed).exists() and not args.force:
                continue
            record = train(load(name), seed, args.max_epochs)
            append(record)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
