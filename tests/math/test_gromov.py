"""Fused Gromov-Wasserstein: its objective, the conditions of a minimum, marginals, partial overlap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.math.conjugate import conjugate_gradients
from diffbio.math.gromov import FusedProblem, FusedSettings, fused_objective, fused_plan, fused_problem, linearised

N, M = 7, 6


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def costs(seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.random((N, 2)), rng.random((M, 2))
    left, right = (np.linalg.norm(v[:, None] - v, axis=-1) for v in (x, y))
    return (jnp.asarray(v) for v in (rng.random((N, M)), left, right))


def test_objective_is_the_sum_over_pairs_and_its_gradient():
    problem = FusedProblem(*costs())
    plan = np.random.default_rng(1).random((N, M))
    difference = np.asarray(problem.left)[:, None, :, None] - np.asarray(problem.right)[None, :, None, :]
    expected = (problem.linear * plan).sum() + np.einsum("ijkl,ij,kl->", difference**2, plan, plan)
    np.testing.assert_allclose(fused_objective(problem, jnp.asarray(plan)), expected, rtol=1e-12)
    gradient = jax.grad(lambda p: fused_objective(problem, p))(jnp.asarray(plan))
    np.testing.assert_allclose(linearised(problem, jnp.asarray(plan)), gradient, rtol=1e-10)


@pytest.mark.parametrize("overlap", [None, 0.6])
def test_plan_is_stationary_and_keeps_its_marginals(overlap):
    problem, scale = fused_problem(*costs(), 0.5)
    alike = jnp.full((N, M), 1 / (N * M))
    np.testing.assert_allclose(fused_objective(problem, alike), 1.0, rtol=1e-12)
    assert scale > 0
    found = fused_plan(problem, FusedSettings(0.2, 6, overlap))
    plan = np.asarray(found.plan)
    rows, columns = N * plan.sum(axis=1), M * plan.sum(axis=0)
    if overlap is None:
        np.testing.assert_allclose(np.concatenate([rows, columns]), 1, atol=1e-12)
    else:
        assert max(rows.max(), columns.max()) <= 1 + 1e-12
    np.testing.assert_allclose(plan.sum(), overlap or 1, rtol=1e-12)
    # what entropy and cost do not balance must be a sum of a part of the row and one of the column
    rest = np.asarray(linearised(problem, found.plan)) + 0.2 * np.log(plan)
    rest = rest - rest.mean(axis=1, keepdims=True) - rest.mean(axis=0) + rest.mean()
    np.testing.assert_allclose(rest, 0, atol=1e-9)
    assert found.error < 1e-12


def test_conjugate_gradients_end_where_rounding_does():
    matrix = np.diag([1.0, 2.0, 0.0])
    found = conjugate_gradients(lambda x: matrix @ x, jnp.array([1.0, 2.0, 1e-9]), tolerance=1e-12, most=50)
    np.testing.assert_allclose(found[:2], 1.0, rtol=1e-6)
    assert np.isfinite(found).all()
