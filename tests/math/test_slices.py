"""Costs between slices, and rigid motions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.spatial.distance import cdist
from scipy.stats import entropy

from diffbio.math.slices import (
    distances_within,
    euclidean_dissimilarity,
    inverse_motion,
    kl_dissimilarity,
    moved,
    nearest_rotation,
    rigid_motion,
    scaled_distances,
)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def test_dissimilarities_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.poisson(3.0, (4, 5)) + 1.0, rng.poisson(3.0, (3, 5)) + 1.0
    expected = [[entropy(a + 0.5, b + 0.5) for b in y] for a in x]
    np.testing.assert_allclose(kl_dissimilarity(jnp.asarray(x), jnp.asarray(y), 0.5), expected, rtol=1e-10)
    logs = [np.log1p(1e4 * v / v.sum(axis=1, keepdims=True)) for v in (x, y)]
    np.testing.assert_allclose(euclidean_dissimilarity(jnp.asarray(x), jnp.asarray(y)), cdist(*logs), rtol=1e-10)


def test_units_of_distance():
    grid = jnp.stack(jnp.meshgrid(jnp.arange(4.0), jnp.arange(3.0)), -1).reshape(-1, 2)
    left, right = distances_within(2 * grid), distances_within(4 * grid + 100)
    np.testing.assert_allclose(left, cdist(2 * grid, 2 * grid), rtol=1e-12)
    for scaling, most in (("none", (2, 4)), ("spacing", (2 / 3, 4 / 3))):
        scaled = scaled_distances(left, right, scaling)
        np.testing.assert_allclose([v.max() for v in scaled], np.array(most) * np.hypot(3, 2), rtol=1e-12)
    np.testing.assert_allclose([v.max() for v in scaled_distances(left, right, "max")], 1.0)


@pytest.mark.parametrize("dims", [2, 3])
def test_motion_is_found_and_undone(dims):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(9, dims)))
    turn = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))
    plan = jnp.eye(9) / 9
    y = (x - 3.0) @ turn
    motion = rigid_motion(x, y, plan)
    np.testing.assert_allclose(motion.rotation, turn, atol=1e-10)
    np.testing.assert_allclose(moved(y, motion), x, atol=1e-10)
    np.testing.assert_allclose(moved(x, inverse_motion(motion)), y, atol=1e-10)
    mirror = y.at[:, 0].multiply(-1.0)
    np.testing.assert_allclose(moved(mirror, rigid_motion(x, mirror, plan, reflection=True)), x, atol=1e-10)
    assert np.linalg.det(rigid_motion(x, mirror, plan).rotation) == pytest.approx(1)


@pytest.mark.parametrize("cross", [np.eye(2), np.diag([1.0, -0.3]), np.random.default_rng(0).normal(size=(3, 3))])
def test_derivative_of_the_rotation_also_where_singular_values_are_equal(cross):
    check_grads(jax.jit(nearest_rotation), (jnp.asarray(cross),), order=1, modes=["fwd", "rev"], rtol=1e-5)


def test_no_rotation_no_gradient():
    gradient = jax.jacobian(nearest_rotation)(jnp.zeros((2, 2)))
    assert not np.asarray(gradient).any()
