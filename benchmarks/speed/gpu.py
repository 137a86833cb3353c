"""Training throughput of SCVI on a GPU beside scvi-tools on the same GPU, both sides in one go: one table.

    python -m benchmarks.speed.gpu                              # 100,000 and 1,000,000 x 2,000; needs JAX with CUDA
    python -m benchmarks.speed.gpu --peer-python PATH           # of scvi-tools with a CUDA torch
    python -m benchmarks.speed.gpu --cells 2000 --allow-cpu     # tries the script out where there is no GPU

Generated counts (`stream_counts`, 10 % not zero), batches of the same size on both sides, default networks, ZINB, no
validation, each run in a process of its own. Rates are wall-clock cells per second of the median epoch after the first,
which compiles. Our rows: counts on the device (`DeviceSource`, automatic where they take at most a quarter of its
memory) and streamed from the file. The peer holds its counts in host memory. Bar: 20 times the peer. A GPU has not been
measured yet. This file imports nothing of the project at its top, so that the peer's python runs it by path.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
RESULT = REPO / "benchmarks" / "results" / "gpu.json"
PEER_PYTHON = REPO / "benchmarks" / "envs" / "scvi" / "bin" / "python"
BAR = 20.0
SIDES = ("device", "streamed", "peer")


def ours(given: argparse.Namespace) -> dict[str, Any]:
    """Trains our SCVI on one file."""
    import anndata
    import jax
    import numpy as np

    from diffbio.models import SCVI

    if jax.default_backend() == "cpu" and not given.allow_cpu:
        sys.exit("JAX sees no GPU; --allow-cpu tries the script out without one")
    adata = anndata.read_h5ad(given.file, backed="r" if given.side == "streamed" else None)
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    history = model.train(
        max_epochs=given.epochs, batch_size=given.batch_size, train_size=1.0, early_stopping=False, progress=False
    )
    return {
        "cells_per_second": float(np.median(history["cells_per_second"][1:])),
        "loss": history["loss"][-1], "counts": type(model.cells().counts).__name__, "device": str(jax.devices()[0]),
    }  # fmt: skip


def peer(given: argparse.Namespace) -> dict[str, Any]:
    """Trains scvi-tools' SCVI on the same file."""
    import time

    import anndata
    import lightning.pytorch as pl
    import numpy as np
    import scvi
    import torch

    if not torch.cuda.is_available() and not given.allow_cpu:
        sys.exit("torch sees no GPU; --allow-cpu tries the script out without one")
    adata = anndata.read_h5ad(given.file)
    scvi.settings.seed = 0
    stamps = []

    class Clock(pl.Callback):
        """Notes where an epoch begins and the last one ends."""

        def on_train_epoch_start(self, *_: Any) -> None:
            stamps.append(time.perf_counter())

        def on_train_end(self, *_: Any) -> None:
            stamps.append(time.perf_counter())

    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    where = "gpu" if torch.cuda.is_available() else "cpu"
    model.train(
        max_epochs=given.epochs, batch_size=given.batch_size, train_size=1.0, accelerator=where,
        enable_progress_bar=False, callbacks=[Clock()],
    )  # fmt: skip
    device = torch.cuda.get_device_name(0) if where == "gpu" else "cpu"
    rate = adata.n_obs / float(np.median(np.diff(stamps)[1:]))
    return {"cells_per_second": rate, "counts": "host", "device": device}


def run(python: Path | str, given: argparse.Namespace, side: str, path: Path, batch_size: int) -> dict[str, Any] | None:
    """One side in a process of its own; None if it fails, after its words."""
    command = [str(python), "benchmarks/speed/gpu.py", "--side", side, "--file", str(path)]
    command += ["--epochs", str(given.epochs), "--batch-size", str(batch_size)]
    command += ["--allow-cpu"] if given.allow_cpu else []
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{side}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Runs all sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    parser.add_argument("--allow-cpu", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        given.batch_size = given.batch_size[0]
        print(json.dumps(peer(given) if given.side == "peer" else ours(given)))
        return
    from benchmarks.speed.memory import data_file

    rows, good = [], True
    for cells in given.cells:
        path = data_file(cells, given.genes)
        for size in given.batch_size:
            found = {
                side: run(given.peer_python if side == "peer" else sys.executable, given, side, path, size)
                for side in SIDES
            }
            rows.append({"cells": cells, "batch_size": size, **found})
    print(f"SCVI, ZINB, {given.genes:,} genes, cells per second of the median epoch")
    print(f"{'cells':>10} {'batch':>6} {'ours':>9} {'streamed':>9} {'peer':>9} {'ratio':>6} {'bar':>5}  device, counts")
    for row in rows:
        rates = [row[side]["cells_per_second"] if row[side] else float("nan") for side in SIDES]
        ratio = max(rates[:2]) / rates[2]
        good &= ratio >= BAR
        where = f"{row['device']['device']}, {row['device']['counts']}" if row["device"] else "failed"
        numbers = " ".join(f"{rate:9,.0f}" for rate in rates)
        print(f"{row['cells']:10,} {row['batch_size']:6} {numbers} {ratio:6.1f} {BAR:5.0f}  {where}")
    if not given.allow_cpu:
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
