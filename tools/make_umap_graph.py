"""Writes umap_graph.npz: neighbour lists and umap-learn's fuzzy simplicial set of them, for four cases.

Run with the project's environment (scanpy brings umap-learn): `python tools/make_umap_graph.py`.
"""

from pathlib import Path

import numpy as np
from umap.umap_ import fuzzy_simplicial_set

from diffbio.math.neighbors import knn

N_NEIGHBORS = 15

rng = np.random.default_rng(0)
x = (rng.normal(size=(100, 5)) + 4 * rng.integers(0, 3, size=(100, 1))).astype(np.float32)
x[:4] = x[0]  # a few duplicates
cases = {
    "clusters": x,
    "equal": np.zeros_like(x[:40]),
    "apart": np.vstack([np.zeros_like(x[:40]), np.ones((1, 5), np.float32)]),
    "huge": x[:60] * 1e6,
}
stored = {}
for name, points in cases.items():
    indices, distances = knn(points, N_NEIGHBORS - 1)
    n = len(points)
    graph, _, _ = fuzzy_simplicial_set(
        points,
        N_NEIGHBORS,
        np.random.RandomState(0),  # umap's interface; unused, since the lists are given
        "euclidean",
        knn_indices=np.hstack([np.arange(n, dtype=np.int32)[:, None], indices]),
        knn_dists=np.hstack([np.zeros((n, 1), np.float32), distances]),
    )
    graph = graph.tocsr()
    graph.sort_indices()
    graph = graph.tocoo()
    stored["indices_" + name] = indices
    stored["distances_" + name] = distances
    stored["weights_" + name] = np.stack([graph.row, graph.col, graph.data]).astype(np.float32)
np.savez_compressed(Path(__file__).parents[1] / "tests" / "oracles" / "umap_graph.npz", **stored)
