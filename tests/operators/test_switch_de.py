"""switchDE: the planted switch, least squares by SciPy, lost values, p-values of cells without a course."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize, stats

from diffbio.errors import DataError
from diffbio.math.switch import at_nodes
from diffbio.operators.singlecell import DifferentiableSwitchDE, SwitchDEConfig

RNG = np.random.default_rng(1)
TIMES = np.sort(RNG.random(60))
PLANTED = [(2.0, 12.0, 0.4), (1.5, -9.0, 0.6), (3.0, 20.0, 0.3)]


def curve(t, mu0, k, t0):
    return 2 * mu0 / (1 + np.exp(-k * (t - t0)))


def run(counts, times, **settings):
    op = DifferentiableSwitchDE(SwitchDEConfig(n_genes=counts.shape[1], **settings), rngs=nnx.Rngs(0))
    data = {"counts": jnp.asarray(counts, jnp.float32), "pseudotime": jnp.asarray(times, jnp.float32)}
    return {key: np.asarray(value) for key, value in op.apply(data)[0].items()}


@pytest.fixture(scope="module")
def planted():
    counts = np.stack([curve(TIMES, *p) for p in PLANTED], axis=1) + 0.4 * RNG.normal(size=(60, 3))
    counts = np.column_stack([counts, np.full(60, 1.5)])
    return counts, run(counts, 10 + 5 * TIMES, n_permutations=0)


def test_least_squares_of_scipy(planted):
    counts, found = planted
    for g, start in enumerate(PLANTED):
        (mu0, k, t0), _ = optimize.curve_fit(curve, TIMES, counts[:, g], start)
        np.testing.assert_allclose(found["mu0"][g], mu0, rtol=1e-3)
        np.testing.assert_allclose(5 * found["switch_strengths"][g], k, rtol=2e-3)
        np.testing.assert_allclose(found["switch_times"][g], 10 + 5 * t0, rtol=1e-4)
        sigma = np.sqrt(((counts[:, g] - curve(TIMES, mu0, k, t0)) ** 2).mean())
        np.testing.assert_allclose(found["sigma"][g], sigma, rtol=1e-4)
        log_likelihood = stats.norm(curve(TIMES, mu0, k, t0), sigma).logpdf(counts[:, g]).sum()
        np.testing.assert_allclose(found["log_likelihood"][g], log_likelihood, atol=1e-3)
        constant = stats.norm(counts[:, g].mean(), counts[:, g].std()).logpdf(counts[:, g]).sum()
        np.testing.assert_allclose(found["null_log_likelihood"][g], constant, atol=1e-3)
        np.testing.assert_allclose(found["p_values"][g], np.exp(constant - log_likelihood), rtol=1e-2, atol=1e-30)
        np.testing.assert_allclose(found["predicted_expression"][:, g], curve(TIMES, mu0, k, t0), atol=2e-3)


def test_a_constant_gene_does_not_switch(planted):
    _, found = planted
    assert found["p_values"][3] == 1
    assert found["switch_strengths"][3] == 0
    np.testing.assert_allclose(found["predicted_expression"][:, 3], 1.5, rtol=1e-5)


def test_nodes_are_as_good_as_cells():
    times = RNG.random(4000)
    values = RNG.normal(size=(4000, 1))
    k, t0 = 60.0, 0.37

    def f(t):
        return 1 / (1 + np.exp(-k * (t - t0)))

    at = np.asarray(at_nodes(jnp.asarray(values, jnp.float32), jnp.asarray(times, jnp.float32), 512))[:, 0]
    np.testing.assert_allclose(at @ f(np.linspace(0, 1, 512)), (values[:, 0] * f(times)).sum(), atol=2e-3)


def test_lost_values_do_not_lower_the_curve():
    counts = np.maximum(np.stack([curve(TIMES, *p) for p in PLANTED], axis=1) + 0.3 * RNG.normal(size=(60, 3)), 0.05)
    lost = RNG.random(counts.shape) < np.exp(-0.15 * counts**2)
    seen = np.where(lost, 0.0, counts)
    plain, inflated = (run(seen, TIMES, n_permutations=0, zero_inflated=z) for z in (False, True))
    true = np.stack([curve(TIMES, *p) for p in PLANTED], axis=1)
    off = [np.sqrt(((x["predicted_expression"] - true) ** 2).mean()) for x in (plain, inflated)]
    assert off[1] < 0.7 * off[0]
    assert (np.abs(inflated["sigma"] - 0.3) < np.abs(plain["sigma"] - 0.3)).all()


def test_pvalues_are_uniform_without_a_course():
    counts = 0.3 + RNG.normal(size=(40, 200))
    found = run(counts, RNG.random(40), n_permutations=4)
    assert stats.kstest(found["p_values"], "uniform").pvalue > 0.05
    # the law of switchde's p-values is another where the mean is within the noise
    chi2 = np.exp(found["null_log_likelihood"] - found["log_likelihood"])
    assert stats.kstest(chi2, "uniform").pvalue < 0.01


def test_refusals():
    counts = np.ones((6, 2)) + RNG.random((6, 2))
    with pytest.raises(DataError, match="5 at least"):
        run(counts[:4], np.arange(4.0))
    with pytest.raises(DataError, match="every cell"):
        run(counts, np.ones(6))
    with pytest.raises(DataError, match="finite"):
        run(counts, np.array([0, 1, 2, np.nan, 4, 5]))
    with pytest.raises(DataError, match="zero_inflated=False"):
        run(-counts, np.arange(6.0), zero_inflated=True)
