"""Batch correction and clustering of diffbio beside scanpy, harmonypy and scVI: one table.

    uv run python -m benchmarks.quality.integration                  # ours anew, peers as stored
    uv run python -m benchmarks.quality.integration --rerun-peers    # all anew, half an hour of CPU
    uv run python -m benchmarks.quality.integration --stored         # print what is stored, run nothing

Runs ``SingleCellPipeline`` on every data set and seed in this environment, scores it in the
``scib`` environment (made by ``benchmarks/peers/make_env.sh`` on first use) and prints the means
over seeds with the bar: our total at least that of harmonypy + Leiden on each data set, and on
average at least that of scVI + Leiden. Data, metrics and totals are described in
``integration_data.py`` and ``score_integration.py``; scores are kept in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
from benchmarks.quality.integration_data import (
    DATASETS,
    REPO,
    RESULTS,
    SEEDS,
    IntegrationData,
    load,
    save_embedding,
)

OURS = "diffbio"
METHODS = {
    "scanpy": "scanpy PCA + Leiden",
    "harmonypy": "harmonypy + Leiden",
    "scvi": "scVI + Leiden",
    OURS: "diffbio",
}
COLUMNS = {
    "nmi": "NMI",
    "ari": "ARI",
    "asw_label": "ASW",
    "clisi": "cLISI",
    "asw_batch": "ASWb",
    "ilisi": "iLISI",
    "graph_connectivity": "conn",
    "bio": "bio",
    "batch": "batch",
    "total": "total",
    "n_clusters": "k",
    "leiden_nmi": "L-NMI",
    "leiden_ari": "L-ARI",
    "leiden_total": "L-total",
}
CPU_FIELDS = {
    "scanpy": ("integration_scanpy_harmony.json", ("pca_cpu_s",)),
    "harmonypy": ("integration_scanpy_harmony.json", ("pca_cpu_s", "harmony_cpu_s")),
    "scvi": ("integration_scvi.json", ("train_cpu_s",)),
    OURS: ("integration_diffbio.json", ("cpu_s",)),
}
ENVIRONMENTS = REPO / "benchmarks" / "envs"
OUR_RUNS = RESULTS / "integration_diffbio.json"

# Settings of our side: the same for every data set; no tuning by label beyond their number.
PIPELINE_SETTINGS = {"enable_ambient_removal": False}
FIT_SETTINGS: dict[str, object] = {}


def run_ours(data: IntegrationData, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit the pipeline on one data set; return corrected embeddings and hard clusters."""
    import diffbio
    from diffbio.pipelines import create_single_cell_pipeline

    pipeline = create_single_cell_pipeline(
        n_genes=data.counts.shape[1],
        n_clusters=data.n_cell_types,
        n_batches=data.n_batches,
        seed=seed,
        **PIPELINE_SETTINGS,
    )
    inputs = {"counts": data.counts, "batch_labels": data.batch}
    diffbio.fit(pipeline, inputs, seed=seed, progress=False, **FIT_SETTINGS)
    pipeline.eval_mode()
    outputs, _, _ = pipeline.apply(inputs | {"counts": data.counts.toarray()}, {}, None)
    clusters = np.asarray(outputs["cluster_assignments"])
    if clusters.ndim == 2:
        clusters = clusters.argmax(axis=1)
    return np.asarray(outputs["corrected_embeddings"]), clusters


def fit_and_store(dataset: str, seed: int) -> dict[str, object]:
    """Run our side once and keep its embedding, clusters and CPU seconds."""
    data = load(dataset)
    start = time.process_time()
    embedding, clusters = run_ours(data, seed)
    cpu_s = time.process_time() - start
    save_embedding(data, OURS, seed, embedding=embedding, clusters=clusters)
    print(f"{dataset} diffbio {seed}: {cpu_s:.0f} CPU s", flush=True)
    return {
        "dataset": dataset,
        "seed": seed,
        "fingerprint": data.fingerprint(),
        "cpu_s": round(cpu_s, 1),
    }


