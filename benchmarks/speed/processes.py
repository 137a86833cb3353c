"""Two processes on one machine train as one does; one of them is killed, and the run goes on: one table.

    python -m benchmarks.speed.processes [--epochs 6] [--likelihood zinb]

SCVI on the 20,000 x 2,000 generated counts of `training.py`, from a backed .h5ad, batches of 128, early stopping on;
two processes joined by `diffbio.parallel.join` (gloo), each reading its half of every batch. Then the same with
checkpoints, where `kill -9` takes the second process after two epochs; both are started again with resume.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.speed.make_counts import load_counts, make_counts, save_counts

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "benchmarks" / "cache" / "speed" / "counts_20000x2000.npz"
RESULT = REPO / "benchmarks" / "results" / "processes.json"
MOST_APART = 1e-3
MOST_SECONDS = 30.0


def data_file() -> Path:
    """The generated counts as a .h5ad, made once."""
    import anndata
    import pandas as pd
    from scipy import sparse

    path = DATA.with_suffix(".h5ad")
    if not path.exists():
        if not DATA.exists():
            save_counts(make_counts(), DATA)
        data = load_counts(DATA)
        counts = sparse.csr_matrix((data.data, data.indices, data.indptr), shape=data.shape)
        obs = pd.DataFrame({"batch": pd.Categorical([f"b{b}" for b in data.batch])})
        anndata.AnnData(counts, obs=obs.set_index(obs.index.astype(str))).write_h5ad(path, compression="gzip")
    return path


def worker(given: argparse.Namespace) -> None:
    """One process of a run; writes what it saw as JSON."""
    import jax

    from diffbio import parallel, train

    if given.processes > 1:
        parallel.join(given.coordinator, given.processes, given.process)
    import anndata

    from diffbio.models import SCVI

    train.CHECKPOINT_SECONDS = 0.0  # after every epoch
    adata = anndata.read_h5ad(data_file(), backed="r")
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, gene_likelihood=given.likelihood)
    counts: Any = model.cells().counts
    begun = time.perf_counter()
    history = model.train(
        max_epochs=given.epochs, batch_size=128, early_stopping_patience=3, checkpoint=given.checkpoint,
        resume=given.resume,
    )  # fmt: skip
    found = {
        "loss": history["loss"], "validation": history["validation_loss"], "best_epoch": history.best_epoch,
        "seconds": time.perf_counter() - begun, "cells_per_second": float(np.median(history["cells_per_second"])),
        "blocks_read": counts.n_block_reads, "blocks": -(-counts.n_cells // counts.block_rows),
        "weights": float(np.concatenate([np.ravel(w) for w in jax.tree.leaves(weights(model))]).astype(float).sum()),
    }  # fmt: skip
    given.out.write_text(json.dumps(found))


def weights(model: Any) -> Any:
    """All parameters on the host."""
    import jax
    from flax import nnx

    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model.module, nnx.Param)))


def start(
    folder: Path, given: argparse.Namespace, n: int, *, checkpoint: Path | None = None, resume: bool = False
) -> list[Any]:
    """Starts the n processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.speed.processes", "--worker", "--processes", str(n)]
    command += ["--epochs", str(given.epochs), "--likelihood", given.likelihood, "--coordinator", coordinator]
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    command += ["--resume"] if resume else []
    return [
        subprocess.Popen(
            [*command, "--process", str(i), "--out", str(folder / f"{i}.json")], cwd=REPO, text=True,
            stderr=subprocess.PIPE,
        )
        for i in range(n)
    ]  # fmt: skip


def finished(folder: Path, processes: list[Any]) -> list[dict[str, Any]]:
    """What every process saw."""
    for process in processes:
        _, said = process.communicate(timeout=1200)
        if process.returncode:
            sys.exit(f"a process ended with {process.returncode}:\n{said}")
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(len(processes))]


def killed(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Kills the second of two processes after two epochs; how the first ends, and in how many seconds."""
    checkpoint = folder / "checkpoint"
    first, second = start(folder, given, 2, checkpoint=checkpoint)
    lines = []
    for line in first.stderr:
        lines.append(line)
        if "epoch 2/" in line:
            break
    second.send_signal(signal.SIGKILL)
    begun = time.perf_counter()
    lines += first.stderr.readlines()
    code = first.wait(timeout=600)
    second.communicate()
    error = next((line for line in lines if line.startswith("diffbio.errors.Process")), "".join(lines[-3:]))
    return {"seconds": time.perf_counter() - begun, "code": code, "error": error.strip()}


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest relative difference of the loss curves of two runs; infinite if they have different lengths."""
    if len(ours["loss"]) != len(theirs["loss"]):
        return float("inf")
    a, b = (np.array(run["loss"] + run["validation"]) for run in (ours, theirs))
    return float(np.max(np.abs(a - b) / np.abs(b)))


def main() -> None:
    """Runs all and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--likelihood", choices=("zinb", "nb", "poisson"), default="zinb")
    for name in ("--worker", "--resume"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, kind in (
        ("--processes", int), ("--process", int), ("--coordinator", str), ("--checkpoint", Path), ("--out", Path),
    ):  # fmt: skip
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    data_file()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (one,) = finished(folder, start(folder, given, 1))
        two = finished(folder, start(folder, given, 2))
        end = killed(folder, given)
        resumed = finished(folder, start(folder, given, 2, checkpoint=folder / "checkpoint", resume=True))
    rows = [
        ("loss curve of two processes, largest relative difference", apart(two[0], one), MOST_APART),
        ("the same, killed after two epochs and resumed", apart(resumed[0], one), MOST_APART),
        ("seconds until the other process has ended", end["seconds"], MOST_SECONDS),
    ]
    print(f"{'two processes, 20,000 x 2,000, ' + given.likelihood:58} {'ours':>9} {'bar':>9}")
    for what, value, bar in rows:
        print(f"{what:58} {value:9.2g} {bar:9.2g}")
    same = two[0]["weights"] == two[1]["weights"] and resumed[0]["weights"] == two[0]["weights"]
    print(f"weights of both processes, and of the resumed run, to the bit: {'equal' if same else 'DIFFERENT'}")
    reads = [f"{run['blocks_read'] / len(run['loss']):.0f}" for run in (*two, one)]
    print(f"blocks of {one['blocks']} read per epoch with validation: {' and '.join(reads[:2])} (one: {reads[2]})")
    print(f"cells per second: {two[0]['cells_per_second']:,.0f} (one process: {one['cells_per_second']:,.0f})")
    print(f"the other process said, with exit code {end['code']}: {end['error'][:400]}")
    RESULT.write_text(json.dumps({"one": one, "two": two, "killed": end, "resumed": resumed[0]}, indent=1) + "\n")
    sys.exit(not (same and end["code"] == 1 and all(value <= bar for _, value, bar in rows)))


if __name__ == "__main__":
    main()
