import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import median_abs_deviation, norm, rankdata

from diffbio.math.soft import (
    hard_rank,
    log_gate,
    median_and_mad,
    soft_rank,
    soft_top_k,
    stochastic_gate,
    straight_through,
    top_k_mask,
)


@pytest.fixture
def scores():
    return jnp.asarray(np.random.default_rng(0).normal(size=40), jnp.float32)


@pytest.mark.parametrize("temperature", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("k", [1, 7, 39])
def test_gates_sum_to_k_and_lie_between_0_and_1(scores, k, temperature):
    gates = soft_top_k(scores, k, temperature)
    np.testing.assert_allclose(gates.sum(), k, rtol=1e-3)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert (jnp.diff(gates[jnp.argsort(scores)]) >= 0).all()


def test_a_sharp_gate_is_the_top_k(scores):
    np.testing.assert_allclose(soft_top_k(scores, 7, 1e-4), top_k_mask(scores, 7), atol=1e-3)
    assert top_k_mask(scores, 7).sum() == 7


def test_all_items_and_equal_items():
    assert (soft_top_k(jnp.arange(4.0), 4, 0.1) == 1).all()
    np.testing.assert_allclose(soft_top_k(jnp.ones(10), 3, 1e-3), 0.3, atol=1e-5)
    assert top_k_mask(jnp.ones(10), 3).tolist() == [1, 1, 1] + [0] * 7


def test_the_gradient_is_that_of_a_sum_held_at_k(scores):
    jacobian = jax.jacrev(lambda s: soft_top_k(s, 7, 0.3))(scores)
    np.testing.assert_allclose(jacobian.sum(axis=0), 0, atol=1e-5)  # the sum of gates stays k
    np.testing.assert_allclose(jacobian.sum(axis=1), 0, atol=1e-5)  # a shift of all scores changes nothing
    assert (jnp.diagonal(jacobian) > 0).all()


def test_straight_through_has_the_hard_value_and_the_soft_gradient(scores):
    def value(s):
        return straight_through(top_k_mask(s, 7), soft_top_k(s, 7, 0.3))

    np.testing.assert_array_equal(value(scores), top_k_mask(scores, 7))
    weight = jnp.arange(40.0)
    hard = jax.grad(lambda s: (weight * value(s)).sum())(scores)
    soft = jax.grad(lambda s: (weight * soft_top_k(s, 7, 0.3)).sum())(scores)
    np.testing.assert_allclose(hard, soft, rtol=1e-5, atol=1e-6)


def test_soft_ranks_equal_their_definition_and_become_ranks(scores):
    width = 0.4
    pairs = jnp.clip(0.5 + (scores[None] - scores[:, None]) / (2 * width), 0, 1)
    np.testing.assert_allclose(soft_rank(scores, width), pairs.sum(axis=1) - 0.5, atol=1e-4)
    np.testing.assert_allclose(soft_rank(scores, 1e-5), rankdata(-scores) - 1, atol=1e-2)
    tied = jnp.array([2.0, 1.0, 2.0, 0.0])
    np.testing.assert_allclose(soft_rank(tied, 1e-3), rankdata(-tied) - 1, atol=1e-3)
    assert hard_rank(tied).tolist() == [0, 2, 1, 3]


def test_a_gate_far_below_its_location_keeps_a_gradient():
    assert jax.grad(lambda x: log_gate(x, jnp.asarray(0.0), jnp.asarray(2.0)))(-1e3) == 2.0
    assert log_gate(jnp.asarray(1e3), jnp.asarray(0.0), jnp.asarray(2.0)) == 0.0


def test_median_and_spread_equal_scipys(scores):
    median, mad = median_and_mad(scores)
    np.testing.assert_allclose([median, mad], [np.median(scores), median_abs_deviation(scores)], rtol=1e-6)


def test_stochastic_gates_are_open_as_often_as_they_say():
    mu = jnp.array([-0.7, 0.0, 0.5, 2.0])
    gates, is_open = stochastic_gate(mu, 0.5)
    np.testing.assert_array_equal(gates, [0.0, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(is_open, norm.cdf(np.asarray(mu) / 0.5), rtol=1e-5)
    noisy, _ = stochastic_gate(jnp.repeat(mu[:, None], 20_000, axis=1).ravel(), 0.5, jax.random.key(0))
    np.testing.assert_allclose((noisy.reshape(4, -1) > 0).mean(axis=1), is_open, atol=0.01)
