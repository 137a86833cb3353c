import numpy as np
import pytest
from scipy import sparse

from diffbio.data import batch_codes, counts_of, genes, highly_variable_genes, read
from diffbio.errors import ConfigError, DataError, DataWarning


def matrix(n_cells=300, n_genes=200, seed=0):
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0, 1, n_genes)
    return sparse.csr_matrix(rng.poisson(mean * rng.gamma(2, 0.5, (n_cells, n_genes)))).astype(np.float32)


@pytest.mark.parametrize(("name", "batch_key"), [("pbmc3k", None), ("pbmc_three_chemistries", "batch")])
def test_the_genes_that_scanpy_picks(data_dir, name, batch_key):
    sc = pytest.importorskip("scanpy")
    path = data_dir / f"{name}.h5ad"
    adata = read(path)
    labels = None if batch_key is None else batch_codes(adata.obs, batch_key)[0]
    table = highly_variable_genes(counts_of(path), batch_labels=labels, var_names=adata.var_names)
    theirs = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=2000, batch_key=batch_key, inplace=False
    )
    assert table["highly_variable"].sum() == 2000
    # ties in each batch are split by rounding errors in scanpy; without batches nothing differs
    least = 2000 if batch_key is None else 1990
    assert (table["highly_variable"] & theirs["highly_variable"]).sum() >= least
    np.testing.assert_allclose(table["means"], theirs["means"], rtol=1e-12)
    np.testing.assert_allclose(table["variances"], theirs["variances"], rtol=1e-9)
    # the loess amplifies the rounding of scanpy's batch means
    np.testing.assert_allclose(
        table["variances_norm"], theirs["variances_norm"], rtol=1e-9 if batch_key is None else 2e-3
    )


def test_neither_layout_nor_chunks_nor_order_matter(tmp_path, make, monkeypatch):
    x = matrix()
    labels = np.arange(300) % 3
    expected = highly_variable_genes(x, n_top_genes=50, batch_labels=labels)
    adata = make(300, 200)
    adata.X = x
    del adata.layers["double"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    original = genes.row_chunks
    monkeypatch.setattr(genes, "row_chunks", lambda m, chunk_bytes: original(m, chunk_bytes=3000))
    shuffled = np.random.default_rng(0).permutation(300)
    for same, codes in [
        (counts_of(tmp_path / "a.h5ad"), labels),
        (x.toarray(), labels),
        (x.tocsc(), labels),
        (x[shuffled], labels[shuffled]),
    ]:
        table = highly_variable_genes(same, n_top_genes=50, batch_labels=codes)
        # the last step sums real numbers, in another order
        np.testing.assert_allclose(table["variances_norm"], expected["variances_norm"], rtol=1e-10)
        assert table["highly_variable"].equals(expected["highly_variable"])


def test_a_gene_that_varies_between_cells_comes_first():
    x = matrix().toarray()
    x[:, 17] = np.where(np.arange(300) < 60, 40, 0)
    table = highly_variable_genes(x, n_top_genes=10)
    assert table["highly_variable_rank"].idxmin() == 17


def test_fewer_genes_than_asked_for():
    assert highly_variable_genes(matrix(), n_top_genes=2000)["highly_variable"].all()


def test_constant_and_empty_genes_come_last():
    x = matrix().toarray()
    x[:, :5] = 0
    x[:, 5] = 3
    assert not highly_variable_genes(x, n_top_genes=100)["highly_variable"][:6].any()


def test_small_batches_do_not_vote():
    x = matrix()
    labels = np.zeros(300, int)
    labels[-2:] = 1
    with pytest.warns(DataWarning, match="1 batches of fewer than 3 cells"):
        table = highly_variable_genes(x, n_top_genes=50, batch_labels=labels)
    alone = highly_variable_genes(x[:298], n_top_genes=50)
    assert table["highly_variable"].equals(alone["highly_variable"])


def test_few_distinct_means_need_a_wider_span():
    x = np.zeros((50, 12))
    x[np.arange(12) * 2, np.arange(12)] = np.repeat([1, 2, 3], 4)
    with pytest.warns(DataWarning, match="loess"):
        table = highly_variable_genes(x, n_top_genes=3)
    assert np.isfinite(table["variances_norm"]).all()


def test_settings_and_labels_that_do_not_fit():
    with pytest.raises(ConfigError, match="n_top_genes must be at least 1"):
        highly_variable_genes(matrix(), n_top_genes=0)
    with pytest.raises(ConfigError, match="span"):
        highly_variable_genes(matrix(), span=1.5)
    with pytest.raises(DataError, match=r"shape \(5,\) for 300 cells"):
        highly_variable_genes(matrix(), batch_labels=np.zeros(5, int))
    with pytest.raises(DataError, match="none has the 3 cells"), pytest.warns(DataWarning):
        highly_variable_genes(matrix(2))
