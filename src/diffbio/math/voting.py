"""Labels made uniform within small groups of similar cells (majority voting of CellTypist)."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real, Shaped

from ..errors import ConfigError, DataError

CELLS_PER_CLUSTER = 30
ROUNDS = 15  # of k-means; a further one moves hardly a cell between so small clusters
TRAINING_CELLS = 64  # per cluster, that the centres are computed from where there are more
HETEROGENEOUS = "Heterogeneous"  # CellTypist's word


class Vote(NamedTuple):
    """The label of each cell's cluster, and the share of that cluster's cells that had it."""

    labels: Shaped[np.ndarray, "cells"]  # text, dtype object
    share: Float[np.ndarray, "cells"]  # float32


def over_cluster(
    embedding: Real[Any, "cells features"], *, n_clusters: int | None = None, seed: int = 0
) -> Int[np.ndarray, "cells"]:
    """Divides cells into many small clusters by k-means: codes (cells,) from 0, without gaps.

    CellTypist over-clusters by Leiden at resolutions of 5 to 30, which grow with the number of cells. k-means with
    about 30 cells per cluster is as fine; beyond 14,000 cells there are 4 sqrt(cells) clusters, so that the cost grows
    as cells^1.5 · features: 1.5 CPU-seconds for 100,000 cells in 30 dimensions.

    Args:
        embedding: where similar cells are near each other, such as the latent space of a model.
        n_clusters: how many clusters; None is by the number of cells. Fewer come out where cells coincide.
        seed: of the cells that the centres start from; the same seed gives the same clusters.

    Raises:
        ConfigError: n_clusters below 1 or above the number of cells.
        DataError: no cells, or NaN or infinity among the numbers.
    """
    points = np.ascontiguousarray(embedding, dtype=np.float32)
    n = len(points)
    if n == 0 or not np.isfinite(points).all():
        found = "no cells" if n == 0 else "NaN or infinity"
        msg = f"over_cluster: the embedding holds {found}; pass finite numbers for at least one cell."
        raise DataError(msg)
    if n_clusters is not None and not 1 <= n_clusters <= n:
        msg = f"over_cluster: n_clusters must be from 1 to {n} for {n} cells, got {n_clusters}."
        raise ConfigError(msg)
    k = n_clusters or _how_many(n)
    if k == 1 or points.shape[1] == 0:
        return np.zeros(n, np.int32)
    import faiss

    means = faiss.Kmeans(
        points.shape[1], k, niter=ROUNDS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=TRAINING_CELLS
    )
    means.train(points - points.mean(axis=0))  # float32 distances far from the origin are coarse
    nearest = means.index.search(points - points.mean(axis=0), 1)[1][:, 0]
    return np.unique(nearest, return_inverse=True)[1].astype(np.int32)


def majority_vote(
    labels: Shaped[Any, "cells"],
    clusters: Shaped[Any, "cells"],
    *,
    min_share: float = 0.0,
    confidence: Real[Any, "cells"] | None = None,
) -> Vote:
    """Gives every cell the most frequent label of its cluster, as CellTypist does.

    Cells called "unassigned" vote as a type of their own. Of labels that are equally frequent, the one whose cells
    are surer wins, then the first by name.

    Args:
        labels: of single cells.
        clusters: of cells, any names or codes.
        min_share: a cluster whose winner has a smaller share of its cells is called "Heterogeneous"; in 0 to 1.
        confidence: how sure each cell's label is; it counts where labels are equally frequent.

    Raises:
        ConfigError: min_share outside 0 to 1.
        DataError: another number of clusters or confidences than of labels, or a confidence that is not finite.
    """
    if not 0 <= min_share <= 1:
        msg = f"majority_vote: min_share must be from 0 to 1, got {min_share}."
        raise ConfigError(msg)
    names, code = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    group = np.unique(np.asarray(clusters).astype(str), return_inverse=True)[1]
    sure = np.zeros(len(code)) if confidence is None else np.asarray(confidence, np.float64)
    if not len(code) == len(group) == len(sure):
        msg = f"majority_vote: {len(code)} labels, {len(group)} clusters, {len(sure)} confidences; pass one per cell."
        raise DataError(msg)
    if not np.isfinite(sure).all():
        msg = "majority_vote: confidence holds NaN or infinity; pass finite numbers."
        raise DataError(msg)
    if not len(code):
        return Vote(np.empty(0, object), np.empty(0, np.float32))
    # sparse: a million cells have thousands of clusters, each with a few of the labels
    pairs, at, votes = np.unique(group * len(names) + code, return_inverse=True, return_counts=True)
    place, candidate = np.divmod(pairs, len(names))
    best = np.lexsort((candidate, -np.bincount(at, sure), -votes, place))
    first = best[np.unique(place[best], return_index=True)[1]]  # of each cluster
    share = votes[first] / np.bincount(group)
    winner = np.where(share >= min_share, names[candidate[first]].astype(object), HETEROGENEOUS)
    return Vote(winner[group], share[group].astype(np.float32))


def _how_many(n: int) -> int:
    """Clusters for n cells: small sets are cut as finely as their cells allow, large ones more coarsely."""
    return max(1, min(n // 5, 10), min(round(n / CELLS_PER_CLUSTER), int(4 * np.sqrt(n))))
