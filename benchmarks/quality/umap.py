"""Parametric UMAP on real data beside umap-learn and two principal components: one table.

    uv run python -m benchmarks.quality.umap            # three seeds, about two CPU minutes
    uv run python -m benchmarks.quality.umap --seeds 1
    uv run python -m benchmarks.quality.umap --peer     # first runs ParametricUMAP again, and ours, for the
                                                        # CPU time (needs peers/make_umap_env.sh)

- trust: trustworthiness with 15 neighbours; label: accuracy of 15-nearest-neighbour classification in the
  map, 5-fold; held-out: a fifth of the cells embedded by what was fitted to the others, trust among them and
  accuracy with the others as reference.
- Data: 30 principal components of `pbmc4k_ambient` (2,170 cells, 2,000 variable genes); scikit-learn's digits
  (1,797 x 64).
- ours: `diffbio.fit(DifferentiableUMAP(config), {"features": x})` with defaults; mean of the seeds, worst in
  brackets. umap-learn: seed 0 of its non-parametric UMAP, defaults, `transform` for the held-out.

CPU time: construction, fit, embedding, compilation included, imports not; ours and ParametricUMAP's each
in a process of its own on one core, measured in the same run and stored in results/umap_parametric.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
STORED = REPO / "benchmarks" / "results" / "umap_parametric.json"
PEER_PYTHON = REPO / "benchmarks" / "envs" / "umap" / "bin" / "python"
BARS = {
    ("pbmc", "trust"): 0.96, ("pbmc", "label"): 0.96,
    ("pbmc", "held-out trust"): 0.955, ("pbmc", "held-out label"): 0.96,
    ("digits", "trust"): 0.98, ("digits", "label"): 0.97,
}  # fmt: skip
Map = "Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]"  # (train, new) -> both embedded


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a data set."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        return (x / 16).astype(np.float32), labels
    import scanpy as sc

    from diffbio.math.linalg import pca

    folder = Path(os.environ.get("DIFFBIO_DATA", REPO.parent / "shared" / "data"))
    adata = sc.read_h5ad(folder / "pbmc4k_ambient.h5ad")
    sc.pp.filter_genes(adata, min_cells=3)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000)
    counts = adata[:, adata.var["highly_variable"].to_numpy()].X
    return pca(counts, 30).scores, np.asarray(adata.obs["cell_type"].astype(str).tolist())


def ours(train: np.ndarray, new: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits to `train`, embeds both."""
    from flax import nnx

    import diffbio
    from diffbio.operators.normalization import DifferentiableUMAP, UMAPConfig

    op = DifferentiableUMAP(UMAPConfig(input_features=train.shape[1]), rngs=nnx.Rngs(seed))
    diffbio.fit(op, {"features": train}, seed=seed, progress=False)
    first, second = (op.apply({"features": x}, {}, None)[0]["embedding"] for x in (train, new))
    return np.asarray(first), np.asarray(second)


