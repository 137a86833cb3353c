import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skmisc import loess as skmisc

from diffbio.data.genes import highly_variable_genes
from diffbio.errors import ConfigError
from diffbio.math.variance_trend import loess, standardized_variance


def theirs(x, y, span):
    model = skmisc.loess(x, y, span=span, degree=2)
    model.fit()
    return model.outputs.fitted_values


def ours(x, y, used=None, span=0.3):
    with jax.enable_x64(True):
        used = np.ones(len(x), bool) if used is None else used
        return np.asarray(jax.jit(loess, static_argnames="span")(jnp.asarray(x), jnp.asarray(y), used=used, span=span))


@pytest.mark.parametrize(("n", "span"), [(30, 0.5), (501, 0.3), (2000, 0.3)])
def test_equals_skmisc(n, span):
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = np.sin(2 * x) + 0.2 * rng.normal(size=n)
    np.testing.assert_allclose(ours(x, y, span=span), theirs(x, y, span), atol=1e-10)


def test_equals_skmisc_where_many_points_share_their_x():
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=800), 1)
    y = x + 0.2 * rng.normal(size=800)
    np.testing.assert_allclose(ours(x, y), theirs(x, y, 0.3), atol=1e-10)


def test_points_left_out_change_nothing():
    rng = np.random.default_rng(1)
    x, y, used = rng.normal(size=300), rng.normal(size=300), rng.random(300) < 0.7
    np.testing.assert_allclose(ours(x, y, used)[used], theirs(x[used], y[used], 0.3), atol=1e-10)


def test_linear_in_y_and_exact_for_a_parabola():
    rng = np.random.default_rng(2)
    x, y, z = rng.normal(size=(3, 200))
    np.testing.assert_allclose(ours(x, 2 * y + z), 2 * ours(x, y) + ours(x, z), atol=1e-10)
    np.testing.assert_allclose(ours(x, 3 - x), 3 - x, atol=1e-10)


def test_few_different_x_fall_back_to_lines_and_constants():
    x = np.repeat([0.0, 1.0], 20)
    np.testing.assert_allclose(ours(x, 1 + x, span=1.0), 1 + x, atol=1e-8)
    assert np.isfinite(ours(np.zeros(20), np.arange(20.0))).all()
    with pytest.raises(ConfigError, match="span"):
        loess(jnp.zeros(3), jnp.zeros(3), used=jnp.ones(3, bool), span=0.0)


def test_scores_equal_the_host_version_clipped_and_constant_genes_too():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(0, 1, 200) * rng.gamma(2, 0.5, (300, 200)))
    counts[0, :20] += 200  # above the limit
    counts[:, 30], counts[:, 31] = 0, 4
    expected = highly_variable_genes(counts, n_top_genes=50)["variances_norm"].to_numpy()
    found = standardized_variance(jnp.asarray(counts, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    assert found[30] == found[31] == 0
    part = standardized_variance(jnp.asarray(counts, jnp.float32), weight=(jnp.arange(300) < 150).astype(jnp.float32))
    expected = highly_variable_genes(counts[:150], n_top_genes=50)["variances_norm"].to_numpy()
    np.testing.assert_allclose(part, expected, rtol=2e-4, atol=1e-6)


def test_genes_with_equal_counts_tie_in_any_order_of_cells():
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, (100, 60))
    counts[:, 40] = rng.permutation(counts[:, 3])
    for order in (np.arange(100), rng.permutation(100)):
        found = standardized_variance(jnp.asarray(counts[order], jnp.float32))
        assert found[40] == found[3]
