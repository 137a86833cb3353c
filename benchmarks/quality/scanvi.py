"""SCANVI after its default training beside scvi-tools and logistic regression: labels of unlabelled cells, one table.

    taskset -c 1 uv run python -m benchmarks.quality.scanvi                  # 5 draws of labels, about 15 CPU minutes
    taskset -c 1 uv run python -m benchmarks.quality.scanvi --data pbmc3k --label-seeds 0
    uv run python -m benchmarks.quality.scanvi --peer    # first runs scvi-tools again, for hours

1, 5 or 10 % of the cells of every type are labelled, one at least; accuracy, macro-F1 and expected calibration
error (ECE, 15 bins) on the others. Ours: the tutorial, `SCVI(adata).train()` (all cells, seed 0), then
`SCANVI.from_scvi_model(...).train()` and `predict(soft=True)`, all defaults; CPU-seconds of SCANVI alone, one
thread, compilation included. On the same labels, stored in `results/count_models_scvi.json` by
`benchmarks/peers/run_count_models.py`: scvi-tools' SCANVI with `train_size=1.0`, and (in brackets) with its
default, which withholds 10 % of the labels; logistic regression, defaults of scikit-learn, on scvi-tools' SCVI
latent space ("lr_scvi") and on 30 principal components ("lr_pca"). Means over the draws of labels that all sides
have ("n").

Bar: accuracy and macro-F1 above SCANVI of scvi-tools and at least both regressions; ECE at most 0.05.
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
from benchmarks.quality.count_models import FRACTIONS, LABEL_DATA, REPO, RESULTS, Data, labelled_cells, load, scores

PEER_PYTHON = REPO / "benchmarks" / "envs" / "scvi" / "bin" / "python"
MEASURES = ("accuracy", "macro_f1", "ece")
BASELINES = ("lr_scvi", "lr_pca")
LARGEST_ECE = 0.05


def pretrained(data: Data) -> Any:
    """SCVI, trained on all cells."""
    from diffbio.models import SCVI

    adata = data.annotated()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    model.train(progress=False)
    return model


def ours(data: Data, scvi: Any, mask: np.ndarray) -> dict[str, float]:
    """Scores on the unlabelled cells, and CPU-seconds."""
    from diffbio.models import SCANVI

    labels = np.where(mask, [f"t{code:03d}" for code in data.cell_type], "unknown")
    cpu = time.process_time()
    model = SCANVI.from_scvi_model(scvi, "unknown", labels_key="labels", adata=data.annotated(labels=labels))
    model.train(progress=False)
    table = model.predict(soft=True)
    cpu = time.process_time() - cpu
    probabilities = np.zeros((len(mask), data.n_types))
    probabilities[:, [int(name[1:]) for name in table.columns]] = table.to_numpy()
    return {**scores(probabilities[~mask], data.cell_type[~mask]), "cpu_s": cpu}


def stored() -> dict[tuple[Any, ...], dict[str, float]]:
    """The other sides' scores by name, data set, fraction and draw."""
    found = {}
    for row in json.loads((RESULTS / "count_models_scvi.json").read_text())["rows"]:
        if row["kind"] != "scvi":
            name = row["kind"] + ("_withheld" if row.get("train_size") == 0.9 else "")
            found[name, row["data"], row["fraction"], row["label_seed"]] = row
    return found


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(LABEL_DATA), choices=LABEL_DATA)
    parser.add_argument("--label-seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--peer", action="store_true", help="run scvi-tools where its results are missing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.peer:
        command = [str(PEER_PYTHON), "-m", "benchmarks.peers.run_count_models", "--data", *args.data]
        seeds = [str(seed) for seed in args.label_seeds]
        subprocess.run([*command, "--label-seeds", *seeds], cwd=REPO, check=True)
    others = stored()
    print("accuracy / macro-F1 / ECE    n | ours              | scvi-tools (10 % of labels withheld)    | lr_scvi     "
          "      | lr_pca            | CPU-s ours  peer | bar")  # fmt: skip
    for name in args.data:
        data = load(name)
        scvi = pretrained(data)
        for fraction in FRACTIONS:
            mine = {seed: ours(data, scvi, labelled_cells(data.cell_type, fraction, seed)) for seed in args.label_seeds}
            print(_line(name, fraction, mine, others), flush=True)


def _line(name: str, fraction: float, mine: dict[int, dict[str, float]], others: dict[Any, dict[str, float]]) -> str:
    sides = ("scanvi", *BASELINES)
    shared = [seed for seed in mine if all((side, name, fraction, seed) in others for side in sides)]
    seeds = shared or list(mine)
    found = {"ours": _mean([mine[seed] for seed in seeds])}
    for side in (*sides, "scanvi_withheld"):
        found[side] = _mean([others[key] for seed in seeds if (key := (side, name, fraction, seed)) in others])
    met = "no peer run"
    if shared:
        at_least = all(found["ours"][k] >= found[side][k] for side in BASELINES for k in MEASURES[:2])
        above = all(found["ours"][k] > found["scanvi"][k] for k in MEASURES[:2])
        met = "met" if at_least and above and found["ours"]["ece"] <= LARGEST_ECE else "NOT met"
    return (
        f"{name[:22]:22}{fraction:5.0%} {len(seeds):2} | {_cell(found['ours'])} | {_cell(found['scanvi'])}"
        f" ({_cell(found['scanvi_withheld'])}) | {_cell(found['lr_scvi'])} | {_cell(found['lr_pca'])} |"
        f" {found['ours']['cpu_s']:8.1f} {found['scanvi'].get('cpu_s', np.nan):7.1f} | {met}"
    )


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    keys = [key for key in (*MEASURES, "cpu_s") if rows and key in rows[0]]
    return {key: float(np.mean([row[key] for row in rows])) for key in keys}


def _cell(row: dict[str, float]) -> str:
    return " / ".join(f"{row[key]:.3f}" for key in MEASURES) if row else "        -        "


if __name__ == "__main__":
    main()
