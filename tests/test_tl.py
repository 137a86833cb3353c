import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score
from toy_cells import toy_cells

from diffbio import tl
from diffbio.errors import ConfigError, DataError, MissingKeyError
from diffbio.pipelines import SingleCellPipeline


@pytest.fixture(scope="module")
def adata():
    return toy_cells()


def test_cluster_writes_categories_of_strings_and_probabilities(adata):
    tl.cluster(adata, n_clusters=3)
    clusters = adata.obs["diffbio_cluster"]
    assert isinstance(clusters.dtype, pd.CategoricalDtype)
    assert list(clusters.cat.categories) == ["0", "1", "2"]
    probabilities = adata.obsm["diffbio_cluster_prob"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (clusters.cat.codes == probabilities.argmax(axis=1)).all()
    assert adjusted_rand_score(adata.obs["cell_type"], clusters) > 0.9  # three types far apart
    assert adata.obsm["X_diffbio_pca"].shape == (120, 50)  # all genes of so few are variable


def test_the_seed_is_recorded_and_decides(adata):
    first = tl.cluster(adata, n_clusters=5, random_state=3, copy=True)
    again = tl.cluster(adata, n_clusters=5, random_state=3, copy=True)
    np.testing.assert_array_equal(first.obsm["diffbio_cluster_prob"], again.obsm["diffbio_cluster_prob"])
    assert first.uns["diffbio"]["cluster"]["seed"] == 3


def test_integrate_mixes_the_batches(adata):
    moved = tl.integrate(adata, batch_key="batch", copy=True)
    batch = (moved.obs["batch"] == "donor 0").to_numpy()

    def apart(x):
        kinds = moved.obs["cell_type"].to_numpy()
        gaps = [x[batch & (kinds == k)].mean(0) - x[~batch & (kinds == k)].mean(0) for k in np.unique(kinds)]
        return np.linalg.norm(gaps)

    assert apart(moved.obsm["X_diffbio_integrated"]) < 0.6 * apart(moved.obsm["X_diffbio_pca"])


def test_embed_reads_what_it_is_told_to(adata):
    adata.obsm["X_three"] = np.eye(3, dtype=np.float32)[adata.obs["cell_type"].cat.codes] * 10
    adata.obsm["X_three"] += np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    tl.embed(adata, use_rep="X_three", n_neighbors=10)
    assert adata.obsm["X_diffbio_umap"].shape == (120, 2)
    assert adata.obsm["X_diffbio_umap"].dtype == np.float32
    assert adata.uns["diffbio"]["embed"]["params"]["use_rep"] == "X_three"
    with pytest.raises(MissingKeyError, match=r"no 'X_four'; it has .*X_three"):
        tl.embed(adata, use_rep="X_four")
    adata.obsm["X_bad"] = np.full((120, 2), np.nan)
    with pytest.raises(DataError, match=r"NaN or infinity, first in cell 0 \(cell0\)"):
        tl.cluster(adata, use_rep="X_bad")


def test_vae_reads_the_variable_genes_and_says_which_it_did_not(adata):
    some = adata.copy()
    some.var["diffbio_highly_variable"] = np.arange(50) < 30
    tl.vae(some, batch_key="batch", n_latent=4, normalized=True, max_epochs=2)
    assert some.obsm["X_diffbio_latent"].shape == (120, 4)
    layer = some.layers["diffbio_normalized"]
    np.testing.assert_allclose(layer[:, :30].sum(axis=1), 1, rtol=1e-4)
    assert np.isnan(layer[:, 30:]).all()


@pytest.mark.parametrize("call", [
    lambda a: tl.cluster(a, method="communities"), lambda a: tl.embed(a, method="phate"),
    lambda a: tl.integrate(a, batch_key="batch", method="mmd"),
])  # fmt: skip
def test_methods_of_later_versions_are_refused_by_name(adata, call):
    with pytest.raises(ConfigError, match="not available; this version has"):
        call(adata)


def test_pipeline_returns_itself_and_writes_its_results():
    adata = toy_cells()
    before = adata.copy()
    small = {"latent_dim": 4, "hidden_dims": (16,), "max_epochs": 2, "enable_dim_reduction": False}
    pipeline = tl.pipeline(adata, n_clusters=3, n_top_genes=30, enable_ambient_removal=False, **small)
    assert isinstance(pipeline, SingleCellPipeline)
    assert pipeline.fitted
    assert (adata.X != before.X).nnz == 0
    assert set(adata.obsm) == {"X_diffbio_latent", "diffbio_cluster_prob"}
    assert adata.var["diffbio_highly_variable"].sum() == 30
    record = adata.uns["diffbio"]["pipeline"]
    assert list(record["skipped"]) == [
        "batch correction: no batch key was given",
        "ambient removal: switched off",
        "UMAP: switched off",
    ]
    # the pipeline returned is the one that made the results
    chosen = adata.var["diffbio_highly_variable"].to_numpy()
    result, _, metadata = pipeline.apply({"counts": adata.X[:, chosen].toarray()}, {}, None)
    np.testing.assert_allclose(result["latent"], adata.obsm["X_diffbio_latent"], rtol=1e-4, atol=1e-5)
    assert not metadata
    with pytest.raises(ConfigError, match="did you mean 'latent_dim'"):
        tl.pipeline(adata, latentdim=3)
