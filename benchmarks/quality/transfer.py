"""Label transfer to a new batch by `load_query_data` beside scvi-tools and baselines, one table.

    taskset -c 0 uv run python -m benchmarks.quality.transfer     # ours anew, some 5 CPU minutes
    uv run python -m benchmarks.quality.transfer --stored         # print what is stored, run nothing
    uv run python -m benchmarks.quality.transfer --peer           # first runs scvi-tools where it is missing

One chemistry of `pbmc_three_chemistries` is the query, without labels; the other two, with all labels, are the
reference. Both sides: `SCVI.train()`, `SCANVI.from_scvi_model`, `load_query_data`, `train()`, `predict`. Settings:
"defaults", of each side (scvi-tools' query: 100 epochs without weight decay, as its tutorial has it), and "scarches",
the model of scvi-tools' scArches tutorial on both sides (two layers, layer norm, covariates encoded, dropout 0.2; 20
epochs of SCANVI there). Baselines: logistic regression and 15 nearest neighbours on 30 principal components of the
reference's log counts, onto which the query is projected. Accuracy / macro-F1 / expected calibration error (15 bins)
on the query; in brackets accuracy / macro-F1 of the mapped model before its training. Means over seeds ("n"). CPU-
seconds of the reference's and the query's training, one thread, ours with compilation.

Bar: accuracy and macro-F1 above scvi-tools in the same settings.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
from benchmarks.peers.run_transfer import DATA, LAYERS
from benchmarks.quality import integration_data
from benchmarks.quality.count_models import REPO, RESULTS, Data, load, scores

PEER_PYTHON = REPO / "benchmarks" / "envs" / "scvi" / "bin" / "python"
OURS, PEER = RESULTS / "transfer_diffbio.json", RESULTS / "transfer_scvi.json"
SETTINGS: dict[str, dict[str, Any]] = {"defaults": {}, "scarches": LAYERS}
CHEMISTRIES = (0, 1, 2)
MEASURES = ("accuracy", "macro_f1", "ece")


def ours(data: Data, batch: int, settings: str, seed: int) -> dict[str, float]:
    """Scores on the held-out chemistry, before and after the query's training, and CPU-seconds."""
    from diffbio.models import SCANVI, SCVI

    names = np.array([f"t{code:03d}" for code in data.cell_type])
    query = data.batch == batch
    reference = data.annotated(np.flatnonzero(~query), names)
    new = data.annotated(np.flatnonzero(query), np.full(len(names), "unknown"))
    SCVI.setup_anndata(reference, batch_key="batch", labels_key="labels")
    cpu = time.process_time()
    model = SCVI(reference, **SETTINGS[settings], seed=seed)
    model.train(progress=False)
    annotator = SCANVI.from_scvi_model(model, "unknown")
    annotator.train(progress=False)
    reference_cpu = time.process_time() - cpu
    mapped = SCANVI.load_query_data(new, annotator)
    untrained = mapped.predict(soft=True)
    cpu = time.process_time()
    mapped.train(progress=False)
    cpu = time.process_time() - cpu
    found = {}
    for name, table in (("", mapped.predict(soft=True)), ("untrained_", untrained)):
        p = np.zeros((int(query.sum()), data.n_types))
        p[:, [int(c[1:]) for c in table.columns]] = table.to_numpy()
        found |= {f"{name}{key}": value for key, value in scores(p, data.cell_type[query]).items()}
    return {**found, "reference_cpu_s": reference_cpu, "query_cpu_s": cpu}


