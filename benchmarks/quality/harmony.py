"""Harmony beside R's stored result and harmonypy: agreement, mixing, and what is left of the cell types.

    uv run python -m benchmarks.quality.harmony                  # ours anew, harmonypy as stored
    uv run python -m benchmarks.quality.harmony --rerun-peers    # harmonypy too, in the ``scib`` environment

On ``harmony_reference_pbmc3500``: correlation of every component with what the R program made of the same
30 components, and the median LISI of the donors. On ``pbmc_three_chemistries`` (30 components of
log-normalised counts, 2000 variable genes): median LISI of chemistry and of cell type, silhouette of the
cell types. Settings are those of the publication, K = min(cells / 30, 100). Seconds are CPU seconds of one
run without compilation.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.quality.integration import REPO, RESULTS, run_module
from benchmarks.quality.lisi import lisi

STORED = RESULTS / "harmony_harmonypy.json"
BARS = {
    ("pbmc3500", "smallest correlation with R"): (0.98, 1.0),
    ("pbmc3500", "mean correlation with R"): (0.995, 1.0),
    ("pbmc3500", "iLISI"): (2.35, 2.45),
    ("chemistries", "iLISI"): (2.1, np.inf),
    ("chemistries", "cLISI"): (0, 1.01),
    ("chemistries", "silhouette of cell types"): (0.42, 1.0),
}


def data_folder() -> Path:
    """Where the data lies: DIFFBIO_DATA, else ../shared/data."""
    return Path(os.environ.get("DIFFBIO_DATA", REPO.parent / "shared" / "data"))


def pbmc3500() -> dict[str, np.ndarray]:
    import anndata

    cells = anndata.read_h5ad(data_folder() / "harmony_reference_pbmc3500.h5ad")
    return {
        "x": np.asarray(cells.obsm["X_pca"], np.float32),
        "batch": cells.obs["batch"].to_numpy(str),
        "r": np.asarray(cells.obsm["X_pca_harmony_r"]),
    }


def chemistries() -> dict[str, np.ndarray]:
    import anndata
    import scanpy as sc

    cells = anndata.read_h5ad(data_folder() / "pbmc_three_chemistries.h5ad")
    sc.pp.filter_genes(cells, min_cells=3)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=2000, batch_key="batch")
    cells = cells[:, cells.var["highly_variable"]].copy()
    sc.pp.pca(cells, n_comps=30, random_state=0)
    return {
        "x": np.asarray(cells.obsm["X_pca"], np.float32),
        "batch": cells.obs["batch"].to_numpy(str),
        "type": cells.obs["cell_type"].to_numpy(str),
    }


def ours(data: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Our corrected embedding and the CPU seconds of a second, compiled run."""
    import jax
    from flax import nnx

    from diffbio.operators.singlecell import BatchCorrectionConfig, DifferentiableHarmony

    cells, features = data["x"].shape
    names, labels = np.unique(data["batch"], return_inverse=True)
    config = BatchCorrectionConfig(
        n_clusters=min(round(cells / 30), 100), n_features=features, n_batches=len(names)
    )
    harmony = DifferentiableHarmony(config, rngs=nnx.Rngs(0))
    inputs = {"embeddings": data["x"], "batch_labels": labels.astype(np.int32)}
    jax.block_until_ready(harmony.apply(inputs)[0]["corrected_embeddings"])
    start = time.process_time()
    corrected = jax.block_until_ready(harmony.apply(inputs)[0]["corrected_embeddings"])
    return np.asarray(corrected), time.process_time() - start


def harmonypy(data: dict[str, np.ndarray], *mode: str) -> tuple[np.ndarray, float]:
    """The corrected embedding of harmonypy and its CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in.npz", f"{folder}/out.npz"
        np.savez(source, x=data["x"], batch=data["batch"])
        run_module("scib", "benchmarks.peers.run_harmonypy", source, target, *mode)
        with np.load(target) as found:
            return found["z"], float(found["cpu_s"])


def score(z: np.ndarray, data: dict[str, np.ndarray]) -> dict[str, float]:
    from sklearn.metrics import silhouette_score

    scores = {}
    if "r" in data:
        correlations = [np.corrcoef(z[:, i], data["r"][:, i])[0, 1] for i in range(z.shape[1])]
        scores["smallest correlation with R"] = min(correlations)
        scores["mean correlation with R"] = np.mean(correlations)
    scores["iLISI"] = np.median(lisi(z, data["batch"]))
    if "type" in data:
        scores["cLISI"] = np.median(lisi(z, data["type"]))
        scores["silhouette of cell types"] = silhouette_score(z, data["type"])
    return {key: round(float(value), 4) for key, value in scores.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    arguments.add_argument("--rerun-peers", action="store_true")
    rerun = arguments.parse_args().rerun_peers
    datasets = {"pbmc3500": (pbmc3500(), ("classic",)), "chemistries": (chemistries(), ())}
    if rerun:
        found = {name: harmonypy(data, *mode) for name, (data, mode) in datasets.items()}
        peers = {n: score(z, datasets[n][0]) | {"CPU s": round(cpu, 2)} for n, (z, cpu) in found.items()}
        STORED.write_text(json.dumps(peers, indent=1) + "\n")
    peers = json.loads(STORED.read_text())
    print(f"{'data':12s} {'what':28s} {'ours':>8s} {'peer':>8s} {'baseline':>8s}   bar")
    failed = False
    for name, (data, _) in datasets.items():
        z, cpu = ours(data)
        got, plain = score(z, data), score(data["x"], data)
        for what, value in (got | {"CPU s": round(cpu, 2)}).items():
            low, high = BARS.get((name, what), (-np.inf, np.inf))
            missed = not low <= value <= high
            failed |= missed
            sides = [f">= {low}" * (low > 0), f"<= {high}" * (high not in (1.0, np.inf))]
            bar = " and ".join(filter(None, sides)) + " MISSED" * missed
            row = (value, peers[name].get(what), plain.get(what))
            numbers = ["       -" if v is None else f"{v:8.4f}" for v in row]
            print(f"{name:12s} {what:28s}", *numbers, " ", bar)
    print("peer: harmonypy 2.1 (pbmc3500: lambda 1, as R; chemistries: its defaults); baseline: uncorrected")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
