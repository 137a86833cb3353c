"""Splicing kinetics against an ODE solver; planted rates and times come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import spearmanr

from diffbio.math.shared_time import fit, problem
from diffbio.math.splicing_kinetics import Kinetics, advanced, curve, step_response


def gene(level, beta, ratio, on, span, scale=1.0):
    logs = {"log_level": level, "log_beta": beta, "log_ratio": ratio, "log_span": span, "log_scale": scale}
    return Kinetics(on=jnp.asarray(on, float), **{k: jnp.log(jnp.asarray(v, float)) for k, v in logs.items()})


@pytest.mark.parametrize("ratio", [0.3, 1.0, 1.0 + 1e-6, 2.5])
def test_curve_solves_the_equations(ratio):
    level, beta, on, span = 4.0, 3.0, 0.1, 0.5
    times = np.linspace(0, 2, 30)

    def change(t, state):
        u, s = state
        return [level * beta * (on <= t < on + span) - beta * u, beta * u - ratio * beta * s]

    wanted = solve_ivp(change, (0, 2), [0, 0], t_eval=times, rtol=1e-9, atol=1e-10, max_step=0.01).y
    with jax.enable_x64(True):
        u, s = curve(gene(level, beta, ratio, on, span, scale=0.5), jnp.asarray(times), width=0.0)
        smooth = curve(gene(level, beta, ratio, on, span), jnp.asarray(times), width=1e-4)
    np.testing.assert_allclose(u, 0.5 * wanted[0], atol=2e-3)  # the solver steps over the switches
    np.testing.assert_allclose(s, wanted[1], atol=2e-3)
    np.testing.assert_allclose(smooth[1], s, atol=1e-3)


def test_step_response_is_exact_where_nothing_is_degraded():
    x = jnp.linspace(0.0, 3.0, 7)
    u, s = step_response(x, jnp.float32(0.0))
    np.testing.assert_allclose(u + s, x, rtol=1e-5, atol=1e-6)  # all that was transcribed is still there


def test_advanced_follows_the_curve_and_keeps_a_steady_state():
    with jax.enable_x64(True):
        found = gene(4.0, 3.0, 0.7, 0.0, 9.0)
        u, s = curve(found, jnp.asarray([0.2, 0.5]), width=0.0)
        rates = {"alpha": jnp.float64(12.0), "beta": jnp.float64(3.0), "gamma": jnp.float64(2.1)}
        later = advanced(u[:1], s[:1], **{k: v[None] for k, v in rates.items()}, time=0.3)
        np.testing.assert_allclose(later[0][0], u[1], rtol=1e-10)
        np.testing.assert_allclose(later[1][0], s[1], rtol=1e-10)
        rest = (jnp.asarray([4.0]), jnp.asarray([12.0 / 2.1]))
        again = advanced(*rest, **{k: v[None] for k, v in rates.items()}, time=5.0)
        np.testing.assert_allclose(np.ravel(again), np.ravel(rest), rtol=1e-12)


@pytest.fixture(scope="module")
def planted():
    """120 cells, 8 genes that switch at different times, little noise; and the fit to them."""
    rng = np.random.default_rng(0)
    n, g = 120, 8
    time = np.sort(rng.uniform(0, 1, n))
    ratio, beta = rng.uniform(0.5, 2, g), rng.uniform(4, 10, g)
    on, span = rng.uniform(-0.1, 0.3, g), rng.uniform(0.25, 0.5, g)
    genes = gene(rng.uniform(2, 6, g), beta, ratio, on, span)
    u, s = jax.vmap(lambda t: curve(genes, t, width=0.0))(jnp.asarray(time, jnp.float32))
    u, s = (np.maximum(x + 0.02 * np.asarray(x).std(axis=0) * rng.normal(size=x.shape), 0) for x in (u, s))
    data = problem(jnp.asarray(u, jnp.float32), jnp.asarray(s, jnp.float32), jnp.ones(g))
    start = np.argsort(np.argsort(time + 0.1 * rng.normal(size=n))) / n
    found = fit(jnp.asarray(start, jnp.float32), data, width=0.02, scale_spread=0.1, rounds=12)
    return found, time, ratio, beta


def test_planted_rates_and_times_come_back(planted):
    found, time, ratio, beta = planted
    assert np.median(np.abs(np.exp(found.genes.log_ratio) / ratio - 1)) < 0.05
    assert spearmanr(found.time, time).statistic > 0.995
    size = np.ptp(np.asarray(found.time)) / np.ptp(time)  # the unit of time is free
    assert np.median(np.abs(np.exp(found.genes.log_beta) * size / beta - 1)) < 0.12


def test_a_gene_without_counts_stays_finite(planted):
    n = len(planted[1])
    rng = np.random.default_rng(1)
    u, s = (jnp.asarray(rng.uniform(0, 1, (n, 8)), jnp.float32).at[:, 0].set(0.0) for _ in range(2))
    data = problem(u, s, jnp.zeros(8))
    found = fit(jnp.arange(n, dtype=jnp.float32) / n, data, width=0.02, scale_spread=0.1, rounds=12)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(found))
