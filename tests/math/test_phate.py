import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import diffbio.math.neighbors as search
from diffbio.math.interpolation import interpolate, local_slopes, shepard_weights
from diffbio.math.metrics import pairwise
from diffbio.math.phate import (
    alpha_decay,
    dense_kernel,
    knee_point,
    landmark_labels,
    matrix_power,
    mixture_distances,
    nearest_of_some,
    potential,
    potential_distances,
    reach,
    sparse_kernel,
    stochastic,
    von_neumann_entropy,
)


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    along = rng.uniform(0, 3, size=(120, 1))
    return np.hstack([along, np.sin(2 * along), 0.1 * rng.normal(size=(120, 3))])


@pytest.fixture(scope="module")
def chain(cells):
    return stochastic(dense_kernel(jnp.asarray(cells, jnp.float32), 5, 40.0))


@pytest.mark.parametrize("metric", search.METRICS)
def test_distances_are_scipys(cells, metric):
    wanted = cdist(cells, cells, {"manhattan": "cityblock"}.get(metric, metric))
    np.testing.assert_allclose(pairwise(jnp.asarray(cells, jnp.float32), metric), wanted, atol=2e-6)


def test_a_cell_without_direction_is_at_distance_one():
    x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(pairwise(x, "cosine")[0], [0, 1, 0])


def test_weight_at_the_kth_neighbour_is_one_over_e(cells):
    d = np.sort(cdist(cells, cells), axis=1)
    weights = np.asarray(alpha_decay(jnp.asarray(d), jnp.asarray(d[:, 5:6]), 40.0))
    np.testing.assert_allclose(weights[:, 5], np.exp(-1), rtol=1e-5)  # float32 to the power of 40
    assert (weights[:, 0] == 1).all()
    edge = reach(40.0)
    at = alpha_decay(jnp.array([[0.999 * edge, 1.001 * edge, 1e30]]), jnp.ones((1, 1)), 40.0)[0]
    assert at[0] > 1e-4
    np.testing.assert_array_equal(at[1:], 0)
    slope = jax.grad(lambda d: alpha_decay(d, jnp.ones((1, 1)), 40.0).sum())(jnp.array([[0.9, 30.0]]))
    assert np.isfinite(slope).all()  # 30^40 overflows


def test_duplicates_have_weight_one():
    kernel = dense_kernel(jnp.array([[0.0], [0.0], [0.0], [1.0], [2.0]]), 2, 40.0)
    np.testing.assert_array_equal(kernel[:3, :3], 1)
    np.testing.assert_array_equal(kernel, kernel.T)


@pytest.mark.parametrize("decay", [40.0, 3.0])
def test_sparse_and_dense_kernel_are_one(cells, decay):
    dense = dense_kernel(jnp.asarray(cells, jnp.float32), 5, decay)
    np.testing.assert_allclose(sparse_kernel(cells, 5, decay).toarray(), dense, atol=1e-5)


def test_the_power_is_the_matrix_power(chain):
    with jax.enable_x64(True):
        chain = jnp.asarray(chain, jnp.float64)
        for t in (1, 2, 7, 14, 100):
            wanted = np.linalg.matrix_power(np.asarray(chain), t)
            np.testing.assert_allclose(jax.jit(matrix_power)(chain, jnp.asarray(t)), wanted, rtol=1e-12)


def test_potential_distances_are_a_metric(chain):
    with jax.enable_x64(True):
        d = np.asarray(potential_distances(potential(matrix_power(jnp.asarray(chain, jnp.float64), jnp.asarray(6)))))
    assert (np.diag(d) == 0).all()
    np.testing.assert_array_equal(d, d.T)
    assert (d[:, :, None] <= d[:, None, :] + d[None, :, :].transpose(0, 2, 1) + 1e-9).all()


