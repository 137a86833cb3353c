"""Distances: against numpy, far from the origin, and their gradients at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffbio.math.distances import safe_norm, squared_euclidean, unit_rows


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equals_the_sum_of_squared_differences(rows, offset):
    x, y = rows
    x, y = x + np.float32(offset), y + np.float32(offset)
    wanted = ((x[:, None].astype(float) - y[None].astype(float)) ** 2).sum(-1)
    # at 1000 a plain expansion in float32 is off by 0.1 or more: the rows are first centred
    got = squared_euclidean(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_three_four_five_and_zero_diagonal(rows):
    d = squared_euclidean(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]]))
    assert d.item() == pytest.approx(25)
    x = jnp.asarray(rows[0])
    d = squared_euclidean(x, x)
    np.testing.assert_allclose(d, d.T, atol=1e-5)
    np.testing.assert_allclose(jnp.diag(d), 0, atol=1e-5)


def test_gradients_equal_finite_differences(rows):
    with jax.enable_x64(True):
        x, y = (jnp.asarray(r, jnp.float64) for r in rows)
        for f, args in ((squared_euclidean, (x, y)), (unit_rows, (x,)), (safe_norm, (x,))):
            # check_grads hands numpy arrays to the function
            check_grads(lambda *a, f=f: f(*map(jnp.asarray, a)), args, order=1, modes=["rev"], rtol=1e-6)


def test_unit_rows_have_length_one_and_a_zero_row_has_gradient_zero(rows):
    x = jnp.asarray(rows[0]).at[2].set(0)
    u = unit_rows(x)
    np.testing.assert_allclose((u * u).sum(1), [1, 1, 0, 1, 1, 1, 1], rtol=1e-6)
    weights = jnp.asarray(rows[0])
    assert not jax.grad(lambda v: (weights * unit_rows(v)).sum())(x)[2].any()
    assert not jax.grad(lambda v: safe_norm(v).sum())(x)[2].any()
