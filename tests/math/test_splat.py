"""The laws of the Splat model and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffbio.math import splat
from diffbio.math.count_sampling import gamma_draws, poisson_draws


def uniforms(n, seed=0):
    return jax.random.uniform(jax.random.key(seed), (n,), minval=1e-6)


@pytest.mark.parametrize("shape", [0.2, 0.6, 30.0])
def test_gamma_quantiles_are_scipys(shape):
    u = uniforms(200)
    found = splat.log_gamma_quantiles(u, jnp.asarray(shape))
    np.testing.assert_allclose(found, np.log(stats.gamma(shape).ppf(u)), rtol=2e-4, atol=2e-4)


def test_gene_means_are_a_mixture_with_an_unbiased_gradient_of_every_parameter():
    """E[mean] = (1 - p) shape / rate + p median exp(loc + scale² / 2): its derivatives within 2 %, by 40,000 draws."""
    # evenly spaced uniforms: the sum over genes is an integral, without Monte Carlo noise
    u = (jnp.arange(40_000) + 0.5) / 40_000
    theta = {"shape": 2.0, "rate": 0.5, "out_prob": 0.2, "out_loc": 1.5, "out_scale": 0.2}

    def average(theta):
        return jnp.exp(splat.log_gene_means(u, log_median=log_median(theta), **theta)).mean()

    def log_median(theta):
        return splat.log_gamma_quantiles(jnp.array([0.5]), theta["shape"])[0]

    def analytic(theta):
        median = jnp.exp(log_median(theta)) / theta["rate"]
        outliers = median * jnp.exp(theta["out_loc"] + theta["out_scale"] ** 2 / 2)
        return (1 - theta["out_prob"]) * theta["shape"] / theta["rate"] + theta["out_prob"] * outliers

    theta = jax.tree.map(jnp.asarray, theta)
    found, expected = (jax.value_and_grad(f)(theta) for f in (average, analytic))
    assert found[0] == pytest.approx(float(expected[0]), rel=0.01)
    for name, slope in expected[1].items():
        assert float(found[1][name]) == pytest.approx(float(slope), rel=0.02), name


def test_factors_change_as_many_genes_as_asked_and_as_much():
    u = uniforms(50_000)
    how = {"prob": 0.3, "down": 0.25, "loc": jnp.asarray(0.5), "scale": jnp.asarray(0.4)}
    log = np.asarray(splat.log_factors(u, **how))
    assert (log != 0).mean() == pytest.approx(0.3, abs=0.01)
    assert (log < 0).sum() / (log != 0).sum() == pytest.approx(0.25, abs=0.02)
    sizes = np.abs(log[log != 0])
    assert stats.kstest(sizes, stats.foldnorm(0.5 / 0.4, scale=0.4).cdf).pvalue > 0.01


def test_share_of_changed_genes_has_an_unbiased_gradient():
    """E|log f| = prob E|N|, so its derivative in prob is E|N|; loc and scale are Splatter's defaults."""
    u = (jnp.arange(40_000) + 0.5) / 40_000

    def size(prob):
        return jnp.abs(splat.log_factors(u, prob=prob, down=0.4, loc=jnp.asarray(0.1), scale=jnp.asarray(0.4))).mean()

    assert float(jax.grad(size)(0.3)) == pytest.approx(stats.foldnorm(0.1 / 0.4, scale=0.4).mean(), rel=0.02)


def test_paths_start_where_they_are_told():
    ends = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    noise = jax.random.normal(jax.random.key(0), (9, 2, 2))
    table = splat.path_table(ends, (0, 1), sigma=jnp.zeros((2, 2)), noise=noise)
    np.testing.assert_allclose(table[0], jnp.linspace(0, 1, 10)[:, None] * ends[0], atol=1e-6)
    np.testing.assert_allclose(table[1, 0], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(table[1, -1], [1.0, 2.0], atol=1e-6)
    bent = splat.path_table(ends, (0, 1), sigma=jnp.ones((2, 2)), noise=noise)
    np.testing.assert_allclose(bent[:, -1], table[:, -1], atol=1e-6)  # a bridge ends where the line does
    assert float(jnp.abs(bent - table).max()) > 0.1


def test_skew_puts_cells_near_the_end_or_the_start():
    u = uniforms(20_000)
    assert stats.kstest(np.asarray(splat.path_position(u, jnp.asarray(0.5))), "uniform").pvalue > 0.01
    assert float(splat.path_position(u, jnp.asarray(1e-6)).mean()) == pytest.approx(2 / 3, abs=0.01)  # density 2 t
    assert float(splat.path_position(u, jnp.asarray(1 - 1e-6)).mean()) == pytest.approx(1 / 3, abs=0.01)


def test_dropout_falls_with_the_mean():
    lost = splat.dropout_probability(jnp.array([[0.0, 0.1, 1.0, 10.0, 1e4]]), jnp.asarray(0.0), jnp.asarray(-1.0))
    assert np.all(np.diff(lost[0]) < 0)
    assert float(lost[0, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize("mean", [0.3, 9.0, 40.0, 2e4])
def test_poisson_draws_follow_the_law(mean):
    keys = jax.random.split(jax.random.key(1), 20)
    draws = np.asarray(poisson_draws(keys, jnp.full((20, 1000), mean))).ravel()
    edges = np.unique(stats.poisson(mean).ppf(np.linspace(0.03, 0.97, 20)))
    seen = np.histogram(draws, np.r_[-1, edges, np.inf] + 0.5)[0]
    assert stats.chisquare(seen, np.diff(np.r_[0, stats.poisson(mean).cdf(edges), 1]) * len(draws)).pvalue > 1e-3


def test_gamma_draws_follow_the_law_and_carry_its_gradient():
    keys = jax.random.split(jax.random.key(2), 40)
    for shape in (0.5, 8.0):
        draws = gamma_draws(keys, jnp.full((40, 1000), shape))
        assert stats.kstest(np.asarray(draws).ravel(), stats.gamma(shape).cdf).pvalue > 1e-3
        slope = jax.grad(lambda s: gamma_draws(keys, jnp.full((40, 1000), s)).mean())(shape)
        assert float(slope) == pytest.approx(1.0, rel=0.03)  # E[Gamma(shape)] = shape


def test_a_cells_draws_do_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(3), 30)
    mean = jnp.exp(jax.random.normal(jax.random.key(4), (30, 900)) * 2)
    np.testing.assert_array_equal(poisson_draws(keys, mean)[17:19], poisson_draws(keys[17:19], mean[17:19]))
    np.testing.assert_array_equal(gamma_draws(keys, mean)[17:19], gamma_draws(keys[17:19], mean[17:19]))
