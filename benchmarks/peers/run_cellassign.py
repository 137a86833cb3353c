"""scvi-tools' CellAssign; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 benchmarks/envs/scvi/bin/python -m benchmarks.peers.run_cellassign

Defaults of ``train()`` (400 epochs); cells, markers and size factors as `benchmarks.quality.cellassign` has prepared
them. Rows go to ``benchmarks/results/cellassign_scvi.json``. One thread; CPU-seconds of ``train()`` and ``predict()``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings

import numpy as np
from benchmarks.quality.cellassign import PEER, ROWS, Task, scores, task


def annotate(data: Task) -> dict[str, float]:
    """Scores and CPU-seconds."""
    import anndata
    import pandas as pd
    import scvi

    scvi.settings.seed = 0
    genes = [f"g{i}" for i in range(data.counts.shape[1])]
    obs = pd.DataFrame({"size_factor": data.size_factor}, index=np.arange(len(data.truth)).astype(str))
    cells = anndata.AnnData(data.counts, obs=obs, var=pd.DataFrame(index=genes))
    markers = pd.DataFrame(data.markers.T.astype(int), index=genes)
    scvi.external.CellAssign.setup_anndata(cells, size_factor_key="size_factor")
    model = scvi.external.CellAssign(cells, markers)
    cpu = time.process_time()
    model.train(accelerator="cpu", enable_progress_bar=False)
    found = model.predict().to_numpy()
    cpu = time.process_time() - cpu
    return {**scores(found.argmax(1), data.truth), "confidence": float(found.max(1).mean()), "cpu_s": round(cpu, 1)}


def main() -> None:
    """Runs the rows and stores each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import scvi
    import torch

    torch.set_num_threads(1)
    for row in args.rows:
        stored = json.loads(PEER.read_text()) if PEER.exists() else {}
        stored[row] = {**annotate(task(row)), "version": f"scvi-tools {scvi.__version__}"}
        body = ",\n ".join(f"{json.dumps(key)}: {json.dumps(stored[key])}" for key in sorted(stored))
        PEER.write_text(f"{{\n {body}\n}}\n")
        print(row, stored[row], flush=True)


if __name__ == "__main__":
    main()
