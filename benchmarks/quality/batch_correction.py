"""Batch correction by MMD and by a Wasserstein critic beside harmonypy: mixing, cell types, controls, cost.

    uv run python -m benchmarks.quality.batch_correction           # everything but the cost, 20 minutes of CPU
    uv run python -m benchmarks.quality.batch_correction --methods mmd     # trains one method anew, prints both
    uv run python -m benchmarks.quality.batch_correction --stored  # prints what is stored, trains nothing
    uv run python -m benchmarks.quality.batch_correction --cost    # CPU seconds and memory at 10,000 to 200,000 cells

Both operators read 50 principal components of log-normalised counts (of `integration_data`'s genes), which is what
`slots.representation` gives. Three parts:

- scib-metrics on three of the integration sets, three seeds, clusters by Leiden (see ``integration.py``); harmonypy's
  scores are those stored by that script;
- ``pbmc_three_chemistries`` as in ``harmony.py`` (30 components): the WORST of five seeds of the median LISI of
  chemistry and cell type, the silhouette of the cell types, and the share of the components' variance that is
  reconstructed, which is the R2 of the genes as a share of PCA's. All components are kept (latent_dim 30), so that
  silhouettes speak of the correction alone;
- the same with batch labels shuffled, where nothing must be corrected: largest change of the silhouette against
  uncorrected components, largest rise of the chemistries' LISI.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np
from benchmarks.quality.harmony import STORED as HARMONY_STORED
from benchmarks.quality.harmony import chemistries
from benchmarks.quality.harmony import score as score_chemistries
from benchmarks.quality.integration import score, stored_scores
from benchmarks.quality.integration_data import RESULTS, SEEDS, load, save_embedding

SETS = ("pbmc_three_chemistries", "scmix_cell_lines", "pancreas_human_mouse")
METHODS = {"mmd": "diffbio_mmd", "wgan": "diffbio_wgan"}
CHEMISTRY_SEEDS = range(5)
CELLS = (10_000, 50_000, 200_000)
STORED = RESULTS / "batch_correction.json"
N_COMPONENTS = 50


class Row(NamedTuple):
    """A line of the table; `bar` is a side and a limit."""

    data: str
    method: str
    what: str
    ours: float
    peer: float | None
    baseline: float | None
    bar: tuple[str, float] | None


def corrected(method: str, x: np.ndarray, labels: np.ndarray, seed: int, **settings: Any) -> dict[str, Any]:
    """The outputs of one training, the CPU seconds, and the share of the variance of x that is reconstructed."""
    from flax import nnx

    import diffbio
    from diffbio.operators import singlecell as ops

    config, operator = {
        "mmd": (ops.MMDBatchCorrectionConfig, ops.DifferentiableMMDBatchCorrection),
        "wgan": (ops.WGANBatchCorrectionConfig, ops.DifferentiableWGANBatchCorrection),
    }[method]
    start = time.process_time()
    op = operator(config(n_genes=x.shape[1], n_batches=int(labels.max()) + 1, **settings), rngs=nnx.Rngs(seed))
    data = {"expression": x.astype(np.float32), "batch_labels": labels.astype(np.int32)}
    diffbio.fit(op, data, seed=seed, progress=False)
    z = np.asarray(op.apply(data)[0]["corrected_embeddings"])
    cpu = time.process_time() - start
    own = np.eye(op.config.n_batches, dtype=np.float32)[labels]
    decoded = np.asarray(op.autoencoder.decode(z, own))
    r2 = 1 - ((x - decoded) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    return {"z": z, "cpu_s": cpu, "r2": float(r2)}


def train_integration_sets(method: str) -> None:
    """Trains on every set and seed, and keeps embeddings, scores and CPU seconds."""
    from diffbio.data.transform import shifted_log
    from diffbio.math.linalg import pca

    seconds = {}
    for name in SETS:
        data = load(name)
        x = pca(shifted_log(data.counts), N_COMPONENTS).scores
        for seed in SEEDS:
            found = corrected(method, x, data.batch, seed)
            save_embedding(data, METHODS[method], seed, embedding=found["z"])
            seconds[f"{name} {seed}"] = round(found["cpu_s"], 1)
            print(f"{name} {method} {seed}: {found['cpu_s']:.0f} CPU s", flush=True)
    keep(method, "seconds", seconds)
    score([METHODS[method]], argparse.Namespace(datasets=SETS, seeds=SEEDS))


def train_chemistries(method: str) -> None:
    """Trains on the chemistries with every seed, with true and with shuffled labels, and keeps the scores."""
    data = chemistries()
    x, labels = data["x"], np.unique(data["batch"], return_inverse=True)[1]
    runs = []
    for seed in CHEMISTRY_SEEDS:
        other = np.random.default_rng(seed).permutation(labels)
        for kind, given in (("true", labels), ("shuffled", other)):
            found = corrected(method, x, given, seed, latent_dim=x.shape[1])
            runs.append({"labels": kind, "r2": round(found["r2"], 4), **score_chemistries(found["z"], data)})
            print(method, seed, runs[-1], flush=True)
    keep(method, "chemistries", runs)
    keep("uncorrected", "chemistries", [score_chemistries(x, data)])


def kept() -> dict[str, dict[str, Any]]:
    """What is stored beside the scores of scib-metrics."""
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def keep(method: str, what: str, values: Any) -> None:
    """Stores results of a method in place of older ones."""
    results = kept()
    results.setdefault(method, {})[what] = values
    STORED.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def integration_rows() -> list[Row]:
    """Rows of the table: bio, batch and total, means over seeds, and the worst total."""
    runs = stored_scores()
    results = kept()

    def of(name: str, method: str, key: str) -> list[float]:
        chosen = [r for r in runs if (r["dataset"], r["method"]) == (name, method) and r["seed"] in SEEDS]
        return [float(str(run[key])) for run in chosen]

    rows: list[Row] = []
    for name in SETS:
        for method, stored in METHODS.items():
            if "seconds" not in results.get(method, {}):
                continue
            for key in ("bio", "batch", "total"):
                ours, peer, plain = (np.mean(of(name, m, key)) for m in (stored, "harmonypy", "scanpy"))
                strong = key == "total" and name != "pbmc_three_chemistries"
                rows.append(Row(name, method, key, ours, peer, plain, (">=", peer) if strong else None))
            rows.append(Row(name, method, "total, worst seed", min(of(name, stored, "total")), None, None, None))
            cpu = np.mean([v for k, v in results[method]["seconds"].items() if k.startswith(name)])
            rows.append(Row(name, method, "CPU s", cpu, None, None, None))
    return rows


def chemistry_rows() -> list[Row]:
    """Rows of the table: the worst of five seeds, with true and with shuffled batch labels."""
    peer = json.loads(HARMONY_STORED.read_text())["chemistries"]
    results = kept()
    plain = results["uncorrected"]["chemistries"][0]
    silhouette = "silhouette of cell types"
    bars = {"iLISI": (">=", 1.8), "cLISI": ("<=", 1.05), silhouette: (">=", 0.386), "r2": (">=", 0.9)}
    rows: list[Row] = []
    for method in [m for m in METHODS if "chemistries" in results.get(m, {})]:
        runs = results[method]["chemistries"]
        for key, bar in bars.items():
            values = [run[key] for run in runs if run["labels"] == "true"]
            worst = min(values) if bar[0] == ">=" else max(values)
            what = ("R2 / PCA-30's" if key == "r2" else key) + ", worst of 5"
            rows.append(Row("chemistries", method, what, worst, peer.get(key), plain.get(key), bar))
        shuffled = [run for run in runs if run["labels"] == "shuffled"]
        change = max(abs(run[silhouette] - plain[silhouette]) for run in shuffled)
        rise = max(run["iLISI"] - plain["iLISI"] for run in shuffled)
        rows.append(Row("shuffled labels", method, "change of silhouette, worst of 5", change, None, 0.0, ("<", 0.02)))
        rows.append(Row("shuffled labels", method, "rise of iLISI, worst of 5", rise, None, 0.0, ("<=", 0.01)))
    return rows


def printed(rows: list[Row]) -> bool:
    """Prints the table; whether every bar is met."""
    print(f"{'data':23s} {'method':6s} {'what':33s} {'ours':>8s} {'peer':>8s} {'baseline':>8s}   bar")
    fine = True
    for name, method, what, ours, peer, plain, bar in rows:
        words = ""
        if bar is not None:
            side, limit = bar
            met = {">=": ours >= limit, "<=": ours <= limit, "<": ours < limit}[side]
            fine &= bool(met)
            words = f"{side} {limit:.4g}" + " MISSED" * (not met)
        numbers = ["       -" if v is None else f"{v:8.4f}" for v in (ours, peer, plain)]
        print(f"{name:23s} {method:6s} {what:33s}", *numbers, " ", words)
    print("peer: harmonypy (Leiden for clusters); baseline: uncorrected components")
    return fine


def cost() -> None:
    """CPU seconds and peak memory of training on and correcting 50 components of three batches, in fresh processes."""
    print(f"{'method':6s} {'cells':>8s} {'CPU s':>8s} {'peak GB':>8s}")
    for method in METHODS:
        for cells in CELLS:
            arguments = [sys.executable, "-m", __spec__.name, "--one-cost", method, str(cells)]
            print(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def one_cost(method: str, cells: int) -> None:
    """One line of `cost`."""
    rng = np.random.default_rng(0)
    labels, kind = rng.integers(3, size=cells), rng.integers(8, size=cells)
    x = rng.normal(size=(8, N_COMPONENTS))[kind] * 3 + rng.normal(size=(3, N_COMPONENTS))[labels]
    found = corrected(method, (x + rng.normal(size=x.shape)).astype(np.float32), labels, seed=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{method:6s} {cells:8d} {found['cpu_s']:8.1f} {peak:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="to train")
    parser.add_argument("--stored", action="store_true", help="train nothing, print what is stored")
    parser.add_argument("--cost", action="store_true", help="cost alone")
    parser.add_argument("--one-cost", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_cost:
        one_cost(arguments.one_cost[0], int(arguments.one_cost[1]))
        return
    if arguments.cost:
        cost()
        return
    for method in [] if arguments.stored else arguments.methods:
        train_integration_sets(method)
        train_chemistries(method)
    raise SystemExit(not printed(integration_rows() + chemistry_rows()))


if __name__ == "__main__":
    main()