def environment(name: str) -> str:
    """Return the interpreter of a peer environment, making the environment if there is none."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        print(f"making benchmarks/envs/{name} (once, some minutes)", flush=True)
        subprocess.run(["bash", str(REPO / "benchmarks/peers/make_env.sh"), name], check=True)
    return str(python)


def run_module(name: str, module: str, *arguments: str) -> None:
    """Run one of our scripts in a peer environment, on one thread."""
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(
        [environment(name), "-m", module, *arguments],
        cwd=REPO,
        env=os.environ | single,
        check=True,
    )


def selection(args: argparse.Namespace) -> list[str]:
    """Return the data sets and seeds of this run as arguments for another script."""
    return ["--datasets", *args.datasets, "--seeds", *map(str, args.seeds)]


def run_peers(args: argparse.Namespace) -> None:
    """Run and score every peer again."""
    run_module("scib", "benchmarks.peers.run_scanpy_harmony", *selection(args))
    run_module("scvi", "benchmarks.peers.run_scvi", "--force", *selection(args))
    peers = [method for method in METHODS if method != OURS]
    score(peers, args)


def score(methods: Iterable[str], args: argparse.Namespace) -> None:
    """Score stored embeddings in the scib environment."""
    run_module("scib", "benchmarks.quality.score_integration", "--methods", *methods, *selection(args))


def store_our_runs(records: list[dict[str, object]]) -> None:
    """Put the CPU seconds of our runs into the results, in place of older ones."""
    runs = {}
    if OUR_RUNS.exists():
        runs = {(run["dataset"], run["seed"]): run for run in json.loads(OUR_RUNS.read_text())["runs"]}
    runs |= {(run["dataset"], run["seed"]): run for run in records}
    content = {
        "pipeline_settings": PIPELINE_SETTINGS,
        "fit_settings": FIT_SETTINGS,
        "runs": [runs[key] for key in sorted(runs)],
    }
    OUR_RUNS.write_text(json.dumps(content, indent=1) + "\n")


def stored_scores() -> list[dict[str, object]]:
    """Return every score in the results file."""
    path = RESULTS / "integration_scores.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def means(runs: list[dict[str, object]], args: argparse.Namespace) -> dict[tuple[str, str], dict[str, float]]:
    """Return, per data set and method, the mean over seeds of every column and ``total_sd``."""
    table = {}
    for dataset in args.datasets:
        for method in METHODS:
            chosen = [
                run
                for run in runs
                if (run["dataset"], run["method"]) == (dataset, method) and run["seed"] in args.seeds
            ]
            if chosen:
                row = {key: float(np.mean([run[key] for run in chosen])) for key in COLUMNS}
                row["total_sd"] = float(np.std([run["total"] for run in chosen]))
                row["seeds"] = len(chosen)
                table[dataset, method] = row
    return table


def add_cpu_seconds(table: dict[tuple[str, str], dict[str, float]]) -> None:
    """Add the mean CPU seconds of one run (method only, without Leiden and scoring)."""
    for method, (file, fields) in CPU_FIELDS.items():
        path = RESULTS / file
        runs = json.loads(path.read_text())["runs"] if path.exists() else []
        for dataset in DATASETS:
            seconds = [sum(run[key] for key in fields) for run in runs if run["dataset"] == dataset]
            if seconds and (dataset, method) in table:
                table[dataset, method]["cpu_s"] = float(np.mean(seconds))


def average(table: dict, method: str, datasets: list[str], key: str = "total") -> float | None:
    """Return a method's mean over data sets, or None where one is missing."""
    rows = [table.get((dataset, method)) for dataset in datasets]
    return None if None in rows else float(np.mean([row[key] for row in rows]))


def number(key: str, value: float | None) -> str:
    """Return one cell of the table."""
    if value is None:
        return ""
    return f"{value:.1f}" if key in ("n_clusters", "cpu_s") else f"{value:.3f}"


def format_table(table: dict, datasets: list[str]) -> str:
    """Return the scores as a Markdown table, averages over data sets last."""
    titles = ["data", "method", "seeds", *COLUMNS.values(), "sd of total", "CPU s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (dataset, method), row in table.items():
        cells = [number(key, row.get(key)) for key in (*COLUMNS, "total_sd", "cpu_s")]
        lines.append(f"| {dataset} | {METHODS[method]} | {row['seeds']} | {' | '.join(cells)} |")
    for method, title in METHODS.items():
        cells = [number(key, average(table, method, datasets, key)) for key in COLUMNS]
        if any(cells):
            lines.append(f"| **average** | {title} | | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def check_bars(table: dict, datasets: list[str]) -> list[tuple[str, bool | None]]:
    """Return each requirement in words and whether it is met (None: scores are missing)."""
    groups = [([dataset], dataset, "harmonypy") for dataset in datasets]
    groups.append((datasets, "average", "scvi"))
    bars = []
    for members, name, peer in groups:
        ours, bar, our_leiden, peer_leiden = (
            average(table, method, members, key)
            for key in ("total", "leiden_total")
            for method in (OURS, peer)
        )
        if ours is None or bar is None:
            bars.append((f"{name}: total against {METHODS[peer]}", None))
        else:
            text = (
                f"{name}: total {ours:.4f}, {METHODS[peer]} {bar:.4f}"
                f" (Leiden at its best resolution on both: {our_leiden:.4f}, {peer_leiden:.4f})"
            )
            bars.append((text, ours >= bar))
    return bars


def check_same_data(runs: list[dict[str, object]]) -> list[str]:
    """Return the stored runs that were made from other cells or genes than today's."""
    current = {dataset: load(dataset).fingerprint() for dataset in DATASETS}
    return [
        f"{run['dataset']} {run['method']} seed {run['seed']}"
        for run in runs
        if run["fingerprint"] != current[run["dataset"]]
    ]


def main() -> int:
    """Run what was asked for and print the table; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rerun-peers", action="store_true", help="run and score the peers anew")
    parser.add_argument("--stored", action="store_true", help="run nothing, print stored scores")
    args = parser.parse_args()
    if args.rerun_peers:
        run_peers(args)
    if not args.stored:
        records = [fit_and_store(name, seed) for name in args.datasets for seed in args.seeds]
        store_our_runs(records)
        score([OURS], args)
    runs = stored_scores()
    table = means(runs, args)
    add_cpu_seconds(table)
    print(format_table(table, args.datasets))
    for line in check_same_data(runs):
        print(f"WARNING: {line} was computed from other cells or genes; use --rerun-peers")
    bars = check_bars(table, args.datasets)
    for title, met in bars:
        print(f"{'not measured' if met is None else 'met' if met else 'MISSED'}: {title}")
    return int(any(met is False for _, met in bars))


if __name__ == "__main__":
    sys.exit(main())
