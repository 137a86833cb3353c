import numpy as np
import pytest
import scanpy as sc
from scipy import sparse
from toy_cells import toy_cells

from diffbio.data.transform import pearson_residuals, per_cell, shifted_log
from diffbio.errors import DataError


def dense(x):
    return x.toarray() if sparse.issparse(x) else x


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_shifted_log_equals_scanpy(make):
    adata = toy_cells()
    ours = shifted_log(make(adata.X.toarray()))
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(dense(ours), adata.X.toarray(), rtol=1e-5)  # float32 of both
    assert sparse.issparse(ours) == (make is not np.asarray)


def test_per_million_sums_to_a_million_and_empty_cells_stay_zero():
    counts = toy_cells().X.toarray()
    counts[3] = 0
    total = dense(per_cell(sparse.csr_matrix(counts), total=1e6)).sum(axis=1)
    assert total[3] == 0
    np.testing.assert_allclose(np.delete(total, 3), 1e6, rtol=1e-5)


def test_pearson_residuals_equal_scanpy():
    adata = toy_cells()
    ours = pearson_residuals(adata.X)
    sc.experimental.pp.normalize_pearson_residuals(adata)
    np.testing.assert_allclose(ours, dense(adata.X), atol=2e-4)  # float32 here, float64 there


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
def test_values_that_are_no_counts_are_refused(bad):
    counts = toy_cells().X.toarray()
    counts[0, 0] = bad
    with pytest.raises(DataError, match="raw counts"):
        shifted_log(counts)


def test_pearson_residuals_do_not_depend_on_the_blocks(monkeypatch):
    adata = toy_cells(30, 20)
    whole = pearson_residuals(adata.X)
    monkeypatch.setattr("diffbio.data.transform.VALUES_PER_BLOCK", 70)
    np.testing.assert_array_equal(pearson_residuals(adata.X), whole)
    np.testing.assert_array_equal(pearson_residuals(adata.X.toarray()), whole)
