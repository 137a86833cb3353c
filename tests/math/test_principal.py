"""Principal components on the device: against scikit-learn, finite differences and equal eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from sklearn.decomposition import PCA

from diffbio.errors import ConfigError
from diffbio.math.principal import bounded_eigh, principal_components


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (9000, 6)], ids=["tall", "wide", "blocks"])
def test_equals_scikit_learn(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours, theirs = jax.jit(lambda x: principal_components(x, 5))(x), PCA(5, svd_solver="full").fit(x)
    np.testing.assert_allclose(np.abs(ours.components @ theirs.components_.T), np.eye(5), atol=2e-3)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(np.abs(ours.scores), np.abs(theirs.transform(x)), atol=1e-2)
    assert (jnp.take_along_axis(ours.components, jnp.abs(ours.components).argmax(1)[:, None], 1) > 0).all()


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)], ids=["tall", "wide"])
def test_gradient_equals_finite_differences(shape):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
        check_grads(lambda x: principal_components(jnp.asarray(x), 3), (x,), order=1, modes=["rev"], rtol=1e-5)


def test_gradient_is_bounded_where_eigenvalues_meet():
    """Away from ties it is that of eigh; through a closing gap it stays below a bound, and is 0 at the tie."""

    def total(gap):
        matrix = jnp.diag(jnp.array([1.0, 1.0 + gap, 3.0])) + 0 * gap
        return jax.grad(lambda m: (bounded_eigh(m)[1] * jnp.arange(9.0).reshape(3, 3)).sum())(matrix)

    gaps = [0.5, 1e-3, 1e-6, 1e-7, 0.0]
    assert all(jnp.isfinite(total(gap)).all() and jnp.abs(total(gap)).max() < 1e7 for gap in gaps)
    matrix = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    weights = jnp.arange(9.0).reshape(3, 3)
    ours = jax.grad(lambda m: (bounded_eigh(m)[1] * weights).sum())(matrix)
    exact = jax.grad(lambda m: (jnp.linalg.eigh(m)[1] * weights).sum())(matrix)
    np.testing.assert_allclose(ours + ours.T, exact + exact.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_constant_data_is_finite(shape):
    def total(x):
        found = principal_components(x, 3)
        return found.scores.sum() + found.variance.sum()

    value, grad = jax.value_and_grad(total)(jnp.ones(shape))
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_too_many_components_are_refused():
    with pytest.raises(ConfigError, match="from 1 to 5"):
        principal_components(jnp.ones((5, 7)), 6)
