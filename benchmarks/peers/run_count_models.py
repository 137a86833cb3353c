"""scvi-tools' SCVI and SCANVI after their default training; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 nice -n 19 taskset -c 1 benchmarks/envs/scvi/bin/python -m benchmarks.peers.run_count_models

SCVI: ``train()`` as it is; held-out ELBO (mean of 5 draws) and log p(x) by 100 importance samples. SCANVI:
``from_scvi_model`` and ``train()`` as they are (10 % of the labels are withheld), and with ``train_size=1.0``,
scored on the unlabelled cells; beside it, with the same labels, logistic regression on the SCVI latent
space and on 30 principal components. Rows are added to ``benchmarks/results/count_models_scvi.json``;
finished ones are skipped. One thread; CPU-seconds of ``train()``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from typing import Any

import numpy as np
from benchmarks.quality.count_models import (
    CACHE,
    FRACTIONS,
    LABEL_DATA,
    LIKELIHOOD_DATA,
    RESULTS,
    Data,
    labelled_cells,
    load,
    logistic_regression,
    principal_components,
    scores,
    split,
)

OUTPUT = RESULTS / "count_models_scvi.json"
CONFIGS: dict[str, dict[str, Any]] = {
    "zinb_1": {},
    "nb_2": {"n_layers": 2, "gene_likelihood": "nb"},
}


def rows() -> list[dict[str, Any]]:
    """What has been measured so far."""
    return json.loads(OUTPUT.read_text())["rows"] if OUTPUT.exists() else []


def add(record: dict[str, Any]) -> None:
    """Add a row to the results file."""
    import scvi
    import torch

    record = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    body = ",\n ".join(json.dumps(row) for row in [*rows(), record])
    head = f'"scvi_tools": "{scvi.__version__}", "torch": "{torch.__version__}", "threads": 1'
    OUTPUT.write_text(f'{{{head}, "rows": [\n {body}\n]}}\n')
    print(json.dumps(record), flush=True)


def known(**wanted: Any) -> bool:
    """Whether such a row is there."""
    return any(all(row.get(k) == v for k, v in wanted.items()) for row in rows())


def annotated(data: Data, labels: np.ndarray | None = None) -> Any:
    """An AnnData of the data set."""
    import anndata
    import pandas as pd

    obs = pd.DataFrame({"batch": pd.Categorical(data.batch.astype(str))})
    obs.index = obs.index.astype(str)
    if labels is not None:
        obs["labels"] = pd.Categorical(labels)
    return anndata.AnnData(data.counts.astype(np.float32), obs=obs)


def scvi_model(data: Data, seed: int, config: str) -> Any:
    """The trained SCVI model, from the cache where it is there."""
    import scvi

    folder = CACHE / f"{data.name}__{config}__{seed}"
    adata = annotated(data)
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    if folder.exists() and known(kind="scvi", data=data.name, seed=seed, config=config):
        return scvi.model.SCVI.load(str(folder), adata, accelerator="cpu")
    model = scvi.model.SCVI(adata, **CONFIGS[config])
    cpu = time.process_time()
    model.train(accelerator="cpu", enable_progress_bar=False)
    cpu = time.process_time() - cpu
    train, held_out = split(data.counts.shape[0], seed)
    if set(held_out) != set(model.validation_indices):
        raise ValueError("scvi-tools' split is not the one of count_models.split")
    elbo = [float(model.get_elbo(indices=held_out)) for _ in range(5)]
    log_p = model.get_marginal_ll(indices=held_out, n_mc_samples=100, batch_size=len(held_out))
    train_elbo = float(model.get_elbo(indices=train))
    model.save(str(folder), overwrite=True)
    add(
        {
            "kind": "scvi", "data": data.name, "seed": seed, "config": config,
            "epochs": len(next(iter(model.history.values()))), "cpu_s": cpu, "elbo": float(np.mean(elbo)),
            "log_p": float(log_p), "train_elbo": train_elbo,
        }
    )  # fmt: skip
    np.save(CACHE / f"{folder.name}.npy", model.get_latent_representation())
    return model


def scanvi(data: Data, model: Any, latent: np.ndarray, pcs: np.ndarray, fraction: float, seed: int) -> None:
    """One draw of labels: SCANVI twice, and logistic regression twice."""
    import scvi

    mask = labelled_cells(data.cell_type, fraction, seed)
    at = {"data": data.name, "fraction": fraction, "label_seed": seed}
    for name, x in (("lr_scvi", latent), ("lr_pca", pcs)):
        if not known(kind=name, **at):
            add({"kind": name, **at, **logistic_regression(x, mask, data.cell_type)})
    labels = np.where(mask, [f"t{c:03d}" for c in data.cell_type], "unknown")
    for train_size in (1.0, 0.9):
        if known(kind="scanvi", train_size=train_size, **at) or (train_size < 1 and seed > 1):
            continue
        scvi.settings.seed = 0
        adata = annotated(data, labels)
        made = scvi.model.SCANVI.from_scvi_model(model, "unknown", labels_key="labels", adata=adata)
        cpu = time.process_time()
        # scvi-tools raises where the last minibatch has one cell, as with the 769 = 6 * 128 + 1 cells of scmix
        n_train = int(np.ceil(train_size * len(labels)))
        size = next(size for size in (128, 127, 126) if n_train % size != 1)
        made.train(accelerator="cpu", enable_progress_bar=False, train_size=train_size, batch_size=size)
        cpu = time.process_time() - cpu
        table = made.predict(soft=True)
        probabilities = np.zeros((len(labels), data.n_types))
        probabilities[:, [int(c[1:]) for c in table.columns]] = table.to_numpy()
        found = scores(probabilities[~mask], data.cell_type[~mask])
        add({"kind": "scanvi", **at, "train_size": train_size, "cpu_s": cpu, **found})


def main() -> None:
    """Everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = tuple(dict.fromkeys((*LIKELIHOOD_DATA, *LABEL_DATA)))
    parser.add_argument("--data", nargs="+", default=list(every), choices=every)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of SCVI")
    parser.add_argument("--label-seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--configs", nargs="+", default=["zinb_1"], choices=CONFIGS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.verbosity = 40
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in args.data:
        data = load(name)
        for config in args.configs:
            for seed in args.seeds:
                model = scvi_model(data, seed, config)
                if name not in LABEL_DATA or config != "zinb_1" or seed != 0:
                    continue
                latent, pcs = model.get_latent_representation(), principal_components(data.counts)
                for fraction in FRACTIONS:
                    for label_seed in args.label_seeds:
                        scanvi(data, model, latent, pcs, fraction, label_seed)


if __name__ == "__main__":
    main()
