"""Diffusion over a graph, beside dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.spatial import procrustes

from diffbio.math import diffusion
from diffbio.math.neighbors import knn

diffuse = jax.jit(diffusion.diffuse)


def small(n=30, width=3, k=6, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, width)).astype(np.float32)
    return jnp.asarray(points), jnp.asarray(knn(points, k).indices), jnp.asarray(rng.random((n, 7)), jnp.float32)


def operator_of(points, indices, **kernel):
    distances = diffusion.neighbor_distances(points, indices)
    return diffusion.markov(indices, diffusion.adaptive_affinity(distances, 4, **kernel))


def dense(operator):
    n, k = operator.indices.shape
    w = np.zeros((n, n))
    w[np.repeat(np.arange(n), k), np.asarray(operator.indices).ravel()] = np.asarray(operator.weights).ravel()
    symmetric = np.eye(n) + (w + w.T) / 2
    return symmetric / symmetric.sum(1, keepdims=True)


def test_whole_powers_are_powers_and_zero_is_the_identity():
    points, indices, x = small()
    operator = operator_of(points, indices, bandwidth=1.3, decay=1.7)
    p = dense(operator)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(diffuse(operator, x, jnp.asarray(0.0)), x)
    for t in (1, 2, 5, 20):
        wanted = np.linalg.matrix_power(p, t) @ np.asarray(x)
        np.testing.assert_allclose(diffuse(operator, x, jnp.asarray(float(t))), wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(diffusion.step(operator, x), p @ np.asarray(x), rtol=1e-5)


def test_blocks_of_genes_equal_all_at_once(monkeypatch):
    points, indices, x = small()
    operator = operator_of(points, indices)

    def loss(x, operator, t):
        return (diffusion.diffuse(operator, x, t) ** 2).sum()

    t = jnp.asarray(2.4)
    whole = jax.jit(jax.value_and_grad(loss, (0, 2)))(x, operator, t)
    monkeypatch.setattr(diffusion, "ENTRIES_PER_BLOCK", 3 * len(x))  # 7 genes: the last block overlaps the second
    parts = jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 2)))(x, operator, t)  # another program
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole, parts)


def test_powers_in_between_are_smooth_and_sum_to_one():
    t = jnp.linspace(0, 20, 401)
    weights = jax.vmap(lambda t: diffusion.power_weights(t, 22))(t)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert weights.min() > -0.08
    whole = jax.vmap(lambda t: diffusion.power_weights(t, 22))(jnp.arange(21.0))
    np.testing.assert_array_equal(whole, jnp.eye(22)[:21])
    slope = jax.vmap(jax.jacfwd(lambda t: diffusion.power_weights(t, 22)))
    below, above = slope(jnp.arange(1, 20) - 1e-3), slope(jnp.arange(1, 20) + 1e-3)
    np.testing.assert_allclose(below, above, atol=0.02)  # no kink
    # of a decaying mode, between its whole powers
    mode = 0.7 ** jnp.arange(22)
    np.testing.assert_allclose(weights @ mode, 0.7**t, atol=1e-2)


def test_gradients_equal_finite_differences():
    points, indices, x = small(14, 3, 6)
    with jax.enable_x64(True):
        points, x = points.astype(jnp.float64), x.astype(jnp.float64)

        def out(points, x, t, bandwidth, decay):
            operator = operator_of(points, indices, bandwidth=bandwidth, decay=decay)
            return diffusion.diffuse(operator, x, t) ** 2

        run = jax.jit(out)
        for t in (0.5, 2.0, 3.3):
            given = (points, x, jnp.asarray(t), jnp.asarray(1.2), jnp.asarray(1.5))
            check_grads(run, given, order=1, modes=["rev"], rtol=1e-5, atol=1e-6, eps=1e-6)


def test_both_ways_of_the_product_agree():
    _, indices, x = small()
    weights = jax.random.uniform(jax.random.key(0), indices.shape)
    one, other = diffusion._both_in_order(indices, weights, x), diffusion._both_at_once(indices, weights, x)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_kernel_at_its_limits():
    distances = jnp.asarray([[0.0, 0.0, 1.0], [1.0, 2.0, 4.0], [0.0, 3.0, 30.0]])

    def affinity(distances, **kernel):
        return diffusion.adaptive_affinity(distances, 2, **kernel)

    value = affinity(distances)
    np.testing.assert_allclose(value[0], [1, 1, 0])  # duplicates: no bandwidth
    np.testing.assert_allclose(value[1], np.exp([-0.5, -1, -2]), rtol=1e-6)
    np.testing.assert_allclose(value[2], [1, np.exp(-1), 0], rtol=1e-6)  # exp(-10) is no edge
    sharp = affinity(distances, bandwidth=1.5, decay=60.0)
    np.testing.assert_allclose(sharp[1], [1, 1, 0], atol=1e-3)  # a step at the bandwidth
    for argnum in (0, 1, 2):
        grad = jax.grad(lambda *a: affinity(a[0], bandwidth=a[1], decay=a[2]).sum(), argnum)(distances, 1.0, 1.0)
        assert jnp.isfinite(grad).all()


def test_parts_that_are_not_connected_do_not_mix():
    points, indices, _ = small(20)
    both = jnp.concatenate([indices, indices + 20])
    x = jnp.concatenate([jnp.zeros((20, 1)), jnp.ones((20, 1))])
    operator = operator_of(jnp.concatenate([points, points + 100]), both)
    np.testing.assert_allclose(diffuse(operator, x, jnp.asarray(20.0)), x, atol=1e-5)


def test_steps_keep_the_stationary_mean():
    points, indices, x = small()
    operator = operator_of(points, indices)
    share = operator.degree[:, None] / operator.degree.sum()
    far = diffuse(operator, x, jnp.asarray(7.7))
    np.testing.assert_allclose((share * far).sum(0), (share * x).sum(0), rtol=1e-5)
    assert (far.max(0) - far.min(0) < x.max(0) - x.min(0)).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_distances_are_those_of_the_search(metric):
    points = np.random.default_rng(0).normal(size=(25, 4)).astype(np.float32)
    found = knn(points, 5, metric=metric)
    np.testing.assert_allclose(
        diffusion.neighbor_distances(jnp.asarray(points), jnp.asarray(found.indices), metric=metric),
        found.distances, rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_disparity_is_that_of_scipy_and_blind_to_rotation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40, 6))
    found = diffusion.procrustes_disparity(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(found, procrustes(a, b)[2], rtol=1e-4)
    turned = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    moved = jnp.asarray(3 * a @ turned + 1, jnp.float32)
    np.testing.assert_allclose(diffusion.procrustes_disparity(jnp.asarray(a, jnp.float32), moved), 0, atol=1e-5)
    assert diffusion.procrustes_disparity(jnp.ones((4, 2)), jnp.ones((4, 2))) == 0


def test_a_cell_beside_near_duplicates_has_a_finite_gradient():
    """Its scale is so small that the power of far neighbours overflows: their weight is 0, and so is its gradient."""
    distances = jnp.array([[1e-16, 2e-16, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0]], jnp.float32)

    def summed(distances, log_decay):
        return (diffusion.adaptive_affinity(distances, 2, decay=jnp.exp(log_decay)) ** 2).sum()

    value, slopes = jax.value_and_grad(summed, argnums=(0, 1))(distances, jnp.log(jnp.float32(3.0)))
    assert np.isfinite(value)
    assert np.isfinite(slopes[0]).all()
    assert np.isfinite(slopes[1])
    np.testing.assert_array_equal(slopes[0][0, 2:], 0)