def baselines(data: Data, batch: int) -> dict[str, dict[str, float]]:
    """Scores of logistic regression and nearest neighbours on principal components of the reference."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    query = data.batch == batch
    dense = data.counts.toarray()
    x = np.log1p(1e4 * dense / dense.sum(1, keepdims=True))
    pca = PCA(30, svd_solver="full").fit(x[~query])
    pcs = pca.transform(x)
    found = {}
    for name, model in (("lr_pca", LogisticRegression(max_iter=2000)), ("knn_pca", KNeighborsClassifier(15))):
        model.fit(pcs[~query], data.cell_type[~query])
        p = np.zeros((int(query.sum()), data.n_types))
        p[:, model.classes_] = model.predict_proba(pcs[query])
        found[name] = scores(p, data.cell_type[query])
    return found


def stored(path: Any) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def keep(rows: list[dict[str, Any]]) -> None:
    """Puts rows of ours into the results file, in place of older ones."""
    runs = {(r["batch"], r["settings"], r["seed"]): r for r in [*stored(OURS), *rows]}
    body = ",\n ".join(json.dumps(runs[key]) for key in sorted(runs))
    OURS.write_text(f'{{"rows": [\n {body}\n]}}\n')


def main() -> int:
    """Prints the table; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=list(CHEMISTRIES), choices=CHEMISTRIES)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--stored", action="store_true", help="run nothing of ours, print what is stored")
    parser.add_argument("--peer", action="store_true", help="run scvi-tools where its results are missing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.peer:
        chosen = ["--batches", *map(str, args.batches), "--settings", *args.settings]
        command = [str(PEER_PYTHON), "-m", "benchmarks.peers.run_transfer", *chosen]
        subprocess.run([*command, "--seeds", *map(str, args.seeds)], cwd=REPO, check=True)
    data, names = load(DATA), integration_data.load(DATA).batch_names
    if not args.stored:
        for seed in args.seeds:
            for settings in args.settings:
                for batch in args.batches:
                    found = {key: round(value, 4) for key, value in ours(data, batch, settings, seed).items()}
                    keep([{"batch": batch, "settings": settings, "seed": seed, **found}])
    simple = {batch: baselines(data, batch) for batch in args.batches}
    print(
        "| held out | settings | n | ours (before) | scvi-tools (before) | LR on PCA | 15-NN on PCA |"
        " CPU s ours | scvi-tools | bar |\n" + "|---" * 10 + "|"
    )
    verdicts = []
    for settings in args.settings:
        for batch in args.batches:
            sides = [_mean(path, batch, settings, args.seeds) for path in (OURS, PEER)]
            met = all(sides) and all(sides[0][key] > sides[1][key] for key in MEASURES[:2])
            verdicts.append(met)
            verdict = ("met" if met else "NOT met") if all(sides) else "not measured"
            times = [f"{s['reference_cpu_s']:.0f} + {s['query_cpu_s']:.0f}" if s else "-" for s in sides]
            cells = [*map(_cell, sides), *(_cell(simple[batch][key]) for key in ("lr_pca", "knn_pca")), *times]
            print(f"| {names[batch]} | {settings} | {sides[0].get('n', 0)} | {' | '.join(cells)} | {verdict} |")
    return int(not all(verdicts))


def _mean(path: Any, batch: int, settings: str, seeds: list[int]) -> dict[str, float]:
    done = [
        {row["seed"]: row for row in stored(p) if (row["batch"], row["settings"]) == (batch, settings)}
        for p in (OURS, PEER)
    ]
    # the seeds that both sides have, or where one has none, those of the other
    shared = [seed for seed in seeds if all(seed in d for d in done)] or seeds
    rows = [row for seed, row in done[path == PEER].items() if seed in shared]
    keys = [key for key in rows[0] if key not in ("batch", "settings", "seed")] if rows else []
    return {key: float(np.mean([row[key] for row in rows])) for key in keys} | ({"n": len(rows)} if rows else {})


def _cell(row: dict[str, float]) -> str:
    if not row:
        return "-"
    before = [f"{row[f'untrained_{key}']:.3f}" for key in MEASURES[:2] if f"untrained_{key}" in row]
    text = " / ".join(f"{row[key]:.3f}" for key in MEASURES)
    return f"{text} ({' / '.join(before)})" if before else text


if __name__ == "__main__":
    sys.exit(main())
