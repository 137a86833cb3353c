import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffbio.math.neighbors as module
from diffbio.errors import ConfigError, DataError
from diffbio.math.neighbors import knn, nearest


def distance_matrix(x, y, metric):
    x, y = x.astype(np.float64), y.astype(np.float64)
    if metric == "euclidean":
        return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))
    if metric == "manhattan":
        return np.abs(x[:, None] - y[None]).sum(-1)
    if metric == "correlation":
        return 1 - np.corrcoef(x, y)[: len(x), len(x) :]
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    return 1 - unit[0] @ unit[1].T


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)


@pytest.mark.parametrize("metric", module.METRICS)
def test_equals_a_sorted_distance_matrix(points, metric):
    dense = distance_matrix(points, points, metric)
    np.fill_diagonal(dense, np.inf)
    found = knn(points, 6, metric=metric)
    np.testing.assert_array_equal(found.indices, np.argsort(dense, axis=1)[:, :6])
    np.testing.assert_allclose(found.distances, np.sort(dense, axis=1)[:, :6], atol=1e-6)
    assert found.indices.dtype == np.int32
    assert found.distances.dtype == np.float32


@pytest.mark.parametrize("metric", module.METRICS)
def test_queries_find_themselves_when_they_are_reference_points(points, metric):
    found = knn(points, 3, metric=metric, queries=points[:5])
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(5))
    np.testing.assert_allclose(found.distances[:, 0], 0, atol=1e-6)


def test_neighbours_on_a_line():
    found = knn(np.array([[0.0], [1.0], [3.0], [7.0]]), 2)
    np.testing.assert_array_equal(found.indices, [[1, 2], [0, 2], [1, 0], [2, 1]])
    np.testing.assert_allclose(found.distances, [[1, 3], [1, 2], [2, 3], [4, 6]])


def test_far_from_the_origin_distances_stay_exact(points):
    np.testing.assert_allclose(knn(points + 1000, 3).distances, knn(points, 3).distances, rtol=1e-2)


def test_a_cell_is_never_its_own_neighbour_among_duplicates():
    found = knn(np.zeros((40, 3)), 5)
    assert not (found.indices == np.arange(40)[:, None]).any()
    assert all(len(set(row)) == 5 for row in found.indices)
    np.testing.assert_array_equal(found.distances, 0)


def test_a_zero_row_is_at_cosine_distance_one():
    x = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 0.0]])
    found = knn(x, 3, metric="cosine")
    assert found.indices[0, 0] == 3
    np.testing.assert_allclose(found.distances[0], [0, 1, 1], rtol=1e-6)


def test_a_constant_row_is_at_correlation_distance_one():
    x = np.array([[0.1, 0.1, 0.1], [1.0, 0.0, 2.0], [2.0, 0.1, 4.1], [7.7, 7.7, 7.7]])
    found = knn(x, 3, metric="correlation")
    assert found.indices[0, 0] == 3
    np.testing.assert_allclose(found.distances[0], [0, 1, 1], rtol=1e-6)


def test_accepts_jax_arrays_and_integers(points):
    np.testing.assert_array_equal(knn(jnp.asarray(points), 4).indices, knn(points, 4).indices)
    assert knn(np.arange(12).reshape(6, 2), 2).indices.shape == (6, 2)


@pytest.mark.parametrize("metric", ["euclidean", "correlation", "manhattan"])
def test_large_sets_find_nearly_all(monkeypatch, metric):
    x = np.random.default_rng(1).normal(size=(3000, 10)).astype(np.float32)
    expected = knn(x, 10, metric=metric)
    monkeypatch.setattr(module, "EXACT_UP_TO", 10)
    found = knn(x, 10, metric=metric)
    pairs = zip(found.indices, expected.indices, strict=True)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])
    assert recall > 0.9
    np.testing.assert_array_equal(found.indices, knn(x, 10, metric=metric).indices)


@pytest.mark.parametrize("k", [0, -1, 200, 500])
def test_impossible_k_is_named(points, k):
    with pytest.raises(ConfigError, match=f"k must be from 1 to 199 for 200 cells, got {k}"):
        knn(points, k)


def test_queries_may_ask_for_all_points(points):
    assert knn(points, 200, queries=points[:2]).indices.shape == (2, 200)
    with pytest.raises(ConfigError, match="1 to 200"):
        knn(points, 201, queries=points[:2])


def test_bad_points_are_named(points):
    bad = points.copy()
    bad[17, 2] = np.nan
    with pytest.raises(DataError, match="row 17"):
        knn(bad, 3)
    with pytest.raises(DataError, match="queries have 4 features, x has 7"):
        knn(points, 3, queries=points[:, :4])
    with pytest.raises(ConfigError, match="metric"):
        knn(points, 3, metric="chebyshev")


def test_nearest_is_knn_in_a_program():
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    wanted = knn(x, 5).indices
    np.testing.assert_array_equal(nearest(jnp.asarray(x), 5), wanted)
    np.testing.assert_array_equal(jax.jit(lambda x: nearest(x, 5))(x), wanted)
    np.testing.assert_array_equal(
        jax.jit(lambda x, q: nearest(x, 5, queries=q))(x, x[:7] + 0.1), knn(x, 5, queries=x[:7] + 0.1).indices
    )
    grad = jax.jit(jax.grad(lambda x: ((x[:, None] - x[nearest(x, 5)]) ** 2).sum()))(x)
    np.testing.assert_allclose(grad, jax.grad(lambda x: ((x[:, None] - x[wanted]) ** 2).sum())(x), rtol=1e-5)
    with pytest.raises(ConfigError, match="from 1 to 59"):
        jax.jit(lambda x: nearest(x, 60))(x)
