"""Unbalanced transport: POT's plans, its limits, growth, and its gradient."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffbio.math.ot import coupling, local_components, median_cost

INF = float("inf")


@pytest.fixture(scope="module")
def pot():
    """Of POT 0.9.7 at epsilon 0.05, reference measure 1 / (n m): even masses, given growth, marginals held."""
    with np.load(Path(__file__).parents[1] / "oracles" / "pot_plans.npz") as stored:
        return dict(stored)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def solved(x, y, growth=None, *, lambda1=1.0, lambda2=50.0, growth_iterations=1):
    growth = jnp.ones(len(x)) if growth is None else jnp.asarray(growth)
    cost = median_cost(jnp.asarray(x), jnp.asarray(y))
    return coupling(cost, growth, epsilon=0.05, lambda1=lambda1, lambda2=lambda2, growth_iterations=growth_iterations)


@pytest.mark.parametrize(("name", "grown", "strengths"), [("even", 0, {}), ("grown", 1, {}), ("held", 0, (INF, INF))])
def test_plan_is_that_of_pot(pot, name, grown, strengths):
    strengths = dict(zip(("lambda1", "lambda2"), strengths, strict=True)) if strengths else {}
    found = solved(pot["x"], pot["y"], pot["growth"] if grown else None, **strengths)
    np.testing.assert_allclose(found.plan, pot[name], atol=1e-12)
    assert found.error < 1e-12
    np.testing.assert_allclose(found.growth, 20 * found.plan.sum(axis=1), rtol=1e-12)


def test_strong_marginals_are_kept_and_held_ones_are_their_limit(pot):
    held = solved(pot["x"], pot["y"], pot["growth"], lambda1=INF, lambda2=INF)
    np.testing.assert_allclose(held.growth, pot["growth"], rtol=1e-10)
    np.testing.assert_allclose(held.plan.sum(axis=0), pot["growth"].mean() / 25, rtol=1e-10)
    strong = solved(pot["x"], pot["y"], pot["growth"], lambda1=1e5, lambda2=1e5)
    np.testing.assert_allclose(strong.plan, held.plan, atol=1e-6)


def test_refined_growth_finds_what_was_planted():
    rng = np.random.default_rng(1)
    x = np.repeat([[0.0, 0], [6, 0]], 10, axis=0) + rng.normal(size=(20, 2))
    y = np.concatenate([np.tile([0.0, 1], (20, 1)), np.tile([6.0, 1], (5, 1))]) + rng.normal(size=(25, 2))
    mean = [solved(x, y, growth_iterations=k).growth.reshape(2, 10).mean(axis=1) for k in (1, 3)]
    ratio = [float(a / b) for a, b in mean]
    assert 2.5 < ratio[0] < 3.5
    assert ratio[1] == pytest.approx(4.0, rel=0.05)  # 20 of 25 descend from 10 of 20


def test_cells_that_are_all_alike_spread_evenly():
    found = solved(np.ones((20, 4)), np.ones((25, 4)))
    np.testing.assert_allclose(found.plan, 1 / 500, rtol=1e-10)
    np.testing.assert_allclose(found.growth, 1.0, rtol=1e-10)


def test_more_growth_everywhere_is_the_same_plan_with_more_mass(pot):
    once, twice = (solved(pot["x"], pot["y"], k * pot["growth"]) for k in (1, 2))
    # the reference measure of the entropy stays, and holds the mass back a little
    np.testing.assert_allclose(twice.plan, 2 ** (51 / 51.05) * once.plan, rtol=1e-9)


@pytest.mark.parametrize("lambda2", [50.0, INF])
def test_gradient_of_the_plan(pot, lambda2):
    y, growth = jnp.asarray(pot["y"]), jnp.asarray(pot["growth"])
    lambda1 = 1.0 if lambda2 == 50.0 else INF

    def outputs(x, growth):
        found = solved(x, y, growth, lambda1=lambda1, lambda2=lambda2, growth_iterations=2)
        return 20 * found.plan, found.growth

    check_grads(
        jax.jit(outputs), (jnp.asarray(pot["x"]), growth), order=1, modes=["rev"], rtol=1e-5, atol=1e-7, eps=1e-6
    )


def test_single_precision_converges(pot):
    with jax.enable_x64(False):
        found = solved(*(pot[key].astype(np.float32) for key in ("x", "y")))
    assert found.plan.dtype == jnp.float32
    assert found.error < 1e-5
    np.testing.assert_allclose(20 * found.plan, 20 * pot["even"], atol=1e-5)


def test_components_of_unit_variance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(8, 3))
    y[0, 2] = 0.5
    stretched = [jnp.asarray(v * np.array([1.0, 100.0, 1.0])) for v in (x, y)]
    plain = local_components(jnp.asarray(x), jnp.asarray(y), 3, unit_variance=True)
    for a, b in zip(plain, local_components(*stretched, 3, unit_variance=True), strict=True):
        np.testing.assert_allclose(jnp.abs(a), jnp.abs(b), atol=1e-8)  # signs may turn
    assert local_components(jnp.asarray(x), jnp.asarray(y), 30, unit_variance=False)[1].shape == (8, 3)
    flat = local_components(jnp.ones((6, 3)), jnp.ones((8, 3)), 2, unit_variance=True)
    assert not np.asarray(flat[0]).any()
