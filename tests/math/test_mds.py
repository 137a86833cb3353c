import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffbio.math.linalg import pca
from diffbio.math.mds import classic_mds, sgd_mds, smacof, stress


def distances_of(x):
    return jnp.asarray(np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)))


@pytest.fixture
def cloud():
    return np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32) * [3, 2, 1, 0.5, 0.2]


def test_classic_scaling_of_euclidean_distances_is_pca(cloud):
    found = classic_mds(distances_of(cloud), 3)
    scores = pca(cloud, 3).scores
    np.testing.assert_allclose(np.abs(found), np.abs(scores), atol=1e-4)
    assert (np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], 0) > 0).all()


def test_components_without_variance_are_zero():
    line = np.arange(5.0)[:, None] * np.ones((1, 2))
    found = np.asarray(classic_mds(distances_of(line), 4))
    np.testing.assert_allclose(np.abs(found[:, 0]), np.sqrt(2) * np.abs(np.arange(5.0) - 2), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1:], 0, atol=5e-3)  # roots of float32 rounding
    assert classic_mds(distances_of(line[:2]), 3).shape == (2, 3)


@pytest.mark.parametrize("solve", [lambda d, y: smacof(d, y, n_steps=60), lambda d, y: sgd_mds(d, y, n_passes=30)])
def test_distances_of_a_plane_are_met(solve):
    plane = np.random.default_rng(1).normal(size=(25, 2))
    wrong = plane * [1.0, 0.5] + 0.3 * np.random.default_rng(2).normal(size=(25, 2))
    d = distances_of(plane)
    assert stress(d, jnp.asarray(wrong)) > 0.2
    assert stress(d, solve(d, jnp.asarray(wrong))) < 2e-3


def test_stress_never_rises_and_both_ways_meet(cloud):
    d = distances_of(cloud)
    start = classic_mds(d, 2)
    falling = [float(stress(d, smacof(d, start, n_steps=n))) for n in (0, 1, 3, 32)]
    assert (np.diff(falling) <= 1e-6).all()
    assert float(stress(d, sgd_mds(d, start, n_passes=15))) == pytest.approx(
        falling[-1], rel=5e-3
    )  # its last steps are not 0


def test_scikit_learn_finds_no_better(cloud):
    from sklearn.manifold import smacof as peer

    d = distances_of(cloud)
    ours = smacof(d, classic_mds(d, 2), n_steps=100)
    theirs, _ = peer(np.asarray(d), init=np.asarray(classic_mds(d, 2)), n_init=1, max_iter=1000, eps=1e-9)
    assert float(stress(d, ours)) <= float(stress(d, jnp.asarray(theirs))) * (1 + 1e-4)


@pytest.mark.parametrize("solve", [smacof, sgd_mds], ids=["smacof", "sgd"])
def test_gradients_equal_finite_differences(cloud, solve):
    with jax.enable_x64(True):
        x = jnp.asarray(cloud[:9], jnp.float64)

        def outcome(x):
            gap = x[:, None] - x[None]
            d = jnp.sqrt((gap**2).sum(-1) + jnp.eye(9)) - jnp.eye(9)
            return solve(d, classic_mds(d, 2))

        check_grads(jax.jit(outcome), (x,), order=1, modes=["rev"], rtol=1e-5, eps=1e-6)


def test_points_at_one_place_stay_finite():
    zero = jnp.zeros((4, 4))
    for solve in (smacof, sgd_mds):
        value, grad = jax.value_and_grad(lambda d, solve=solve: solve(d, classic_mds(d, 2)).sum())(zero)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()
