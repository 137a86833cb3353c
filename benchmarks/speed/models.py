"""Throughput of SCVI and SCANVI beside scvi-tools, both sides in one go: training, latent space, predictions.

    uv run python -m benchmarks.speed.models                  # both sides, about ten minutes on two cores
    uv run python -m benchmarks.speed.models --only diffbio   # scvi-tools as stored in results/models_speed.json

20,000 x 2,000 NB counts, 10 % not zero, held in memory as CSR; default networks; every process trains a few epochs
of all cells without validation. Rates are of the median epoch after the first one, which compiles or warms up:

- cells/CPU s: one core, one thread; cells/s: wall time with both cores and two threads;
- latent: `get_latent_representation()` of all cells; predict: `predict(soft=True)`; the second of two calls;
- first step: CPU seconds from the start of the process until one minibatch of SCVI has been trained on, imports and
  data included, with a warm compilation cache (ours) on one core.

Bars: 4 times scvi-tools for ZINB and SCANVI, 5 times for NB, 2 times for latent and predict; first step 5 CPU s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.speed.make_counts import make_counts, save_counts

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "benchmarks" / "cache" / "speed" / "counts_20000x2000.npz"
STORED = REPO / "benchmarks" / "results" / "models_speed.json"
PEER_PYTHON = REPO / "benchmarks" / "envs" / "scvi" / "bin" / "python"
BARS = {"zinb": 4.0, "nb": 5.0, "scanvi": 4.0, "latent": 2.0, "predict": 2.0}
FIRST_STEP_BAR = 5.0
RUNS = [(model, likelihood, size) for model, likelihood in (("SCVI", "zinb"), ("SCVI", "nb"), ("SCANVI", "zinb"))
        for size in (128, 1024)]  # fmt: skip


def cells_and_labels() -> Any:
    """The counts as an AnnData with batches, and a label for one cell in ten."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    with np.load(DATA) as file:
        counts = sp.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
        batch, kind = file["batch"], file["cell_type"]
    labels = np.where(np.arange(len(kind)) % 10 == 0, [f"t{code}" for code in kind], "unknown")
    names = [f"c{row}" for row in range(len(kind))]
    obs = pd.DataFrame({"batch": [f"b{code}" for code in batch], "labels": labels}, index=names)
    return anndata.AnnData(counts, obs=obs)


def run_ours(model: str, likelihood: str, batch_size: int, epochs: int) -> dict[str, float]:
    """Trains, embeds and predicts once."""
    from diffbio import models
    from diffbio.data.source import ArraySource

    stamps: list[tuple[float, float]] = []
    order = ArraySource.order

    def stamped(self: Any, *args: Any) -> Any:  # asked for once an epoch
        stamps.append((time.process_time(), time.perf_counter()))
        return order(self, *args)

    ArraySource.order = stamped  # type: ignore[method-assign]
    adata = cells_and_labels()
    cls = getattr(models, model)
    labelled = {"labels_key": "labels", "unlabeled_category": "unknown"} if model == "SCANVI" else {}
    cls.setup_anndata(adata, batch_key="batch", **labelled)
    vae = cls(adata, gene_likelihood=likelihood)
    vae.train(max_epochs=epochs, batch_size=batch_size, train_size=1.0, early_stopping=False, progress=False)
    stamps.append((time.process_time(), time.perf_counter()))
    return rates(stamps, adata.n_obs, vae, model)


def rates(stamps: list[tuple[float, float]], n_cells: int, vae: Any, model: str) -> dict[str, float]:
    """Cells per CPU second and per second, of training and of what is asked of the model."""
    cpu, wall = np.median(np.diff(np.asarray(stamps[1:]), axis=0), axis=0)
    found = {"train_cpu": n_cells / cpu, "train_wall": n_cells / wall}
    questions = {"latent": vae.get_latent_representation}
    if model == "SCANVI":
        questions["predict"] = lambda: vae.predict(soft=True)
    for name, question in questions.items():
        for _ in range(2):
            cpu, wall = time.process_time(), time.perf_counter()
            question()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found |= {f"{name}_cpu": n_cells / cpu, f"{name}_wall": n_cells / wall}
    return {name: round(float(value), 1) for name, value in found.items()}


