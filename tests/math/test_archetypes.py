"""Archetypes: exact weights and their gradient, corners that are found, their number, their genes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import sparse, stats
from scipy.optimize import linear_sum_assignment, minimize
from scipy.spatial.distance import cdist

from diffbio.errors import ConfigError, DataError
from diffbio.math import archetypes
from diffbio.math.archetypes import (
    elbow,
    explained_by_number,
    gene_enrichment,
    learn_archetypes,
    mixture_weights,
)


def mixtures(n, corners, *, noise=0.05, concentration=0.6, seed=0):
    """Cells that are mixtures of `corners` with noise, and their weights."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(len(corners), concentration), n)
    return weights @ corners + noise * rng.normal(size=(n, corners.shape[1])), weights


def corner_error(found, corners):
    """Mean distance of matched corners, relative to the largest between true ones."""
    gaps = cdist(found, corners)
    rows, columns = linear_sum_assignment(gaps)
    return gaps[rows, columns].mean() / cdist(corners, corners).max()


@pytest.fixture(scope="module")
def triangle():
    corners = np.random.default_rng(1).normal(size=(3, 5)) * 4
    return (*mixtures(300, corners), corners)


def test_weights_are_those_of_a_general_solver():
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(4, 3)), 1.5 * rng.normal(size=(12, 3))
    with jax.enable_x64(True):
        found = np.asarray(mixture_weights(jnp.asarray(x), jnp.asarray(z), temperature=0.01))
    ridge = 0.01 * ((z - z.mean(axis=0)) ** 2).sum() / 4
    for cell, weights in zip(x, found, strict=True):
        solved = minimize(
            lambda w, cell=cell: ((cell - w @ z) ** 2).sum() + ridge * (w @ w),
            np.full(4, 0.25),
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            tol=1e-12,
        )
        np.testing.assert_allclose(weights, solved.x, atol=2e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    assert (found == 0).any()


def test_weights_at_the_limits_of_temperature():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    inside = jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(mixture_weights(inside @ z, z, temperature=1e-6), inside, atol=1e-4)
    np.testing.assert_allclose(mixture_weights(inside @ z, z, temperature=1e5), 1 / 3, atol=1e-4)
    # archetypes that are mixtures of each other: the temperature chooses the weights
    twice = jnp.concatenate([z, z[:1]])
    weights = mixture_weights(inside @ z, twice, temperature=1e-4)
    np.testing.assert_allclose(weights[:, 0], weights[:, 3], atol=1e-2)
    np.testing.assert_allclose(weights @ twice, inside @ z, atol=1e-2)


def test_the_gradient_of_weights_is_exact():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, z = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(4, 3)))
        check_grads(
            lambda x, z, t: mixture_weights(x, z, temperature=t),
            (x, z, jnp.asarray(0.02)),
            order=1,
            modes=["rev"],
            eps=1e-6,
            rtol=1e-6,
        )


def test_corners_are_found(triangle):
    x, weights, corners = triangle
    found = learn_archetypes(x, 3)
    assert corner_error(found.archetypes, corners) < 0.02
    assert found.explained > 0.99
    np.testing.assert_allclose(found.mixtures.sum(axis=1), 1, atol=1e-9)
    assert found.mixtures.min() >= 0
    np.testing.assert_allclose(found.mixtures @ x[found.cells], found.archetypes, atol=1e-4)
    learned = np.asarray(mixture_weights(jnp.asarray(x), jnp.asarray(found.archetypes), temperature=1e-4))
    rows, columns = linear_sum_assignment(cdist(found.archetypes, corners))
    assert np.abs(learned[:, rows] - weights[:, columns]).mean() < 0.02


def test_the_order_of_cells_and_where_they_lie_do_not_matter(triangle):
    x, _, _ = triangle
    found = learn_archetypes(x, 3)
    order = np.random.default_rng(3).permutation(len(x))
    again = learn_archetypes(x[order], 3)
    assert corner_error(again.archetypes, found.archetypes) < 1e-4
    moved = learn_archetypes(2 * x + 50, 3)
    assert corner_error((moved.archetypes - 50) / 2, found.archetypes) < 1e-3


def test_many_cells_are_searched_at_their_border(triangle, monkeypatch):
    x, _, corners = triangle
    whole = learn_archetypes(x, 3)
    monkeypatch.setattr(archetypes, "MOST_CANDIDATES", 100)
    monkeypatch.setattr(archetypes, "DIRECTIONS", 60)
    monkeypatch.setattr(archetypes, "MOST_WEIGHTED", 150)
    part = learn_archetypes(x, 3)
    assert corner_error(part.archetypes, corners) < 0.03
    assert corner_error(part.archetypes, whole.archetypes) < 0.03


def test_one_archetype_is_the_mean_and_more_explain_more(triangle):
    x, _, _ = triangle
    one = learn_archetypes(x, 1)
    np.testing.assert_allclose(one.archetypes[0], x.mean(axis=0), atol=1e-3)
    assert one.explained == pytest.approx(0, abs=1e-5)
    curve = explained_by_number(x, 5)
    assert (np.diff(curve) > -1e-3).all()
    assert elbow(curve) == 3


def test_elbows():
    assert elbow(np.array([0, 0.3, 0.6, 0.9, 0.92, 0.94])) == 4
    assert elbow(np.array([0.0])) == 1
    assert elbow(np.array([0.0, 0.5])) == 2
    assert elbow(np.zeros(4)) == 1


def test_genes_of_an_archetype_by_welchs_test():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), 200)
    genes = np.maximum(rng.normal(1, 0.5, size=(200, 6)), 0)
    genes[:, 2] += 3 * weights[:, 1]
    genes[:, 5] = 1.0
    found = gene_enrichment(genes, weights)
    near = weights[:, 1] >= np.sort(weights[:, 1])[-20]
    wanted = stats.ttest_ind(genes[near, 2], genes[~near, 2], equal_var=False, alternative="greater").pvalue
    assert found.pvalues[1, 2] == pytest.approx(wanted, rel=1e-6)
    assert found.qvalues[1].argmin() == 2
    assert found.qvalues[1, 2] < 1e-6
    assert (found.pvalues[:, 5] == 1).all()
    assert found.correlation[1, 2] == pytest.approx(np.corrcoef(weights[:, 1], genes[:, 2])[0, 1])
    assert found.difference[1, 2] == pytest.approx(genes[near, 2].mean() - genes[~near, 2].mean())
    thin = gene_enrichment(sparse.csr_matrix(genes), weights)
    for a, b in zip(found, thin, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigError, match="share"):
        gene_enrichment(genes, weights, share=1.5)
    with pytest.raises(DataError, match="200 cells, weights have 100"):
        gene_enrichment(genes, weights[:100])


def test_bad_cells_are_refused(triangle):
    x, _, _ = triangle
    with pytest.raises(DataError, match="only 2 different cells"):
        learn_archetypes(np.repeat(x[:2], 5, axis=0), 3)
    with pytest.raises(DataError, match="all cells are alike"):
        learn_archetypes(np.ones((10, 3)), 1)
    with pytest.raises(DataError, match="first in row 4"):
        learn_archetypes(np.where(np.arange(len(x))[:, None] == 4, np.nan, x), 3)
    with pytest.raises(ConfigError, match="n_archetypes"):
        learn_archetypes(x, 0)
