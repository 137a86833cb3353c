import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score
from toy_cells import toy_cells

import diffbio
from diffbio import tl
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError
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


@pytest.mark.parametrize(("call", "said"), [
    (lambda a: tl.cluster(a, method="leiden"), "not available; this version has 'kmeans', 'communities'"),
    (lambda a: tl.embed(a, method="tsne"), "not available; this version has 'umap', 'phate'"),
    (lambda a: tl.cluster(a, method="communities", n_clusters=3), "n_clusters does nothing for method 'communities'"),
    (lambda a: tl.cluster(a, resolution=2.0), "resolution does nothing for method 'kmeans'"),
    (lambda a: tl.embed(a, t=3), "t does nothing for method 'umap'"),
    (lambda a: tl.embed(a, method="phate", min_dist=0.3), "min_dist does nothing for method 'phate'"),
    (lambda a: tl.integrate(a, batch_key="batch", method="mmd", theta=1.0), "theta does nothing for method 'mmd'"),
    (lambda a: tl.integrate(a, batch_key="batch", max_epochs=3), "max_epochs does nothing for method 'harmony'"),
    (lambda a: tl.simulate(a, n_genes=7), "n_genes does nothing for method 'like'"),
    (lambda a: tl.archetypes(a, n_components=-3), "n_components must be at least 1, or None for all, got -3"),
    (lambda a: tl.simulate(n_cellz=3), "unknown setting 'n_cellz'; known are .*n_groups"),
    (lambda a: tl.simulate(max_epochs=3), "max_epochs does nothing for method 'without `like`'"),
])  # fmt: skip
def test_what_would_do_nothing_is_refused_by_name(adata, call, said):
    with pytest.raises(ConfigError, match=said):
        call(adata)


@pytest.mark.parametrize("method", ["mmd", "wgan", "scvi"])
def test_integrate_trains_other_methods(adata, method):
    moved = tl.integrate(adata, batch_key="batch", method=method, n_latent=6, max_epochs=2, copy=True)
    found = moved.obsm["X_diffbio_integrated"]
    assert found.shape == (120, 6)
    assert np.isfinite(found).all()
    assert moved.uns["diffbio"]["integrate"]["params"]["method"] == method


def test_a_narrow_representation_is_integrated_as_it_is(adata):
    adata.obsm["X_narrow"] = np.log1p(adata.X[:, :4].toarray())
    moved = tl.integrate(adata, batch_key="batch", method="mmd", use_rep="X_narrow", max_epochs=1, copy=True)
    assert moved.obsm["X_diffbio_integrated"].shape == (120, 4)
    one = pytest.raises(DataError, match=r"'mmd' compares batches, and obs\['one'\] holds one")
    with one, pytest.warns(DataWarning, match="holds one value"):
        tl.integrate(adata, batch_key="one", method="mmd")


def test_communities_are_found_without_their_number(adata):
    grouped = tl.cluster(adata, method="communities", copy=True)
    assert adjusted_rand_score(adata.obs["cell_type"], grouped.obs["diffbio_cluster"]) > 0.9
    assert list(grouped.obs["diffbio_cluster"].cat.categories) == ["0", "1", "2"]
    np.testing.assert_allclose(grouped.obsm["diffbio_cluster_prob"].sum(axis=1), 1, atol=1e-5)
    finer = tl.cluster(adata, method="communities", resolution=4.0, copy=True)
    assert finer.obs["diffbio_cluster"].nunique() > 3


def test_phate_is_written_under_its_name(adata):
    drawn = tl.embed(adata, method="phate", n_neighbors=40, t=4, copy=True)
    assert drawn.obsm["X_diffbio_phate"].shape == (120, 2)
    spread = drawn.obsm["X_diffbio_phate"].std()
    kinds = adata.obs["cell_type"].to_numpy()
    within = np.mean([drawn.obsm["X_diffbio_phate"][kinds == k].std(axis=0).mean() for k in np.unique(kinds)])
    assert within < 0.5 * spread


def test_archetypes_and_their_genes(adata):
    mixed = tl.archetypes(adata, copy=True)
    weights, found = mixed.obsm["diffbio_archetype_weights"], mixed.uns["diffbio"]["diffbio_archetypes"]
    assert weights.shape == (120, 3)  # three types are three corners
    assert adjusted_rand_score(adata.obs["cell_type"], weights.argmax(axis=1)) > 0.9
    assert len(found["explained_by_number"]) == 10
    assert 0.5 < found["explained"] < 1
    raised, marked = mixed.varm["diffbio_archetype_genes"], mixed.varm["diffbio_archetype_qvalues"]
    assert raised.shape == marked.shape == (50, 3)
    assert (raised[marked < 0.01] > 0).all()
    assert (marked < 0.01).any(axis=0).all()


def test_simulated_cells_are_like_the_real_ones(adata, tmp_path):
    cells = tl.simulate(adata, n_cells=300, n_groups=3, max_epochs=0)
    assert list(cells.var_names) == list(adata.var_names)
    real, found = (np.log1p(x.toarray().mean(axis=0)) for x in (adata.X, cells.X))
    assert np.corrcoef(real, found)[0, 1] > 0.95
    depth, real_depth = (float(np.median(np.asarray(x.sum(axis=1)))) for x in (cells.X, adata.X))
    assert abs(depth / real_depth - 1) < 0.15
    dense = adata.copy()
    dense.X = dense.X.toarray()
    again = tl.simulate(dense, n_cells=300, n_groups=3, max_epochs=0)
    assert (again.X != cells.X).nnz == 0
    path = tl.simulate(adata, n_cells=300, n_groups=3, max_epochs=0, path=tmp_path / "cells.h5ad")
    written = diffbio.read(path)
    assert written.shape == (300, 50)
    assert written.uns["diffbio"]["simulate"]["params"]["n_groups"] == 3


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
