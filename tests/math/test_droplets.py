"""Cells among droplets: simulated droplets of soup and of cells, p-values, Good-Turing."""

import numpy as np
import pytest
from scipy import sparse

from diffbio.errors import ConfigError, DataError
from diffbio.math.droplets import _benjamini_hochberg, _seen_before, call_cells, good_turing

SOUP = np.random.default_rng(0).dirichlet(np.full(80, 0.5))
CELL = np.random.default_rng(1).dirichlet(np.full(80, 0.5))


def soup(totals, rng, alpha=None):
    shares = SOUP if alpha is None else None
    rows = [rng.multinomial(n, SOUP if shares is not None else rng.dirichlet(SOUP * alpha)) for n in totals]
    return np.array(rows)


def droplets(rng, alpha=None):
    """60 cells of many counts, 60 of few, 300 empty droplets as large as these, 1,500 small ones."""
    big = np.array([rng.multinomial(n, CELL) for n in rng.integers(3000, 5000, 60)])
    few = np.array([rng.multinomial(n, CELL) for n in rng.integers(150, 400, 60)])
    large = soup(rng.integers(150, 400, 300), rng, alpha)
    small = soup(rng.integers(20, 100, 1500), rng, alpha)
    truth = np.repeat([True, True, False, False], [60, 60, 300, 1500])
    return sparse.csr_array(np.vstack([big, few, large, small])), truth


@pytest.mark.parametrize("alpha", [None, 200.0], ids=["multinomial", "overdispersed"])
def test_cells_of_few_counts_are_told_from_soup_of_as_many(alpha):
    matrix, truth = droplets(np.random.default_rng(2), alpha)
    found = call_cells(matrix, n_simulations=2000, fdr=0.01)
    assert found.is_cell[truth].mean() > 0.95
    assert found.is_cell[~truth].mean() < 0.01
    assert np.isnan(found.pvalue[420:]).all(), "droplets that teach the soup are not tested"
    assert np.abs(found.profile - SOUP).max() < 0.01
    if alpha is None:
        assert found.alpha > 2000
    else:
        assert 150 < found.alpha < 270


def test_pvalues_of_soup_are_uniform():
    matrix, _ = droplets(np.random.default_rng(3), 200.0)
    p = np.sort(call_cells(matrix, n_simulations=2000).pvalue[120:420])
    assert np.abs(p - (np.arange(300) + 0.5) / 300).max() < 0.1  # Kolmogorov-Smirnov at 0.5 %


def test_the_same_seed_gives_the_same_calls_in_any_order_of_droplets():
    matrix, _ = droplets(np.random.default_rng(4))
    a, again = call_cells(matrix, n_simulations=300), call_cells(matrix, n_simulations=300)
    np.testing.assert_array_equal(a.pvalue, again.pvalue)
    turned = call_cells(matrix[::-1].tocsr(), n_simulations=300)
    np.testing.assert_array_equal(turned.pvalue[::-1], a.pvalue)


def test_genes_without_a_molecule_change_nothing():
    matrix, _ = droplets(np.random.default_rng(5))
    wider = sparse.csr_array(sparse.hstack([matrix, sparse.csr_array((matrix.shape[0], 3))]))
    a, b = call_cells(matrix, n_simulations=300), call_cells(wider, n_simulations=300)
    np.testing.assert_array_equal(a.is_cell, b.is_cell)
    assert (b.profile[-3:] == 0).all()


def test_good_turing_owes_the_unseen_what_was_seen_once():
    counts = np.array([0, 0, 1, 1, 1, 2, 2, 3, 5, 8, 13, 40])
    share = good_turing(counts)
    assert share.sum() == pytest.approx(1.0)
    assert share[:2].sum() == pytest.approx(3 / counts.sum())
    assert (np.diff(share[2:]) >= 0).all(), "more molecules, larger share"
    assert good_turing(np.zeros(4, int)) == pytest.approx(0.25)
    assert (good_turing(np.array([0, 4, 9])) > 0).all()


def test_earlier_molecules_of_a_gene_are_counted():
    np.testing.assert_array_equal(_seen_before(np.array([[3, 1, 3, 3, 1]])), [[0, 0, 1, 2, 1]])


def test_false_discovery_rates_are_those_of_statsmodels_example():
    p = np.array([0.01, 0.04, 0.03, 0.5])
    np.testing.assert_allclose(_benjamini_hochberg(p), [0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_filtered_matrices_and_wrong_settings_are_refused():
    matrix, _ = droplets(np.random.default_rng(6))
    with pytest.raises(DataError, match="unfiltered"):
        call_cells(matrix[:60])
    with pytest.raises(DataError, match="lower limit"):
        call_cells(matrix[420:])
    with pytest.raises(ConfigError, match="fdr"):
        call_cells(matrix, fdr=0.0)


@pytest.mark.parametrize("n_cells", [0, 5, 20])
def test_where_cells_are_few_the_soup_is_not_called(n_cells):
    rng = np.random.default_rng(7)
    cells = np.array([rng.multinomial(n, CELL) for n in rng.integers(500, 3000, n_cells)]).reshape(n_cells, 80)
    soup_totals = np.maximum(rng.lognormal(np.log(50), 0.6, 2500).astype(int), 1)
    matrix = sparse.csr_array(np.vstack([cells, soup(soup_totals, rng, 500.0)]))
    found = call_cells(matrix, fdr=0.01)
    assert found.is_cell[:n_cells].all()
    assert found.is_cell[n_cells:].sum() <= 1


def test_a_limit_below_the_soup_is_refused():
    matrix, _ = droplets(np.random.default_rng(6))
    for retain in (np.nan, 50.0):
        with pytest.raises(ConfigError, match="retain must be above lower"):
            call_cells(matrix, retain=retain)
