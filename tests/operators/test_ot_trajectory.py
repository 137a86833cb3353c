"""What the operator adds to the transport: interpolation, growth, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.operators.singlecell import DifferentiableOTTrajectory, OTTrajectoryConfig
from diffbio.operators.singlecell.ot_trajectory import check_converged


def make(**settings):
    return DifferentiableOTTrajectory(OTTrajectoryConfig(n_genes=6, n_components=4, **settings), rngs=nnx.Rngs(0))


def two_days(n=12, m=18, seed=0):
    """Two kinds of cells on two days; of the later cells two thirds are of the first kind."""
    rng = np.random.default_rng(seed)
    means = np.array([[90, 5, 5, 40, 40, 40], [5, 5, 90, 40, 40, 40]])
    early, late = np.arange(n) % 2, (np.arange(m) % 3 == 0).astype(int)
    data = {"counts_t1": rng.poisson(means[early]), "counts_t2": rng.poisson(means[late])}
    return {key: jnp.asarray(value, jnp.float32) for key, value in data.items()}, early, late


def applied(op, data):
    return {k: np.asarray(v) for k, v in op.apply(data, {}, None)[0].items()}


def test_kinds_go_to_their_kind_and_grow_as_they_do():
    data, early, late = two_days()
    found = applied(make(unit_variance=False), data)  # the four genes of noise count for less
    stays = found["transport_plan"][early[:, None] == late].sum() / found["transport_plan"].sum()
    assert stays > 0.9
    rates = [found["growth_rates"][early == k].mean() for k in (0, 1)]
    assert rates[0] / rates[1] == pytest.approx(2.0, rel=0.2)  # 6 become 12, 6 stay 6
    np.testing.assert_allclose(12 * found["transport_plan"].sum(axis=1), found["growth_rates"], rtol=1e-4)


def test_interpolation_starts_at_the_cells_and_ends_at_their_descendants():
    data, *_ = two_days()
    start, middle, end = (applied(make(interpolation_time=t), data) for t in (0.0, 0.25, 1.0))
    np.testing.assert_array_equal(start["interpolated_counts"], data["counts_t1"])
    plan = end["transport_plan"] / end["transport_plan"].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(end["interpolated_counts"], plan @ np.asarray(data["counts_t2"]), rtol=1e-4)
    between = 0.75 * start["interpolated_counts"] + 0.25 * end["interpolated_counts"]
    np.testing.assert_allclose(middle["interpolated_counts"], between, rtol=1e-4)


def test_small_epsilon_is_the_assignment():
    """Without entropy and with marginals held the plan is the cheapest pairing: here each cell and its later self."""
    rng = np.random.default_rng(0)
    early, order = rng.normal(size=(10, 6)), rng.permutation(10)
    data = {"counts_t1": early, "counts_t2": early[order] + 0.05 * rng.normal(size=(10, 6)) + 1.0}
    strict = {"lambda1": float("inf"), "lambda2": float("inf"), "growth_iterations": 1, "transform": "none"}
    with jax.enable_x64(True):
        op = make(sinkhorn_epsilon=0.02, unit_variance=False, **strict)
        plan = applied(op, {key: jnp.asarray(value) for key, value in data.items()})["transport_plan"]
    paired = np.zeros((10, 10))
    paired[order, np.arange(10)] = 0.1
    np.testing.assert_allclose(plan, paired, atol=0.01)


def test_prior_growth_counts_and_wins_when_held():
    data, early, _ = two_days()
    prior = np.where(early == 0, 0.5, 2.0).astype(np.float32)
    free = applied(make(), data)["growth_rates"]
    held = applied(make(lambda1=float("inf")), data | {"growth_rates": prior})["growth_rates"]
    np.testing.assert_allclose(held, prior, rtol=1e-3)
    assert abs(np.log(free[early == 0].mean() / free[early == 1].mean()) - np.log(0.25)) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"growth_rates": jnp.full(12, -1.0)}, "growth_rates.*>= 0, but row 0 holds -1"),
        ({"growth_rates": jnp.ones(12).at[3].set(0.0)}, "growth_rates.*above 0, but row 3 holds 0"),
        ({"counts_t1": jnp.zeros((0, 6))}, "counts_t1.*has no cells"),
        ({"counts_t2": jnp.zeros((0, 6))}, "counts_t2.*has no cells"),
        ({"counts_t2": -jnp.ones((4, 6))}, "counts_t2.*row 0, column 0 holds -1"),
        ({"counts_t1": jnp.zeros((6000, 6)), "counts_t2": jnp.zeros((5000, 6))}, "6000 x 5000 cells is too large"),
    ],
)
def test_bad_data_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        make().apply(two_days()[0] | change, {}, None)


@pytest.mark.parametrize("bad", [{"sinkhorn_epsilon": 0.0}, {"lambda1": -1.0}, {"interpolation_time": 1.5}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        make(**bad)


def test_a_plan_that_does_not_converge_says_so():
    with pytest.warns(DataWarning, match="did not converge, 3.0e-02 of its mass"):
        check_converged("Someone", jnp.asarray(0.03, jnp.float32))
    with pytest.warns(DataWarning, match="did not converge, nan"):
        check_converged("Someone", jnp.asarray(np.nan, jnp.float32))
