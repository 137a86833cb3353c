"""The scvi-tools side of `benchmarks/speed/models.py`; runs in the ``scvi`` environment, by path.

Prints one JSON object, of the same keys as our side.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings


def main() -> None:
    """Trains, embeds and predicts once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="SCVI")
    parser.add_argument("--likelihood", default="zinb")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--first-step", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    import anndata
    import lightning.pytorch as pl
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp
    import scvi
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    scvi.settings.seed = 0
    scvi.settings.verbosity = logging.WARNING

    class Clock(pl.Callback):
        """Takes CPU and wall time where an epoch begins."""

        def __init__(self) -> None:
            self.stamps: list[tuple[float, float]] = []
            self.end = (0.0, 0.0)

        def on_train_epoch_start(self, *_) -> None:
            """Note them."""
            self.stamps.append((time.process_time(), time.perf_counter()))

        def on_train_epoch_end(self, *_) -> None:
            """Note the end of the last one."""
            self.end = (time.process_time(), time.perf_counter())

    with np.load(args.data) as file:
        counts = sp.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
        batch, kind = file["batch"], file["cell_type"]
    labels = np.where(np.arange(len(kind)) % 10 == 0, [f"t{code}" for code in kind], "unknown")
    names = [f"c{row}" for row in range(len(kind))]
    obs = pd.DataFrame({"batch": [f"b{code}" for code in batch], "labels": labels}, index=names)
    adata = anndata.AnnData(counts, obs=obs)
    clock = Clock()
    how = {"accelerator": "cpu", "enable_progress_bar": False, "train_size": 1.0}
    if args.first_step:
        adata = adata[:128].copy()
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        scvi.model.SCVI(adata).train(max_epochs=1, **how)
        print(json.dumps({"first_step_cpu": round(time.process_time(), 2)}))
        return
    cls = getattr(scvi.model, args.model)
    labelled = {"labels_key": "labels", "unlabeled_category": "unknown"} if args.model == "SCANVI" else {}
    cls.setup_anndata(adata, batch_key="batch", **labelled)
    model = cls(adata, gene_likelihood=args.likelihood)
    model.train(max_epochs=args.epochs, batch_size=args.batch_size, callbacks=[clock], **how)
    stamps = np.asarray([*clock.stamps, clock.end])
    cpu, wall = np.median(np.diff(stamps[1:], axis=0), axis=0)
    found = {"train_cpu": adata.n_obs / cpu, "train_wall": adata.n_obs / wall}
    questions = {"latent": model.get_latent_representation}
    if args.model == "SCANVI":
        questions["predict"] = lambda: model.predict(soft=True)
    for name, question in questions.items():
        for _ in range(2):
            cpu, wall = time.process_time(), time.perf_counter()
            question()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found |= {f"{name}_cpu": adata.n_obs / cpu, f"{name}_wall": adata.n_obs / wall}
    print(json.dumps({name: round(float(value), 1) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