def test_the_potential_of_each_gamma():
    p = jnp.array([[0.0, 0.25, 1.0]])
    np.testing.assert_allclose(potential(p), -np.log(np.asarray(p) + 1e-7), rtol=1e-6)
    np.testing.assert_allclose(potential(p, 0.0), [[0, 1, 2]])
    np.testing.assert_allclose(potential(p, -0.5), np.asarray(p) ** 0.75 / 0.75, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda p: potential(p, 0.0).sum())(p)).all()


def test_entropy_falls_from_that_of_all_states_to_none():
    np.testing.assert_allclose(von_neumann_entropy(jnp.eye(8)), np.log(8), rtol=1e-5)
    mixed = np.asarray(von_neumann_entropy(jnp.full((8, 8), 1 / 8)))
    np.testing.assert_allclose(mixed, 0, atol=1e-5)
    values = np.array([1.0, 0.5, 0.25])
    curve = np.asarray(von_neumann_entropy(jnp.diag(jnp.asarray(values)), t_max=3))
    for t in (1, 2, 3):
        share = values**t / (values**t).sum()
        np.testing.assert_allclose(curve[t - 1], -(share * np.log(share)).sum(), rtol=1e-5)


def test_the_knee_is_phates():
    # phate's own documentation: exp(-x / 10) on 20 points has it at 8
    assert knee_point(jnp.exp(-jnp.arange(20) / 10)) == 8
    bent = jnp.concatenate([10.0 - jnp.arange(30.0), -19.0 - 0.01 * jnp.arange(70.0)])
    assert abs(int(knee_point(bent)) - 30) <= 1


def test_no_landmark_is_empty(cells):
    labels = landmark_labels(sparse_kernel(cells, 5, 40.0), 30)
    assert set(labels) == set(range(labels.max() + 1))
    assert 20 <= labels.max() + 1 <= 30
    twice = jnp.asarray(np.repeat(cells[:20], 2, axis=0), jnp.float32)
    few = np.asarray(nearest_of_some(twice, 30, jax.random.key(0)))
    assert set(few) == set(range(30))


def test_distances_of_mixtures():
    rng = np.random.default_rng(1)
    u, w = rng.normal(size=(6, 4)), rng.dirichlet(np.ones(6), size=5)
    w[0] = np.eye(6)[2]
    found = mixture_distances(jnp.asarray(w, jnp.float32), jnp.asarray(cdist(u, u), jnp.float32))
    np.testing.assert_allclose(found, cdist(w @ u, u), rtol=1e-4, atol=1e-6)
    assert found[0, 2] == 0


def test_interpolation_meets_nodes_and_planes():
    rng = np.random.default_rng(2)
    nodes = jnp.asarray(rng.normal(size=(60, 2)), jnp.float32)
    plane = nodes @ jnp.array([[1.0, 0.0], [2.0, -1.0]])
    slopes = local_slopes(nodes, plane, 10)
    at_nodes = shepard_weights(nodes, nodes, 8)
    np.testing.assert_allclose(interpolate(nodes, nodes, plane, slopes, *at_nodes), plane, atol=1e-5)
    np.testing.assert_allclose(at_nodes[1].sum(axis=1), 1, rtol=1e-6)
    new = jnp.asarray(rng.normal(size=(40, 2)) / 2, jnp.float32)
    found = interpolate(new, nodes, plane, slopes, *shepard_weights(new, nodes, 8))
    off = np.asarray(found - new @ jnp.array([[1.0, 0.0], [2.0, -1.0]]))
    assert np.sqrt((off**2).mean()) < 0.15 * np.asarray(plane).std()


def test_weights_are_continuous_where_neighbours_change():
    nodes = jnp.linspace(0, 1, 11)[:, None]
    values, slopes = nodes**2, jnp.zeros((11, 1, 1))
    x = jnp.linspace(0.2, 0.8, 2001)[:, None]
    y = np.asarray(interpolate(x, nodes, values, slopes, *shepard_weights(x, nodes, 4)))[:, 0]
    assert np.abs(np.diff(y)).max() < 5 * 0.6 / 2000 * 2
