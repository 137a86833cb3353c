"""Splines that recover what made the data, and correlations beside scipy's."""

import numpy as np
import pytest
from scipy import sparse, stats

from diffbio.errors import ConfigError, DataError
from diffbio.math.gene_trends import drivers, trends


def cells(seed=0, n=400, noise=0.2):
    rng = np.random.default_rng(seed)
    when = rng.uniform(0, 1, n)
    return when, curves(when) + noise * rng.normal(size=(n, 3))


def curves(t):
    return np.stack([np.sin(5 * t), t, np.ones_like(t)], axis=1)


def test_curves_come_back_and_the_band_covers_them():
    times = np.linspace(0.02, 0.98, 40)
    covered = []
    for seed in range(20):
        when, expression = cells(seed)
        found = trends(when, expression, np.ones(400), times)
        covered.append((found.low < curves(times)) & (curves(times) < found.high))
    assert np.abs(found.mean - curves(times)).max(axis=0) == pytest.approx([0, 0, 0], abs=0.15)
    assert 0.85 < np.mean(covered) < 0.99, "of a 95 % band, on average along the curve"
    # without noise a straight line is met exactly: its penalty is 0
    line = trends(when, 3 * when[:, None] - 1, np.ones(400), times)
    np.testing.assert_allclose(line.mean[:, 0], 3 * times - 1, atol=1e-5)


def test_cells_of_another_fate_do_not_count():
    when, expression = cells()
    rng = np.random.default_rng(1)
    both, other = np.concatenate([when, when]), np.concatenate([expression, 9 * rng.normal(size=expression.shape)])
    weights = np.concatenate([np.ones(400), np.zeros(400)])
    times = np.linspace(0.1, 0.9, 9)
    for one, two in zip(
        trends(when, expression, np.ones(400), times), trends(both, other, weights, times), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-8)


def test_no_curve():
    when, expression = cells()
    with pytest.raises(DataError, match="add up to 4 cells"):
        trends(when, expression, np.full(400, 0.01), when[:2])
    with pytest.raises(DataError, match="no curve"):
        trends(np.zeros(400), expression, np.ones(400), when[:2])
    for settings in ({"n_segments": 0}, {"confidence": 1.0}):
        with pytest.raises(ConfigError, match="n_segments must be"):
            trends(when, expression, np.ones(400), when[:2], **settings)


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    fates = rng.dirichlet(np.ones(3), 50)
    expression = rng.poisson(3 * fates[:, :1] + 0.5, (50, 6)).astype(float)
    expression[:, 5] = 2.0
    found = drivers(expression, fates)
    for gene in range(5):
        for fate in range(3):
            test = stats.pearsonr(expression[:, gene], fates[:, fate])
            assert found.correlation[gene, fate] == pytest.approx(test.statistic, abs=1e-12)
            interval = test.confidence_interval()
            assert (found.low[gene, fate], found.high[gene, fate]) == pytest.approx(tuple(interval), abs=1e-9)
            assert found.pvalue[gene, fate] == pytest.approx(
                2 * stats.norm.sf(abs(np.arctanh(test.statistic)) * 47**0.5)
            )
    np.testing.assert_allclose(found.qvalue[:5, 1], stats.false_discovery_control(found.pvalue[:5, 1]))
    assert np.isnan(found.correlation[5]).all(), "a gene that does not vary"
    for one, two in zip(found, drivers(sparse.csr_array(expression), fates), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-12)
    with pytest.raises(DataError, match="3 cells are too few"):
        drivers(expression[:3], fates[:3])
