import numpy as np

from diffbio.math.growth import birth_rate, death_rate, growth_per_day, mean_z_score


def test_rates_are_the_logistic_functions_of_wot():
    score = np.array([-9.0, -0.5, 0.0, 0.1, 0.25, 1.0, 99.0])
    np.testing.assert_allclose(birth_rate(score), 0.3 + 1.4 / (1 + np.exp(-(score - 0.25) * 4 / 0.5)), rtol=1e-12)
    np.testing.assert_allclose(death_rate(score), 0.3 + 1.4 / (1 + np.exp(-(score - 0.1) * 4 / 0.2)), rtol=1e-12)


def test_growth_rises_with_births_and_falls_with_deaths():
    low, high = np.array([-1.0]), np.array([2.0])
    assert growth_per_day(high) > growth_per_day(low)
    assert growth_per_day(high, high) < growth_per_day(high, low)
    np.testing.assert_allclose(growth_per_day(high, high), 1.0, rtol=1e-4)
    np.testing.assert_allclose(growth_per_day(high, low), np.exp(1.4), rtol=1e-4)


def test_scores_are_means_over_genes_and_cut():
    values = np.zeros((100, 3))
    values[0, 0], values[:50, 1] = 1000.0, 2.0
    scores = mean_z_score(values)
    assert scores[0] == (5 + 1) / 3  # the first gene is cut at 5, the second one standard deviation up, the third flat
    np.testing.assert_allclose(scores[1] - scores[99], 2 / 3, rtol=1e-12)
