"""Ranks, partial effects, reconstruction and edges, against numpy, scipy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from diffbio.math.attribution import lasso_path_importances, tree_importances
from diffbio.math.regulation import (
    balanced,
    correlations,
    partial_effects,
    rank_average,
    regulator_activity,
    soft_threshold,
    standard_ranks,
    strongest_edges,
    unexplained,
)

TFS = np.array([3, 0])


@pytest.fixture(scope="module")
def cells():
    """Gene 1 follows gene 3, gene 2 follows gene 0, gene 4 is constant."""
    random = np.random.default_rng(0)
    x = random.poisson(5.0, (120, 5)).astype(np.float32)
    x[:, 1] = random.poisson(1.0 + 2 * x[:, 3])
    x[:, 2] = random.poisson(20.0 / (1.0 + x[:, 0]))
    x[:, 4] = 2.0
    return x


@pytest.fixture(scope="module")
def z(cells):
    return np.asarray(standard_ranks(jnp.asarray(cells), 1e-3), np.float64)


def test_ranks_are_spearmans_also_with_ties_and_a_constant_gene(cells, z):
    oracle = rankdata(cells[:, :4], axis=0)
    oracle = (oracle - oracle.mean(axis=0)) / oracle.std(axis=0)
    np.testing.assert_allclose(z[:, :4], oracle, atol=1e-4)
    assert (z[:, 4] == 0).all()
    found = correlations(jnp.asarray(z), jnp.asarray(TFS))
    np.testing.assert_allclose(found[0, 1], spearmanr(cells[:, 3], cells[:, 1]).statistic, atol=1e-4)
    logged = standard_ranks(jnp.log1p(jnp.asarray(cells)), 1e-3)
    np.testing.assert_allclose(logged, z, atol=1e-3)


def test_partial_effects_are_ridge_regressions_without_the_gene_itself(z):
    found = np.asarray(partial_effects(correlations(jnp.asarray(z), jnp.asarray(TFS)), jnp.asarray(TFS), 0.1))
    for gene in range(4):
        others = [k for k in range(2) if TFS[k] != gene]
        x = z[:, TFS[others]]
        oracle = np.linalg.solve(x.T @ x / len(x) + 0.1 * np.eye(len(others)), x.T @ z[:, gene] / len(x))
        np.testing.assert_allclose(found[others, gene], oracle, atol=1e-5)
    assert found[0, 3] == found[1, 0] == 0


def test_unexplained_is_the_mean_over_cells(z):
    weights = np.random.default_rng(1).normal(size=(2, 5))
    correlation = correlations(jnp.asarray(z), jnp.asarray(TFS))
    found = unexplained(jnp.asarray(weights), correlation, correlation[:, TFS])
    oracle = ((z - z[:, TFS] @ weights) ** 2).mean(axis=0)
    np.testing.assert_allclose(np.asarray(found)[:4], oracle[:4], rtol=1e-4)


def test_activity_follows_targets_with_sign():
    z = jnp.asarray([[1.0, -1.0, 5.0], [-1.0, 1.0, 5.0]])
    activity = regulator_activity(z, jnp.asarray([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(activity, [[7 / 5, 0.0], [-7 / 5, 0.0]], rtol=1e-6)


def test_balanced_is_a_geometric_mean():
    attention = np.array([[0.3, 0.0], [0.1, 0.0]])
    found = np.asarray(balanced(jnp.asarray(attention)))
    np.testing.assert_allclose(found[:, 0], np.sqrt(attention[:, 0] * attention[:, 0] / 0.4), rtol=1e-6)
    assert (found[:, 1] == 0).all()


def test_thresholds():
    weights = np.array([[0.5, 0.1, 0.0], [0.5, 0.9, 0.2]])
    rows, columns = strongest_edges(weights, n_edges=3)
    assert list(zip(rows, columns, strict=True)) == [(1, 1), (0, 0), (1, 0)]
    rows, _ = strongest_edges(weights, threshold=0.15)
    assert len(rows) == 4
    assert len(strongest_edges(weights)[0]) == 5
    soft = soft_threshold(jnp.asarray(weights), 0.3, 1e-4)
    np.testing.assert_allclose(soft, np.where(weights > 0.3, weights, 0.0), atol=1e-6)


def test_rank_average_ignores_scale_and_what_cannot_be():
    possible = np.array([[False, True, True]])
    found = rank_average(np.array([[9.0, 1.0, 2.0]]), np.array([[0.0, 300.0, 100.0]]), possible=possible)
    np.testing.assert_allclose(found, [[0.0, 0.75, 0.75]])


@pytest.mark.parametrize("method", ["extra_trees", "random_forest"])
def test_trees_find_the_regulator_and_leave_the_gene_itself_out(z, method):
    found = tree_importances(z, TFS, method=method, n_trees=10)
    assert found[0, 1] > found[1, 1]
    assert found[1, 2] > found[0, 2]
    assert found[0, 3] == found[1, 0] == 0
    assert (found[:, 4] == 0).all()
    np.testing.assert_allclose(found[:, :4].sum(axis=0), 1.0)


def test_lasso_path_is_scikit_learns(z):
    from sklearn.linear_model import Lasso

    found = lasso_path_importances(z, TFS)
    x, y = z[:, TFS], z[:, 1]
    highest = np.abs(x.T @ y).max() / len(x)
    path = [
        np.abs(Lasso(alpha=a, fit_intercept=False, tol=1e-8).fit(x, y).coef_)
        for a in highest * np.geomspace(1.0, 0.01, 30)
    ]
    np.testing.assert_allclose(found[:, 1], np.mean(path, axis=0), atol=1e-3)
    assert (found[:, 4] == 0).all()
    assert found[0, 3] == 0
