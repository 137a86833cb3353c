import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_selection import f_classif

from diffbio.data.type_genes import f_statistic, type_genes
from diffbio.errors import ConfigError, DataError


def planted(seed=0, cells=90, genes=40):
    """Three types; genes 5, 11 and 30 are raised in one of them each."""
    rng = np.random.default_rng(seed)
    labels = np.arange(cells) % 3
    rate = np.ones((cells, genes))
    for code, gene in enumerate((5, 11, 30)):
        rate[labels == code, gene] = 6.0
    return rng.poisson(rate).astype(np.float32), labels


def test_genes_that_differ_between_types_are_found_in_order_of_columns():
    counts, labels = planted()
    assert type_genes(counts, labels, 3).tolist() == [5, 11, 30]
    assert type_genes(sparse.csr_array(counts), labels, 3).tolist() == [5, 11, 30]


def test_the_score_is_the_f_statistic():
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(50, 7)), rng.integers(0, 4, 50)
    x[:, 2] = 3.0  # a constant gene tells nothing
    wanted = f_classif(np.delete(x, 2, axis=1), labels)[0]
    found = f_statistic(x, labels)
    assert found[2] == 0.0
    np.testing.assert_allclose(np.delete(found, 2), wanted, rtol=1e-8)
    np.testing.assert_allclose(f_statistic(sparse.csr_array(x), labels), found)


def test_depth_is_no_difference():
    counts, labels = planted()
    deep = counts * (1 + 9 * labels[:, None])  # one type ten times as deep as another
    np.testing.assert_array_equal(type_genes(deep, labels, 3), type_genes(counts, labels, 3))


def test_unlabelled_cells_are_not_read():
    counts, labels = planted()
    strange = np.where(np.arange(len(labels)) % 2, labels, -1)
    other = counts.copy()
    other[strange < 0, 0] = 500.0
    np.testing.assert_array_equal(type_genes(other, strange, 5), type_genes(counts, strange, 5))


def test_all_genes_where_there_are_fewer():
    counts, labels = planted()
    assert type_genes(counts, labels, 1000).tolist() == list(range(counts.shape[1]))
    assert type_genes(counts[:1], labels[:1], 2).tolist() == [0, 1]  # one cell: no gene is better than another


def test_what_does_not_fit_is_named():
    counts, labels = planted()
    with pytest.raises(ConfigError, match="n_genes must be at least 1, got 0"):
        type_genes(counts, labels, 0)
    with pytest.raises(DataError, match=r"89,.*90 cells"):
        type_genes(counts, labels[1:], 3)
    with pytest.raises(DataError, match="no cell is labelled"):
        type_genes(counts, np.full(len(labels), -1), 3)