def umap_learn(train: np.ndarray, new: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by umap-learn."""
    import umap

    model = umap.UMAP(random_state=seed).fit(train)
    return model.embedding_, model.transform(new) if len(new) else new


def two_components(train: np.ndarray, new: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by PCA."""
    from diffbio.math.linalg import pca

    found = pca(train, 2)
    return found.scores, (new - found.mean) @ found.components.T


def scores(name: str, method: Map, seed: int) -> dict[str, float]:
    """All figures of one method on one data set; `cpu_s` is that of the fit to all cells."""
    from sklearn.manifold import trustworthiness
    from sklearn.model_selection import cross_val_score, train_test_split
    from sklearn.neighbors import KNeighborsClassifier

    x, labels = load(name)
    started = time.process_time()
    y, _ = method(x, x[:0], seed)
    result = {
        "cpu_s": time.process_time() - started,
        "trust": trustworthiness(x, y, n_neighbors=15),
        "label": cross_val_score(KNeighborsClassifier(15), y, labels, cv=5).mean(),
    }
    if name == "pbmc":
        fitted, held = train_test_split(np.arange(len(x)), test_size=0.2, random_state=0, stratify=labels)
        reference, new = method(x[fitted], x[held], seed)
        result["held-out trust"] = trustworthiness(x[held], new, n_neighbors=15)
        classifier = KNeighborsClassifier(15).fit(reference, labels[fitted])
        result["held-out label"] = classifier.score(new, labels[held])
    return result


def on_one_core(command: list[str]) -> dict[str, float]:
    """Runs a command that prints a JSON line, on one core, without our compilation cache."""
    environment = {**os.environ, "DIFFBIO_COMPILATION_CACHE": "off", "OMP_NUM_THREADS": "1"}
    core = min(os.sched_getaffinity(0))
    out = subprocess.run(
        command, check=True, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    return json.loads(out.stdout.splitlines()[-1])


def measure_peer() -> None:
    """Runs ParametricUMAP and ours on the digits and stores both."""
    if not PEER_PYTHON.exists():
        sys.exit("run `bash benchmarks/peers/make_umap_env.sh` first")
    peer = on_one_core([str(PEER_PYTHON), "benchmarks/peers/run_parametric_umap.py"])
    own = on_one_core([sys.executable, "-m", "benchmarks.quality.umap", "--time"])
    STORED.write_text(json.dumps({"ParametricUMAP": peer, "ours": own}, indent=1) + "\n")


def time_ours() -> None:
    """One fit of the digits as a JSON line."""
    for module in ("diffbio", "diffbio.operators.normalization", "sklearn.manifold", "sklearn.neighbors"):
        importlib.import_module(module)  # imports are not timed, on either side
    result = scores("digits", ours, 0)
    sys.stdout.write(json.dumps({k: round(float(v), 4) for k, v in result.items()}) + "\n")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="measure ParametricUMAP and our CPU time again")
    parser.add_argument("--time", action="store_true", help="(used by --peer) one fit of the digits")
    arguments = parser.parse_args()
    if arguments.time:
        time_ours()
        return
    if arguments.peer:
        measure_peer()
    warnings.simplefilter("ignore")  # umap-learn's, of its random_state and threads
    print(f"{'data':<7} {'figure':<15} {'ours (worst)':<16} {'umap-learn':>10} {'PCA-2':>7} {'bar':>6}")
    passed = True
    for name in ("pbmc", "digits"):
        own = [scores(name, ours, seed) for seed in range(arguments.seeds)]
        peer, baseline = scores(name, umap_learn, 0), scores(name, two_components, 0)
        for figure in own[0]:
            values = [run[figure] for run in own]
            bar = BARS.get((name, figure))
            if figure == "cpu_s":
                values, bar_text = values[-1:], ""
                shown = f"{values[0]:.1f}"
                print(f"{name:<7} {'CPU s':<15} {shown:<16} {peer[figure]:>10.1f} {baseline[figure]:>7.1f}")
                continue
            passed &= bool(np.mean(values) >= bar)
            shown, bar_text = f"{np.mean(values):.4f} ({min(values):.4f})", f"{bar:.3f}"
            print(f"{name:<7} {figure:<15} {shown:<16} {peer[figure]:>10.4f} {baseline[figure]:>7.4f} {bar_text:>6}")
    if STORED.exists():
        stored = json.loads(STORED.read_text())
        theirs, own_time = stored["ParametricUMAP"], stored["ours"]["cpu_s"]
        ratio = theirs["cpu_s"] / own_time
        passed &= ratio >= 3
        print(
            f"\nParametricUMAP on the digits ({theirs['versions']}): trust {theirs['trust']:.4f}, label "
            f"{theirs['accuracy']:.4f}, {theirs['cpu_s']:.1f} CPU s; ours {own_time:.1f} CPU s: {ratio:.1f} times "
            "faster (bar 3)"
        )
    print("bars: " + ("all reached" if passed else "NOT all reached"))


if __name__ == "__main__":
    main()
