from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffbio.math.graph import (
    both_directions,
    find_ab_params,
    fuzzy_simplicial_set,
    fuzzy_union,
    membership,
    smooth_knn_dist,
    union_edges,
)
from diffbio.math.neighbors import knn

N_NEIGHBORS = 15
ORACLES = Path(__file__).parents[1] / "oracles"


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 5)) + 4 * rng.integers(0, 3, size=(150, 1))
    x[:4] = x[0]  # a few duplicates
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def neighbors(points):
    return knn(points, N_NEIGHBORS - 1)


@pytest.mark.parametrize("case", ["clusters", "equal", "apart", "huge"])
def test_equals_umap(case):
    """Stored results of umap-learn 0.5.12 (`make_umap_graph.py` beside them): its import alone takes 40 s."""
    with np.load(ORACLES / "umap_graph.npz") as f:
        indices, distances, expected = f["indices_" + case], f["distances_" + case], f["weights_" + case]
    edges = fuzzy_simplicial_set(indices, distances)
    ours, theirs = np.zeros((2, len(indices), len(indices)))
    ours[edges.rows, edges.columns] = edges.weights
    theirs[*expected[:2].astype(int)] = expected[2]  # umap leaves out weights that underflow to 0
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_bandwidth_solves_its_equation(neighbors):
    sigma, rho = smooth_knn_dist(jnp.asarray(neighbors.distances))
    total = membership(jnp.asarray(neighbors.distances), sigma, rho).sum(axis=1)
    free = np.asarray(sigma) > 0.0011 * neighbors.distances.mean(axis=1)
    assert free.sum() > 140
    np.testing.assert_allclose(np.asarray(total)[free], np.log2(N_NEIGHBORS), rtol=1e-5)
    assert (np.asarray(rho)[:4] > 0).all(), "rho skips duplicates"


def test_bandwidth_has_the_unit_of_the_distances(neighbors):
    d = jnp.asarray(neighbors.distances)
    for a, b in zip(smooth_knn_dist(d), smooth_knn_dist(1000 * d), strict=True):
        np.testing.assert_allclose(1000 * a, b, rtol=1e-4)


def test_closer_neighbours_are_members_more(neighbors):
    d = jnp.asarray(neighbors.distances)
    w = membership(d, *smooth_knn_dist(d))
    assert (jnp.diff(w, axis=1) <= 0).all()
    np.testing.assert_allclose(w[:, 0], 1)


def test_gradient_of_weights_equals_finite_differences(points):
    x = points[10:40]
    indices = knn(x, 6).indices
    edges = union_edges(indices)
    with jax.enable_x64(True):

        def weights(x):
            d = jnp.sqrt(((x[:, None] - x[indices]) ** 2).sum(-1))
            return fuzzy_union(membership(d, *smooth_knn_dist(d)), edges)

        check_grads(weights, (jnp.asarray(x, jnp.float64),), order=1, modes=["rev"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_gradient_is_finite_for_duplicates(value):
    d = jnp.full((5, 4), value)
    grad = jax.grad(lambda d: (membership(d, *smooth_knn_dist(d)) * jnp.arange(4.0)).sum())(d)
    assert jnp.isfinite(grad).all()


def test_two_neighbours_of_which_one_is_the_cell_weigh_one():
    d = jnp.array([[1.0], [3.0]])
    np.testing.assert_allclose(membership(d, *smooth_knn_dist(d)), 1)


def test_union_equals_the_dense_formula(neighbors):
    n, k = neighbors.indices.shape
    w = np.random.default_rng(1).uniform(size=(n, k)).astype(np.float32)
    a = np.zeros((n, n), np.float32)
    np.put_along_axis(a, neighbors.indices, w, axis=1)
    edges = union_edges(neighbors.indices)
    got = np.zeros((n, n), np.float32)
    got[edges.rows, edges.columns] = fuzzy_union(jnp.asarray(w), edges)
    np.testing.assert_allclose(got, a + a.T - a * a.T, rtol=1e-6)
    forward, backward = both_directions(jnp.asarray(w), edges)
    got[edges.rows, edges.columns] = (forward + backward) / 2
    np.testing.assert_allclose(got, (a + a.T) / 2, rtol=1e-6)
    assert len(edges.rows) == ((a + a.T) > 0).sum(), "each pair once"


@pytest.mark.parametrize(("a", "b", "union"), [(0.8, 0.3, 0.86), (0.5, 0.5, 0.75), (1.0, 0.2, 1.0)])
def test_union_of_two_directions(a, b, union):
    edges = union_edges(np.array([[1], [0]]))
    np.testing.assert_allclose(fuzzy_union(jnp.array([[a], [b]]), edges), [union, union], rtol=1e-6)


def test_curve_parameters_equal_umap():
    np.testing.assert_allclose(find_ab_params(1.0, 0.1), (1.5769, 0.8951), atol=1e-3)
    np.testing.assert_allclose(find_ab_params(1.0, 0.5), (0.5830, 1.3342), atol=1e-3)
    np.testing.assert_allclose(find_ab_params(2.0, 0.1), (0.5446, 0.8421), atol=2e-3)
