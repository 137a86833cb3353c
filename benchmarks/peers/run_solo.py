"""SOLO of scvi-tools on the data of ``benchmarks.quality.doublets``; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 benchmarks/envs/scvi/bin/python -m benchmarks.peers.run_solo

``SCVI(adata)``, 60 epochs; ``SOLO.from_scvi_model``, at most 80 epochs; all else by default. One row for every data set
and seed in ``benchmarks/results/doublets_solo.json``. CPU-seconds of both trainings, one thread.
"""

from __future__ import annotations

import logging
import time
import warnings

import anndata
import scvi
import torch
from benchmarks.quality.doublets import SPEED, keep_rows, load, runs, scores

FIT = {"enable_progress_bar": False, "accelerator": "cpu"}


def main() -> None:
    """All data sets and seeds anew."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for name, seed in runs():
        if name == SPEED:
            continue
        data = load(name, genes=2000)
        scvi.settings.seed = seed
        adata = anndata.AnnData(data.counts.copy())
        start = time.process_time()
        scvi.model.SCVI.setup_anndata(adata)
        model = scvi.model.SCVI(adata)
        model.train(max_epochs=60, **FIT)
        solo = scvi.external.SOLO.from_scvi_model(model)
        solo.train(max_epochs=80, **FIT)
        found = solo.predict()["doublet"].to_numpy()
        cpu = time.process_time() - start
        rows.append({"data": name, "seed": seed, **scores(data, found), "cpu_s": cpu})
        print(rows[-1], flush=True)
    keep_rows("doublets_solo.json", f"scvi-tools {scvi.__version__}", rows)


if __name__ == "__main__":
    main()
