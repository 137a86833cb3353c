import anndata
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import sparse

from diffbio import pl, pp
from diffbio.errors import DataError, DataWarning, MissingKeyError


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    rate = rng.lognormal(1.0, 0.8, 60) * rng.lognormal(0, 0.3, (260, 1))
    rate[:, :6] = 0.05 * rate[:, 6:].sum(axis=1, keepdims=True) / 6
    rate[220:, 6:] *= rng.uniform(0.05, 0.3, (40, 1))
    cells = anndata.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    cells.var_names = [f"mt-{i}" if i < 6 else f"g{i}" for i in range(60)]
    cells.obs_names = [f"c{i}" for i in range(260)]
    cells.obs["batch"] = np.where(np.arange(260) % 2, "a", "b")
    return cells


def test_quality_writes_weights_metrics_and_thresholds(adata, tmp_path):
    pp.quality(adata)
    weight, passes = adata.obs["diffbio_cell_weight"], adata.obs["diffbio_quality_pass"].to_numpy()
    assert weight.between(0, 1).all()
    assert passes[:220].mean() > 0.97
    assert passes[220:].mean() < 0.2
    np.testing.assert_array_equal(adata.obs["diffbio_counts"], np.asarray(adata.X.sum(axis=1)).ravel())
    limits = adata.uns["diffbio"]["quality_thresholds"].loc["all"]
    outside = adata.obs["diffbio_mitochondrial_share"] > limits["mitochondrial_max"]
    for name in ("counts", "genes"):
        outside |= ~adata.obs[f"diffbio_{name}"].between(limits[f"{name}_min"], limits[f"{name}_max"])
    np.testing.assert_array_equal(~outside.to_numpy(), passes)
    adata.write_h5ad(tmp_path / "q.h5ad")
    axes = pl.quality(anndata.read_h5ad(tmp_path / "q.h5ad"))
    assert [ax.get_xlabel() for ax in axes] == ["counts", "detected genes", "mitochondrial share", "counts"]
    plt.close("all")


def test_quality_by_batch_by_mads_and_without_mitochondria(adata):
    pp.quality(adata, learned=False, batch_key="batch")
    table = adata.uns["diffbio"]["quality_thresholds"]
    assert list(table.index) == ["a", "b"]
    logs = np.log1p(adata.obs["diffbio_counts"][adata.obs["batch"] == "a"])
    mad = np.median(np.abs(logs - np.median(logs)))
    np.testing.assert_allclose(table.loc["a", "counts_min"], np.expm1(np.median(logs) - 5 * mad), rtol=1e-3)
    pp.quality(adata, learned=False, mitochondrial=None)
    assert "mitochondrial_max" not in adata.uns["diffbio"]["quality_thresholds"]
    assert "diffbio_mitochondrial_share" not in adata.obs  # not that of the run before
    assert len(pl.quality(adata)) == 3
    plt.close("all")


def test_mitochondrial_genes_by_column_and_by_a_prefix_that_is_not_there(adata):
    adata.var["mt"] = np.arange(60) < 6
    by_column = pp.quality(adata, mitochondrial="mt", learned=False, copy=True).obs["diffbio_mitochondrial_share"]
    by_prefix = pp.quality(adata, learned=False, copy=True).obs["diffbio_mitochondrial_share"]
    np.testing.assert_array_equal(by_column, by_prefix)
    for marks in (adata.var["mt"].astype(int), adata.var["mt"].astype("boolean"), adata.var["mt"].astype("category")):
        adata.var["mt"] = marks
        again = pp.quality(adata, mitochondrial="mt", learned=False, copy=True).obs["diffbio_mitochondrial_share"]
        np.testing.assert_array_equal(again, by_prefix)
    for marks in (["True"] * 6 + ["False"] * 54, [2] * 60, [None] * 60, [np.nan] * 60):
        adata.var["mt"] = marks
        with pytest.raises(DataError, match=r"var\['mt'\] must mark"):
            pp.quality(adata, mitochondrial="mt", learned=False)
    with pytest.raises(MissingKeyError, match="'mito-'"):
        pp.quality(adata, mitochondrial="mito-")
    adata.obs["diffbio_cell_weight"], adata.obs["diffbio_quality_pass"] = 1.0, True
    with pytest.raises(MissingKeyError, match=r"run pp\.quality"):
        pl.quality(adata)


def test_few_cells_keep_the_mad_thresholds(adata):
    with pytest.warns(DataWarning, match="too few to learn"):
        pp.quality(adata[:40].copy())


@pytest.mark.filterwarnings("ignore:.*cells have no count")
@pytest.mark.parametrize("learned", [False, True])
def test_cells_without_counts_never_pass(adata, learned):
    # shallow and widely spread, so that the lower threshold lies below 0
    rng = np.random.default_rng(1)
    depth = rng.lognormal(0, 1.5, (260, 1)) * (np.arange(260) >= 30)[:, None]
    adata.X = sparse.csr_matrix(rng.poisson(depth * 0.3, (260, 60)).astype(np.float32))
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    pp.quality(adata, learned=learned)
    assert not adata.obs["diffbio_quality_pass"][total == 0].any()
    assert not adata.obs["diffbio_cell_weight"][total == 0].any()
    assert adata.obs["diffbio_quality_pass"][total > 0].mean() > 0.3
    adata.obs["batch"] = np.where(total > 0, "full", "none")
    with pytest.raises(DataError, match="no cell of batch 'none'"):
        pp.quality(adata, batch_key="batch", learned=False)
