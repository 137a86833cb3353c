"""Cells of several types in two batches: a shift, and a bend that differs between types."""

import numpy as np
from sklearn.neighbors import NearestNeighbors


def cells_in_batches(sizes, *, seed=0, n_features=12):
    """`sizes` (batches, types) cells: dict of the operator's inputs, and the type of every cell."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes)
    centres = 4 * np.linalg.qr(rng.normal(size=(n_features, n_features)))[0][: sizes.shape[1]]
    shift = rng.normal(size=(len(sizes), 1, n_features)) * 1.5
    bend = rng.normal(size=(*sizes.shape, n_features)) * 0.5
    batch, kind = (np.repeat(i.ravel(), sizes.ravel()) for i in np.indices(sizes.shape))
    x = centres[kind] + (shift + bend)[batch, kind] + 0.7 * rng.normal(size=(len(kind), n_features))
    order = rng.permutation(len(kind))
    data = {"expression": x[order].astype(np.float32), "batch_labels": batch[order].astype(np.int32)}
    return data, kind[order]


def neighbours_with(z, labels, k=15):
    """For every cell, the share of its k nearest ones that have its label."""
    near = NearestNeighbors(n_neighbors=k + 1).fit(z).kneighbors(z, return_distance=False)[:, 1:]
    return (labels[near] == labels[:, None]).mean(axis=1)