def first_step() -> dict[str, float]:
    """CPU seconds of this process until a minibatch has been trained on."""
    from diffbio.models import SCVI

    adata = cells_and_labels()[:128].copy()
    SCVI.setup_anndata(adata, batch_key="batch")
    SCVI(adata).train(max_epochs=1, train_size=1.0, early_stopping=False, progress=False)
    return {"first_step_cpu": round(time.process_time(), 2)}


def in_process(command: list[str], cores: set[int], cache: str) -> dict[str, Any]:
    """Runs a command on some cores with as many threads; its last line is JSON."""
    threads = {f"{name}_NUM_THREADS": str(len(cores)) for name in ("OMP", "OPENBLAS", "MKL")}
    one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} if len(cores) == 1 else {}
    kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        command,
        env={**os.environ, **threads, **one, **kept},
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(command: list[str], epochs: int, cache: str) -> dict[str, dict[str, float]]:
    """All runs of one side: CPU figures on one core, wall figures on two."""
    found: dict[str, dict[str, float]] = {}
    for model, likelihood, size in RUNS:
        arguments = ["--model", model, "--likelihood", likelihood, "--batch-size", str(size), "--epochs", str(epochs)]
        one, two = (in_process([*command, *arguments], cores, cache) for cores in ({0}, {0, 1}))
        found[f"{model} {likelihood} {size}"] = {
            name: (one if name.endswith("_cpu") else two)[name] for name in sorted(one)
        }
        print(f"{model} {likelihood} {size}: {found[f'{model} {likelihood} {size}']}", file=sys.stderr, flush=True)
    for _ in range(2):  # the first one fills the caches
        found["first step"] = in_process([*command, "--first-step"], {0}, cache)
    return found


def main() -> None:
    """Runs both sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--only", choices=("diffbio",), help="leave scvi-tools as stored")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first-step", action="store_true", help=argparse.SUPPRESS)
    for name in ("--model", "--likelihood", "--batch-size"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        found = first_step() if args.first_step else run_ours(
            args.model, args.likelihood, int(args.batch_size), args.epochs
        )  # fmt: skip
        print(json.dumps(found))
        return
    if not DATA.exists():
        save_counts(make_counts(), DATA)
    with tempfile.TemporaryDirectory() as cache:
        ours = measure([sys.executable, "-m", "benchmarks.speed.models", "--side"], args.epochs, cache)
        if args.only != "diffbio":
            side = [str(PEER_PYTHON), "benchmarks/speed/models_scvi_side.py", "--data", str(DATA)]
            STORED.write_text(json.dumps(measure(side, args.epochs, cache), indent=1) + "\n")
    theirs = json.loads(STORED.read_text())
    print(f"{'cells per second':34}{'ours':>10}{'scvi-tools':>12}{'ratio':>8}{'bar':>6}")
    for name, peer in theirs.items():
        for measured, value in peer.items():
            if name == "first step":
                print(f"{'first step, CPU s':34}{ours[name][measured]:10.1f}{value:12.1f}{'':8}{FIRST_STEP_BAR:6.1f}")
                continue
            what, unit = measured.split("_")
            bar = BARS["scanvi" if name.startswith("SCANVI") else name.split()[1]] if what == "train" else BARS[what]
            label = f"{name}, {what} per {'CPU s' if unit == 'cpu' else 's'}"
            mine = ours[name][measured]
            print(f"{label:34}{mine:10,.0f}{value:12,.0f}{mine / value:8.2f}{bar:6.1f}")


if __name__ == "__main__":
    main()
