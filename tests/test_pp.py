import numpy as np
import pytest
from scipy import sparse
from toy_cells import toy_cells

from diffbio import pp
from diffbio.data.read import read
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError
from diffbio.pp.ambient import _soup


def test_normalize_writes_one_layer_and_leaves_x_alone():
    adata = toy_cells()
    before = adata.X.copy()
    assert pp.normalize(adata) is None
    assert set(adata.layers) - {None} == {"diffbio_normalized"}
    assert (before != adata.X).nnz == 0
    record = adata.uns["diffbio"]["normalize"]
    assert record["params"]["method"] == "shifted_log"
    assert record["versions"]["diffbio"]
    assert not adata.unwriteable()


def test_copy_leaves_the_original_alone():
    adata = toy_cells()
    other = pp.normalize(adata, method="cpm", copy=True)
    assert "diffbio" not in adata.uns
    assert not set(adata.layers) - {None}
    np.testing.assert_allclose(other.layers["diffbio_normalized"].sum(axis=1), 1e6, rtol=1e-5)


def test_a_method_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match="'shifted_log', 'cpm', 'pearson_residuals'"):
        pp.normalize(toy_cells(), method="sctransform")


def test_counts_come_from_the_layer_named():
    adata = toy_cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray())
    with pytest.raises(DataError, match="log-transformed"):
        pp.highly_variable(adata, n_top_genes=10)
    pp.highly_variable(adata, n_top_genes=10, layer="counts", batch_key="batch")
    assert adata.var["diffbio_highly_variable"].sum() == 10


def test_ambient_removes_no_more_than_there_is_batch_by_batch():
    adata = toy_cells(60, 20)
    pp.ambient(adata, batch_key="batch", max_epochs=2)
    clean = adata.layers["diffbio_decontaminated"]
    assert sparse.issparse(clean)
    assert clean.min() >= 0
    assert (clean - adata.X).max() <= 1e-5
    fraction = adata.obs["diffbio_ambient_fraction"]
    assert fraction.between(0, 1).all()
    # rows are back in their places: no cell has a gene that it had not before
    assert ((clean > 0).astype(int) - (adata.X > 0).astype(int)).max() <= 0


def test_ambient_profile_from_raw_droplets_and_from_nowhere():
    adata = toy_cells(40, 20)
    profile = adata.var.pop("ambient_profile").to_numpy()
    with pytest.raises(MissingKeyError, match=r"ambient_profile= .* or raw="):
        pp.ambient(adata)
    raw = toy_cells(80, 20, seed=1)
    raw.obs_names = [f"droplet{i}" for i in range(80)]
    raw.X = sparse.csr_matrix(np.random.default_rng(0).poisson(20 * profile, (80, 20)).astype(np.float32))
    found = _soup(adata, None, raw, None)
    assert np.abs(found - profile).max() < 0.03  # 1,600 molecules
    with pytest.raises(DataError, match="other genes"):
        _soup(adata, None, toy_cells(80, 5), None)


def test_cells_are_called_and_the_soup_is_read_from_all_droplets(data_dir):
    raw = read(data_dir / "pbmc_raw_droplets_toy.h5ad")
    with pytest.warns(DataWarning, match="simulations are too few"):
        pp.call_cells(raw, n_simulations=500)
    assert pp.call_cells(raw) is None
    truth = raw.obs["is_cell"].astype(str).eq("True").to_numpy()
    called = raw.obs["diffbio_is_cell"].to_numpy()
    assert not called[~truth].any()
    assert called[truth].mean() > 0.9
    assert raw.obs["diffbio_cell_fdr"][called].max() <= 0.001
    assert raw.var["ambient_profile"].sum() == pytest.approx(1.0)
    here = np.flatnonzero(np.asarray(raw.X[called].sum(axis=0)).ravel())[::-1]
    cells = raw[called][:, raw.var_names[here]].copy()
    del cells.var["ambient_profile"]
    pp.ambient(cells, raw=raw, max_epochs=2)  # genes in another order
    # droplets of at most 100 counts, whose sums are at hand
    droplets = raw.X.toarray()
    empty = droplets[droplets.sum(axis=1) <= 100].sum(axis=0)
    expected = empty[here] / empty[here].sum()
    np.testing.assert_allclose(_soup(cells, None, raw, None), expected, atol=1e-7)
    assert cells.obs["diffbio_ambient_fraction"].between(0, 1).all()
