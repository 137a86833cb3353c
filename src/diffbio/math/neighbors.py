"""k-nearest-neighbour search on the host: the only file that knows an index library."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from ..errors import ConfigError, DataError

EXACT_UP_TO = 20_000  # reference points; beyond, an inverted-file index is several times faster
PAIRS_PER_BLOCK = 1 << 22  # entries of a block of pairwise differences held at once
METRICS = ("euclidean", "cosine", "correlation", "manhattan")
PROBED = {"manhattan": 8}  # share of an index's lists that is looked through, 1 in so many; else 1 in 16
NO_SPREAD = 1e-6  # a row whose spread is this share of its length is constant up to rounding


class Neighbors(NamedTuple):
    """The k nearest reference points of each query, nearest first; equal distances by lower index."""

    indices: Int[np.ndarray, "cells neighbors"]  # int32
    distances: Float[np.ndarray, "cells neighbors"]  # float32


def knn(
    x: Real[Any, "cells features"],
    k: int,
    *,
    metric: str = "euclidean",
    queries: Real[Any, "_queries _features"] | None = None,
) -> Neighbors:
    """Finds the k rows of `x` nearest to each row of `queries`, or to each row of `x`, itself excluded.

    Exact up to 20,000 rows. Larger sets use an inverted-file index (faiss; cost n^1.5 · features, memory n · k):
    about 99 % of the true neighbours, same result on every run. Distances of those found are always exact.

    Args:
        x: reference points, NumPy or JAX.
        k: how many neighbours; below the number of cells, since a cell is not its own neighbour.
        metric: "euclidean"; "manhattan", the sum of absolute differences; "cosine", 1 - cos of the angle, where a
            zero row has distance 1 to every other row and 0 to another zero row; or "correlation", the same of rows
            minus their means.
        queries: points to look up; a query equal to a reference point finds it at distance 0.

    Raises:
        ConfigError: k < 1, k too large, or an unknown metric.
        DataError: NaN or infinity in the points, or another number of features in `queries`.
    """
    points = _points(x, metric, "x")
    own = queries is None
    asked = points if queries is None else _points(queries, metric, "queries")
    largest = len(points) - 1 if own else len(points)
    if not 1 <= k <= largest:
        msg = f"knn: k must be from 1 to {largest} for {len(points)} cells, got {k}."
        raise ConfigError(msg)
    if asked.shape[1] != points.shape[1]:
        msg = f"knn: queries have {asked.shape[1]} features, x has {points.shape[1]}."
        raise DataError(msg)
    search = _exact if len(points) <= EXACT_UP_TO else _large
    found = search(points, asked, k + 1 if own else k, metric)
    if own:
        found = _without_self(found)
    return _sorted(points, asked, found, metric)


def _points(x: Any, metric: str, name: str) -> np.ndarray:
    """Rows as float32 whose Euclidean order is the order of the metric (but for "manhattan")."""
    if metric not in METRICS:
        msg = f"knn: metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}."
        raise ConfigError(msg)
    points = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        msg = f"knn: {name} holds NaN or infinity, first in row {row}; remove or impute it."
        raise DataError(msg)
    if metric in ("euclidean", "manhattan"):
        return points
    if metric == "correlation":
        length = np.linalg.norm(points, axis=1, keepdims=True)
        points = points - points.mean(axis=1, keepdims=True)
        points *= np.linalg.norm(points, axis=1, keepdims=True) > NO_SPREAD * length
    norm = np.linalg.norm(points, axis=1, keepdims=True)
    # the extra column holds a zero row at cosine distance 1 from all others, and at 0 from its like
    return np.hstack([points / np.where(norm > 0, norm, 1.0), norm == 0]).astype(np.float32)


def _exact(points: np.ndarray, asked: np.ndarray, k: int, metric: str) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    by = "manhattan" if metric == "manhattan" else "euclidean"
    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric=by).fit(points)
    return np.asarray(index.kneighbors(asked, return_distance=False))


def _large(points: np.ndarray, asked: np.ndarray, k: int, metric: str) -> np.ndarray:
    import faiss

    n, width = points.shape
    by = faiss.METRIC_L1 if metric == "manhattan" else faiss.METRIC_L2
    lists, share = int(4 * np.sqrt(n)), PROBED.get(metric, 16)
    index = faiss.IndexIVFFlat(faiss.IndexFlat(width, by), width, lists, by)
    index.cp.seed = 0
    index.cp.min_points_per_centroid = 1
    index.train(points)
    index.add(points)
    index.nprobe = max(256 // share, lists // share)
    found = index.search(asked, k)[1]
    short = (found < 0).any(axis=1)  # the lists probed held fewer than k points
    if short.any():
        found[short] = _exact(points, asked[short], k, metric)
    return np.asarray(found)


def _without_self(found: np.ndarray) -> np.ndarray:
    """Drops row i from its own list; where k + 1 duplicates crowded it out, the farthest entry instead."""
    is_self = found == np.arange(len(found))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return found[~is_self].reshape(len(found), -1)


def _sorted(points: np.ndarray, asked: np.ndarray, found: np.ndarray, metric: str) -> Neighbors:
    """Exact distances from differences, not from |a|² - 2ab + |b|²; nearest first, ties by index."""
    k = found.shape[1]
    distances = np.empty(found.shape, np.float32)
    step = max(1, PAIRS_PER_BLOCK // (k * points.shape[1]))
    for start in range(0, len(asked), step):
        rows = slice(start, start + step)
        gap = asked[rows, None, :] - points[found[rows]]
        if metric == "manhattan":
            distances[rows] = np.abs(gap).sum(axis=2)
            continue
        squared = np.einsum("qkf,qkf->qk", gap, gap)
        distances[rows] = np.sqrt(squared) if metric == "euclidean" else squared / 2
    order = np.lexsort((found, distances), axis=1)
    indices, distances = (np.take_along_axis(a, order, axis=1) for a in (found, distances))
    return Neighbors(indices.astype(np.int32), distances)


def nearest(
    points: Float[Array, "cells features"],
    k: int,
    *,
    queries: Float[Array, "queries features"] | None = None,
    metric: str = "euclidean",
) -> Int[Array, "_rows neighbors"]:
    """Row numbers of the k nearest `points` of each query, or of each point, itself excluded: `knn` in a JAX program.

    A discrete choice: no gradient goes through it; take distances from the rows that it names. On values it runs on
    the host at once, inside jit as a host callback.

    Raises:
        ConfigError: k is out of range, or the metric unknown.
    """
    points = jax.lax.stop_gradient(points)
    asked = None if queries is None else jax.lax.stop_gradient(queries)
    given = (points,) if asked is None else (points, asked)

    def search(points: Any, queries: Any = None) -> np.ndarray:
        return knn(points, k, metric=metric, queries=queries).indices

    if not any(isinstance(a, jax.core.Tracer) for a in given):
        return jnp.asarray(search(*given))
    largest = len(points) - 1 if queries is None else len(points)
    if not 1 <= k <= largest:
        msg = f"nearest: k must be from 1 to {largest} for {len(points)} points, got {k}."
        raise ConfigError(msg)
    shape = jax.ShapeDtypeStruct((len(given[-1]), k), jnp.int32)
    return jax.pure_callback(search, shape, *given, vmap_method="sequential")
