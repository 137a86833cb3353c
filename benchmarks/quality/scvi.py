"""SCVI after its default training beside scvi-tools: held-out likelihood and CPU time, one table.

    taskset -c 1 uv run python -m benchmarks.quality.scvi                       # 3 seeds, about 6 CPU minutes
    taskset -c 1 uv run python -m benchmarks.quality.scvi --data pbmc3k --seeds 0
    uv run python -m benchmarks.quality.scvi --peer    # first runs scvi-tools again, for hours

Both sides train on the same 90 % of the cells and see the other 10 % never (ours stops early by a part of
the 90 %): ELBO by 5 draws, log p(x) by 100 importance samples, mean over cells in nats, higher is better.
Ours: `diffbio.models.SCVI(adata).train()`. CPU-seconds of one thread, of the model's construction and training,
compilation included. scvi-tools: `results/count_models_scvi.json`, written by `benchmarks/peers/run_count_models.py`
("zinb_1": its defaults; "nb_2": two layers, negative binomial); where that has no run of a seed, ELBO and time of
`results/integration_scvi.json`, the same training on the same split. "-": not measured.

Bar: both figures above scvi-tools' on each data set, in a fifth of its CPU time.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import json
import subprocess
import time
import warnings
from typing import Any

import numpy as np
from benchmarks.quality.count_models import LIKELIHOOD_DATA, REPO, RESULTS, Data, load, split

PEER_PYTHON = REPO / "benchmarks" / "envs" / "scvi" / "bin" / "python"


def ours(data: Data, seed: int) -> dict[str, float]:
    """Held-out ELBO, log p(x) and CPU-seconds."""
    from diffbio.models import SCVI

    train, held_out = (data.annotated(cells) for cells in split(data.counts.shape[0], seed))
    SCVI.setup_anndata(train, batch_key="batch")
    cpu = time.process_time()
    model = SCVI(train, seed=seed)
    history = model.train(progress=False)
    cpu = time.process_time() - cpu
    return {
        "elbo": float(np.mean([model.get_elbo(held_out, seed=draw) for draw in range(5)])),
        "log_p": float(model.get_marginal_ll(held_out, n_mc_samples=100)),
        "cpu_s": cpu,
        "epochs": len(history.rows),
    }


def peers() -> dict[tuple[str, int, str], dict[str, Any]]:
    """scvi-tools' stored runs by data set, seed and configuration."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for run in json.loads((RESULTS / "integration_scvi.json").read_text())["runs"]:
        values = {"elbo": run["held_out_elbo"], "cpu_s": run["train_cpu_s"]}
        found[run["dataset"], run["seed"], "zinb_1"] = values
    for row in json.loads((RESULTS / "count_models_scvi.json").read_text())["rows"]:
        if row["kind"] == "scvi":
            found[row["data"], row["seed"], row["config"]] = row
    return found


def main() -> None:
    """Prints the table, a line as soon as it is known, and stores our figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(LIKELIHOOD_DATA), choices=LIKELIHOOD_DATA)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peer", action="store_true", help="run scvi-tools where its results are missing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.peer:
        seeds = [str(seed) for seed in args.seeds]
        command = [str(PEER_PYTHON), "-m", "benchmarks.peers.run_count_models", "--label-seeds"]
        subprocess.run([*command, "--data", *args.data, "--seeds", *seeds], cwd=REPO, check=True)
    stored = peers()
    print("data                    seed | ELBO ours   peer   nb_2 | log p ours   peer   nb_2 | CPU-s ours   peer | bar")
    for name in args.data:
        data = load(name)
        for seed in args.seeds:
            mine = ours(data, seed)
            peer, nb = (stored.get((name, seed, config), {}) for config in ("zinb_1", "nb_2"))
            met = [mine[k] > peer[k] for k in ("elbo", "log_p") if k in peer]
            met += [mine["cpu_s"] <= peer["cpu_s"] / 5] if "cpu_s" in peer else []
            print(
                f"{name:24}{seed:4} | {mine['elbo']:9.1f}{_cell(peer, 'elbo')}{_cell(nb, 'elbo')} |"
                f" {mine['log_p']:10.1f}{_cell(peer, 'log_p')}{_cell(nb, 'log_p')} |"
                f" {mine['cpu_s']:10.1f}{_cell(peer, 'cpu_s')} | {_verdict(met)}",
                flush=True,
            )


def _cell(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:7.1f}" if key in row else "      -"


def _verdict(met: list[bool]) -> str:
    return "no peer run" if not met else ("met" if all(met) else "NOT met")


if __name__ == "__main__":
    main()
