"""`pp.doublets` and `pl.doublets`."""

import warnings

import numpy as np
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse
from sklearn.metrics import average_precision_score, roc_auc_score

import diffbio
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError


def cells(n=150, n_doublets=10, seed=0):
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(80, 0.5), 3)
    kind = rng.integers(0, 3, n)
    counts = rng.poisson(share[kind] * rng.lognormal(np.log(400), 0.4, n)[:, None])
    pairs = np.array([(a, b) for a, b in rng.integers(0, n, (500, 2)) if kind[a] != kind[b]])[:n_doublets]
    both = np.concatenate([counts, counts[pairs].sum(1)])
    adata = AnnData(sparse.csr_matrix(both.astype(np.float32)))
    adata.obs["doublet"] = np.arange(len(both)) >= n
    return adata


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        yield


@pytest.mark.usefixtures("quiet")
def test_each_batch_by_itself_and_its_figure(tmp_path):
    first, second = cells(), cells(seed=1)
    both = AnnData(sparse.vstack([first.X, second.X]).tocsr())
    both.obs["batch"] = np.repeat(["a", "b"], [first.n_obs, second.n_obs])
    diffbio.pp.doublets(both, batch_key="batch")
    alone = diffbio.pp.doublets(first, copy=True)
    np.testing.assert_allclose(
        both.obs["diffbio_doublet_score"][: first.n_obs], alone.obs["diffbio_doublet_score"], rtol=1e-4
    )
    table = both.uns["diffbio"]["doublet_thresholds"]
    assert list(table.index) == ["a", "b"]
    score, called = both.obs["diffbio_doublet_score"].to_numpy(), both.obs["diffbio_predicted_doublet"].to_numpy()
    np.testing.assert_array_equal(called[: first.n_obs], score[: first.n_obs] > table["threshold"].iloc[0])
    truth = np.concatenate([first.obs["doublet"], second.obs["doublet"]])
    assert roc_auc_score(truth, score) > 0.85
    assert diffbio.pl.doublets(both).shape == (2, 2)
    both.write_h5ad(tmp_path / "doublets.h5ad")
    again = read_h5ad(tmp_path / "doublets.h5ad")
    assert diffbio.pl.doublets(again).shape == (2, 2)


@pytest.mark.usefixtures("quiet")
def test_empty_cells_have_no_score_and_a_threshold_is_obeyed():
    adata = cells(60, 4)
    matrix = adata.X.tolil()
    matrix[5] = 0
    adata.X = matrix.tocsr()
    diffbio.pp.doublets(adata, threshold=0.2)
    score = adata.obs["diffbio_doublet_score"]
    assert np.isnan(score.iloc[5])
    assert not adata.obs["diffbio_predicted_doublet"].iloc[5]
    assert adata.obs["diffbio_predicted_doublet"].sum() == (score > 0.2).sum()


@pytest.mark.usefixtures("quiet")
def test_solo_with_the_encoder_of_a_model():
    from diffbio.models import SCVI

    adata = cells(90, 8)
    SCVI.setup_anndata(adata)
    model = SCVI(adata, n_hidden=16, n_latent=4)
    with pytest.raises(ConfigError, match="not trained"):
        diffbio.pp.doublets(adata, method="solo", model=model)
    model.train(max_epochs=1)
    diffbio.pp.doublets(adata, method="solo", model=model, max_epochs=2)
    assert adata.obs["diffbio_doublet_score"].between(0, 1).all()
    with pytest.raises(DataError, match="was trained on 80 genes"):
        diffbio.pp.doublets(adata[:, :40].copy(), method="solo", model=model)
    with pytest.raises(ConfigError, match="model is for method='solo'"):
        diffbio.pp.doublets(adata, model=model)


@pytest.mark.usefixtures("quiet")
def test_solo():
    adata = cells(120, 8)
    diffbio.pp.doublets(adata, method="solo", expected_rate=0.1, max_epochs=3)
    assert adata.obs["diffbio_predicted_doublet"].mean() == pytest.approx(0.1, abs=0.02)
    assert diffbio.pl.doublets(adata).shape == (1, 2)


def test_refusals():
    adata = cells(60, 2)
    for wrong, error, said in (
        ({"method": "magic"}, ConfigError, "'scrublet', 'solo'"),
        ({"expected_rate": 0.5}, ConfigError, "expected_rate"),
        ({"max_epochs": 3}, ConfigError, "max_epochs"),
        *(({"threshold": bad}, ConfigError, "threshold must be in") for bad in (np.nan, 0.0, 1.0, -0.1)),
    ):
        with pytest.raises(error, match=said):
            diffbio.pp.doublets(adata, **wrong)
    with pytest.raises(DataError, match="at least 30"):
        diffbio.pp.doublets(adata[:20].copy())
    adata.X = np.log1p(adata.X.toarray())
    with pytest.raises(DataError, match="log"):
        diffbio.pp.doublets(adata)
    with pytest.raises(MissingKeyError, match="diffbio_doublet_score"):
        diffbio.pl.doublets(adata)


def test_no_valley_is_said():
    rng = np.random.default_rng(0)
    adata = AnnData(sparse.csr_matrix(rng.poisson(6.0, (200, 60)).astype(np.float32)))
    with pytest.warns(DataWarning, match=r"no valley.*calls the expected 6%") as said:
        diffbio.pp.doublets(adata)
    assert said[0].filename == __file__
    assert not adata.uns["diffbio"]["doublet_thresholds"]["automatic"].iloc[0]
    assert adata.obs["diffbio_predicted_doublet"].mean() == pytest.approx(0.06, abs=0.01)


@pytest.mark.usefixtures("quiet")
def test_the_figure_tells_the_rate_of_the_cells_it_draws():
    adata = cells(60, 4)
    diffbio.pp.doublets(adata, threshold=0.2)
    called = adata.obs["diffbio_predicted_doublet"].to_numpy()
    assert called.any()
    assert f"{called.mean():.1%} of 64 cells" in diffbio.pl.doublets(adata)[0, 0].get_title()
    kept = adata[~called].copy()
    assert f"0.0% of {kept.n_obs} cells called" in diffbio.pl.doublets(kept)[0, 0].get_title()


def test_experimental_doublets(data_dir):
    adata = read_h5ad(data_dir / "hashing_cell_line_doublets.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        diffbio.pp.doublets(adata)
    truth, score = adata.obs["is_doublet"], adata.obs["diffbio_doublet_score"]
    assert roc_auc_score(truth, score) >= 0.64
    assert average_precision_score(truth, score) >= 0.32  # Scrublet: 0.32, library size 0.17
