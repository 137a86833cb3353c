"""Score stored embeddings with scib-metrics; runs in the ``scib`` environment.

    benchmarks/envs/scib/bin/python -m benchmarks.quality.score_integration --methods scvi

Reads the ``.npz`` files of :func:`integration_data.embedding_path`: ``embedding`` and, where the
method has clusters of its own, ``clusters``. Without them the clusters are Leiden's (15
neighbours, resolution 1, igraph flavour, 2 iterations). Adds to
``benchmarks/results/integration_scores.json``.

Metrics, all between 0 and 1 with 1 best (scib-metrics 0.6.1 with exact nearest neighbours):

- ``nmi``, ``ari``: the method's clusters against the cell types;
- ``asw_label``: cell-type silhouette; ``clisi``, ``ilisi``: scaled medians over 90 neighbours;
- ``asw_batch``: the classic scIB batch silhouette (``silhouette_batch``, not BRAS, which is in
  ``bras`` and enters no total);
- ``graph_connectivity``: over 15 neighbours.

``total`` is scIB's 0.6 bio + 0.4 batch with bio = mean(nmi, ari, asw_label, clisi) and batch =
mean(asw_batch, ilisi, graph_connectivity). ``leiden_nmi`` and ``leiden_ari`` are those of Leiden
on the same embedding at the best of 20 resolutions by NMI (``leiden_resolution``), and
``leiden_total`` is the total with them, which compares embeddings apart from their clustering.
"""

from __future__ import annotations

import argparse
import json
import warnings
from importlib.metadata import version

import numpy as np
from benchmarks.quality.integration_data import (
    DATASETS,
    RESULTS,
    SEEDS,
    IntegrationData,
    embedding_path,
    load,
)

OUTPUT = RESULTS / "integration_scores.json"
RESOLUTIONS = tuple(round(0.1 * step, 1) for step in range(1, 21))
BIO = ("nmi", "ari", "asw_label", "clisi")
BATCH = ("asw_batch", "ilisi", "graph_connectivity")


def neighbours(embedding: np.ndarray, k: int):
    """Return the exact k nearest neighbours, the cell itself first, as scib-metrics wants them."""
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k - 1, algorithm="brute").fit(embedding)
    distances, indices = index.kneighbors()
    own = np.arange(len(embedding))[:, None]
    return NeighborsResults(
        indices=np.hstack([own, indices]),
        distances=np.hstack([np.zeros_like(distances[:, :1]), distances]),
    )


class LeidenClusterer:
    """Leiden on one embedding's 15-neighbour graph, at any resolution."""

    def __init__(self, embedding: np.ndarray, seed: int):
        import anndata
        import scanpy as sc

        self._seed = seed
        self._adata = anndata.AnnData(obsm={"X": embedding}, shape=(len(embedding), 0))
        sc.pp.neighbors(self._adata, n_neighbors=15, use_rep="X", random_state=seed)

    def cluster(self, resolution: float) -> np.ndarray:
        """Return the cluster code of every cell."""
        import scanpy as sc

        sc.tl.leiden(
            self._adata,
            resolution=resolution,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=self._seed,
        )
        return self._adata.obs["leiden"].cat.codes.to_numpy()


def agreement(truth: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return NMI and ARI of a clustering."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return (
        float(normalized_mutual_info_score(truth, clusters)),
        float(adjusted_rand_score(truth, clusters)),
    )


def totals(scores: dict[str, float]) -> dict[str, float]:
    """Return the bio and batch means and scIB's weighted total."""
    bio = float(np.mean([scores[key] for key in BIO]))
    batch = float(np.mean([scores[key] for key in BATCH]))
    return {"bio": bio, "batch": batch, "total": 0.6 * bio + 0.4 * batch}


def score(
    data: IntegrationData, embedding: np.ndarray, clusters: np.ndarray | None, seed: int
) -> dict[str, float]:
    """Return every metric of one embedding."""
    import scib_metrics as sm

    embedding = np.asarray(embedding, dtype=np.float32)
    if embedding.shape[0] != len(data.cell_type) or not np.isfinite(embedding).all():
        raise ValueError(f"{data.name}: the embedding has missing cells or values that are not finite")
    leiden = LeidenClusterer(embedding, seed)
    if clusters is None:
        clusters = leiden.cluster(1.0)
    nmi, ari = agreement(data.cell_type, clusters)
    near = neighbours(embedding, 90)
    metrics = {
        "n_clusters": len(np.unique(clusters)),
        "nmi": nmi,
        "ari": ari,
        "asw_label": float(sm.silhouette_label(embedding, data.cell_type)),
        "clisi": float(sm.clisi_knn(near, data.cell_type)),
        "asw_batch": float(sm.silhouette_batch(embedding, data.cell_type, data.batch)),
        "bras": float(sm.bras(embedding, data.cell_type, data.batch)),
        "ilisi": float(sm.ilisi_knn(near, data.batch)),
        "graph_connectivity": float(sm.graph_connectivity(near.subset_neighbors(15), data.cell_type)),
    }
    metrics |= totals(metrics)
    grid = [(*agreement(data.cell_type, leiden.cluster(r)), r) for r in RESOLUTIONS]
    best_nmi, best_ari, resolution = max(grid)
    metrics |= {"leiden_nmi": best_nmi, "leiden_ari": best_ari, "leiden_resolution": resolution}
    metrics["leiden_total"] = totals(metrics | {"nmi": best_nmi, "ari": best_ari})["total"]
    return {key: round(value, 4) for key, value in metrics.items()}


def score_file(dataset: str, method: str, seed: int) -> dict[str, object]:
    """Score one stored embedding, after checking that it is of today's prepared data."""
    data = load(dataset)
    with np.load(embedding_path(dataset, method, seed)) as file:
        if str(file["fingerprint"]) != data.fingerprint():
            raise ValueError(f"{dataset}/{method}/{seed}: made from other cells or genes; run again")
        embedding = file["embedding"]
        clusters = file.get("clusters")
    scores = score(data, embedding, clusters, seed)
    return {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "fingerprint": data.fingerprint(),
        **scores,
    }


def store(record: dict[str, object]) -> None:
    """Add one record to the results file, replacing an older one of the same run."""
    runs = json.loads(OUTPUT.read_text())["runs"] if OUTPUT.exists() else []
    order = [run_key(run) for run in runs]
    if run_key(record) in order:
        runs[order.index(run_key(record))] = record
    else:
        runs.append(record)
    runs.sort(key=run_key)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(run) for run in runs)
    scorer = f"scib-metrics {version('scib-metrics')}"
    OUTPUT.write_text(f'{{"scorer": "{scorer}", "runs": [\n{rows}\n]}}\n')


def run_key(run: dict[str, object]) -> tuple[object, ...]:
    """Return what identifies a run in the results file."""
    return run["dataset"], run["method"], run["seed"]


def main() -> None:
    """Score the embeddings asked for that exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for dataset in args.datasets:
        for method in args.methods:
            for seed in args.seeds:
                if not embedding_path(dataset, method, seed).exists():
                    print(f"{dataset} {method} {seed}: no embedding stored")
                    continue
                record = score_file(dataset, method, seed)
                store(record)
                print(f"{dataset} {method} {seed}: total {record['total']:.4f}", flush=True)


if __name__ == "__main__":
    main()
