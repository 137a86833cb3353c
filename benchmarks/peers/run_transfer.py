"""scvi-tools' label transfer to a new batch by ``load_query_data``; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 nice -n 19 taskset -c 1 benchmarks/envs/scvi/bin/python -m benchmarks.peers.run_transfer

Reference: the other chemistries of ``pbmc_three_chemistries`` with all their labels; query: the held-out one,
without labels. ``SCVI.train()``, ``SCANVI.from_scvi_model``, ``load_query_data``, ``predict``, in two settings:
"defaults", with ``max_epochs=100, plan_kwargs={"weight_decay": 0.0}`` for the query alone, and "scarches", the
arguments of scvi-tools' scArches tutorial. Rows are added to ``benchmarks/results/transfer_scvi.json``; finished
ones are skipped. One thread; CPU-seconds of the three ``train()``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from typing import Any

import numpy as np
from benchmarks.quality.count_models import RESULTS, load, scores

OUTPUT = RESULTS / "transfer_scvi.json"
DATA = "pbmc_three_chemistries"
LAYERS = {
    "use_layer_norm": "both",
    "use_batch_norm": "none",
    "encode_covariates": True,
    "dropout_rate": 0.2,
    "n_layers": 2,
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of SCVI, and of SCANVI.train
    "defaults": ({}, {}),
    "scarches": (LAYERS, {"max_epochs": 20, "n_samples_per_label": 100}),
}


def rows() -> list[dict[str, Any]]:
    """What has been measured so far."""
    return json.loads(OUTPUT.read_text())["rows"] if OUTPUT.exists() else []


def transfer(batch: int, settings: str, seed: int) -> dict[str, Any]:
    """Scores on the held-out chemistry, before and after the query's training."""
    import scvi

    data = load(DATA)
    names = np.array([f"t{code:03d}" for code in data.cell_type])
    query = data.batch == batch
    reference = data.annotated(np.flatnonzero(~query), names)
    new = data.annotated(np.flatnonzero(query), np.full(len(names), "unknown"))
    model_kwargs, scanvi_kwargs = SETTINGS[settings]
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch", labels_key="labels")
    model = scvi.model.SCVI(reference, **model_kwargs)
    cpu = time.process_time()
    model.train(**quiet)
    model = scvi.model.SCANVI.from_scvi_model(model, "unknown")
    model.train(**quiet, **scanvi_kwargs)
    reference_cpu = time.process_time() - cpu
    mapped = scvi.model.SCANVI.load_query_data(new, model)
    mapped.is_trained = True
    untrained = mapped.predict(soft=True)
    cpu = time.process_time()
    mapped.is_trained = False
    mapped.train(max_epochs=100, plan_kwargs={"weight_decay": 0.0}, **quiet)
    cpu = time.process_time() - cpu
    found = {}
    for name, table in (("", mapped.predict(soft=True)), ("untrained_", untrained)):
        p = np.zeros((int(query.sum()), data.n_types))
        p[:, [int(c[1:]) for c in table.columns]] = table.to_numpy()
        found |= {f"{name}{key}": value for key, value in scores(p, data.cell_type[query]).items()}
    return {**found, "reference_cpu_s": reference_cpu, "query_cpu_s": cpu}


def main() -> None:
    """Everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.verbosity = 40
    for seed in args.seeds:
        for settings in args.settings:
            for batch in args.batches:
                at = {"batch": batch, "settings": settings, "seed": seed}
                if any(all(row[k] == v for k, v in at.items()) for row in rows()):
                    continue
                found = {k: round(v, 4) for k, v in transfer(batch, settings, seed).items()}
                body = ",\n ".join(json.dumps(row) for row in [*rows(), at | found])
                head = f'"scvi_tools": "{scvi.__version__}", "torch": "{torch.__version__}", "threads": 1'
                OUTPUT.write_text(f'{{{head}, "rows": [\n {body}\n]}}\n')
                print(json.dumps(at | found), flush=True)


if __name__ == "__main__":
    main()
