"""Edge lists hold the matrices that they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffbio.math import transitions
from diffbio.math.graph import fuzzy_simplicial_set
from diffbio.math.neighbors import knn

POINTS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def dense(edges, n):
    return transitions.to_scipy(edges, n).toarray()


def test_connectivities_are_umaps():
    found = jax.jit(lambda x: transitions.connectivities(x, 7))(POINTS)
    wanted = fuzzy_simplicial_set(*knn(POINTS, 6))
    assert len(found.weights) == 2 * 40 * 6
    np.testing.assert_allclose(dense(found, 40), dense(wanted, 40), atol=1e-6)


@pytest.mark.parametrize("mode", ["union", "mean"])
def test_directed_weights_become_symmetric(mode):
    indices = jnp.asarray(knn(POINTS, 5).indices)
    weights = jax.random.uniform(jax.random.key(0), indices.shape)
    directed = dense(transitions.from_lists(indices, weights), 40)
    both = directed + directed.T
    wanted = both - directed * directed.T if mode == "union" else both / 2
    found = transitions.symmetric_edges(indices, weights, mode=mode)
    np.testing.assert_allclose(dense(found, 40), wanted, atol=1e-6)
    half = len(found.weights) // 2
    np.testing.assert_array_equal(found.weights[:half], found.weights[half:])


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "correlation", "manhattan"])
def test_distances_in_lists_are_those_of_the_search(metric):
    indices, distances = knn(POINTS, 4, metric=metric)
    found = transitions.list_distances(jnp.asarray(POINTS), jnp.asarray(indices), metric=metric)
    np.testing.assert_allclose(found, distances, atol=1e-5)


def test_rows_products_and_sums():
    edges = transitions.connectivities(jnp.asarray(POINTS), 5)
    chain = transitions.normalized_rows(edges, 40)
    np.testing.assert_allclose(transitions.row_sums(chain, 40), 1, rtol=1e-5)
    matrix = dense(chain, 40)
    np.testing.assert_allclose(transitions.product(chain, jnp.asarray(POINTS), 40), matrix @ POINTS, atol=1e-5)
    np.testing.assert_allclose(dense(transitions.transposed(chain), 40), matrix.T)
    mixed = transitions.combined([(0.25, chain), (0.75, transitions.transposed(chain))])
    np.testing.assert_allclose(dense(mixed, 40), 0.25 * matrix + 0.75 * matrix.T, atol=1e-6)
    np.testing.assert_allclose(dense(transitions.from_scipy(matrix), 40), matrix)


def test_a_cell_without_edges_keeps_none():
    edges = transitions.from_scipy(np.array([[0.0, 2.0], [0.0, 0.0]], np.float32))
    np.testing.assert_array_equal(dense(transitions.normalized_rows(edges, 2), 2), [[0, 1], [0, 0]])


def test_weights_have_the_gradient_of_the_points():
    with jax.enable_x64(True):
        x = jnp.asarray(POINTS[:20], jnp.float64)
        f = jax.jit(lambda x: (transitions.connectivities(x, 5).weights ** 2).sum())
        check_grads(f, (x,), order=1, modes=["rev"], rtol=1e-5, eps=1e-6)
