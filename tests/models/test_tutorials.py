"""The calls of scvi-tools' public tutorials, of which the import alone is changed.

Numbers of epochs are smaller, and the defaults are cut; the cells are made up.
"""

import anndata
import numpy as np
import pytest

from diffbio.errors import DataWarning
from diffbio.models import as_scvi as scvi
from diffbio.models import seeds
from diffbio.models.base import Model

from .conftest import cells


@pytest.fixture
def short(monkeypatch):
    """`train()` without max_epochs takes little time, and the seed is put back."""
    monkeypatch.setattr(Model, "_default_epochs", lambda self, n_cells: 3)
    yield
    seeds.settings.seed = None


def counts_layer(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    return adata


def test_introduction(short, tmp_path):
    """Setup, train, save, load, latent space, denoised expression, differential expression."""
    adata = counts_layer(cells())
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(
        adata, layer="counts", categorical_covariate_keys=["batch", "site"], continuous_covariate_keys=["age"]
    )
    model = scvi.model.SCVI(adata)
    assert "Training status: Not Trained" in str(model)
    model.train()
    model_dir = str(tmp_path / "scvi_model")
    model.save(model_dir, overwrite=True)
    model = scvi.model.SCVI.load(model_dir, adata=adata)
    adata.obsm["X_scVI"] = model.get_latent_representation()
    adata_subset = adata[adata.obs.cell_type == "type 0"].copy()
    latent_subset = model.get_latent_representation(adata_subset)
    expected = adata[adata.obs.cell_type == "type 0"].obsm["X_scVI"]
    np.testing.assert_allclose(latent_subset, expected, rtol=1e-4, atol=1e-5)
    denoised = model.get_normalized_expression(adata_subset, library_size=1e4)
    np.testing.assert_allclose(denoised.sum(axis=1), 1e4, rtol=1e-3)
    adata.layers["scvi_normalized"] = model.get_normalized_expression(library_size=10e4)
    de_df = model.differential_expression(groupby="cell_type", group1="type 0", group2="type 1")
    assert {"bayes_factor", "raw_normalized_mean1", "comparison"} <= set(de_df.columns)
    de_df = model.differential_expression(groupby="cell_type", mode="change")
    for c in adata.obs.cell_type.cat.categories:
        cell_type_df = de_df.loc[de_df.comparison == f"{c} vs Rest"]
        cell_type_df = cell_type_df[cell_type_df.lfc_mean > 0]
        cell_type_df = cell_type_df[cell_type_df["bayes_factor"] > 0]
        assert len(cell_type_df[cell_type_df["non_zeros_proportion1"] > 0.1]) > 0


def test_seed_labelling_and_integration(short):
    adata = counts_layer(cells())
    adata.obs["seed_labels"] = adata.obs["known"]
    scvi.model.SCVI.setup_anndata(adata, layer="counts", batch_key="batch", labels_key="seed_labels")
    scvi_model = scvi.model.SCVI(adata, n_layers=2, n_latent=30, gene_likelihood="nb")
    scvi_model.train(
        max_epochs=5, check_val_every_n_epoch=1, early_stopping=True, early_stopping_patience=20,
        early_stopping_monitor="elbo_validation", enable_progress_bar=False,
    )  # fmt: skip
    table = scvi_model.history["elbo_train"]
    table["elbo_validation"] = scvi_model.history["elbo_validation"]
    assert table.shape == (5, 2)
    scanvi_model = scvi.model.SCANVI.from_scvi_model(scvi_model, "Unknown")
    scanvi_model.train(2, check_val_every_n_epoch=1, train_size=0.7, plan_kwargs={"classification_ratio": 50})
    adata.obs["C_scANVI"] = scanvi_model.predict(adata)
    adata.obsm["X_scANVI"] = scanvi_model.get_latent_representation(adata)
    assert (adata.obs["C_scANVI"] == adata.obs["cell_type"]).mean() > 0.9
    # the curves that the tutorial on the classifier draws
    for metric in ("train_loss", "train_accuracy", "validation_accuracy", "validation_classification_loss"):
        assert scanvi_model.history[metric][metric].notna().all()


@pytest.mark.filterwarnings("ignore:.*genes have no count")
def test_reference_mapping(short, tmp_path):
    """scArches: a reference of one technology, a query of another, with genes missing."""
    everything = counts_layer(cells())
    is_query = (everything.obs["batch"] == "donor 1").to_numpy()
    adata_ref, adata_query = everything[~is_query].copy(), everything[is_query, :38].copy()
    scvi.model.SCVI.setup_anndata(adata_ref, batch_key="batch", layer="counts")
    scvi_ref = scvi.model.SCVI(
        adata_ref, use_layer_norm="both", use_batch_norm="none", encode_covariates=True, dropout_rate=0.2, n_layers=2
    )
    scvi_ref.train()
    scvi_ref_path = str(tmp_path / "scvi_ref")
    scvi_ref.save(scvi_ref_path, overwrite=True)
    with pytest.warns(DataWarning, match="2 of the model's 40 genes"):
        scvi.model.SCVI.prepare_query_anndata(adata_query, scvi_ref_path)
    scvi.model.SCVI.prepare_query_anndata(adata_query, scvi_ref)
    assert adata_query.shape[1] == 40
    scvi_query = scvi.model.SCVI.load_query_data(adata_query, scvi_ref_path)
    scvi_query.train(max_epochs=5, plan_kwargs={"weight_decay": 0.0})
    before = scvi_ref.get_latent_representation()
    np.testing.assert_allclose(scvi_query.get_latent_representation(adata_ref), before, rtol=1e-5, atol=1e-6)
    adata_full = anndata.concat([adata_query, adata_ref])
    adata_full.obsm["X_scVI"] = scvi_query.get_latent_representation(adata_full)

    adata_ref.obs["labels_scanvi"] = adata_ref.obs["cell_type"].values
    scanvi_ref = scvi.model.SCANVI.from_scvi_model(scvi_ref, unlabeled_category="Unknown", labels_key="labels_scanvi")
    scanvi_ref.train(max_epochs=2, n_samples_per_label=100)
    adata_query.obs["labels_scanvi"] = "Unknown"
    scanvi_query = scvi.model.SCANVI.load_query_data(adata_query, scanvi_ref)
    scanvi_query.train(max_epochs=2, plan_kwargs={"weight_decay": 0.0}, check_val_every_n_epoch=10)
    adata_query.obs["predictions_scanvi"] = scanvi_query.predict()
    adata_full.obs["predictions"] = scanvi_query.predict(anndata.concat([adata_query, adata_ref]))
    assert len(scanvi_query.predict(soft=True).columns) == 3


def test_differential_expression_by_cells(trained):
    """Comparisons by masks, with importance weights and without outliers."""
    adata = cells()
    cell_idx1 = adata.obs["cell_type"] == "type 0"
    cell_idx2 = adata.obs["cell_type"] == "type 1"
    uniform = trained.differential_expression(adata, idx1=cell_idx1, idx2=cell_idx2, mode="change", delta=0.25)
    weighted = trained.differential_expression(
        idx1=cell_idx1, idx2=cell_idx2, mode="change", weights="importance", filter_outlier_cells=True, silent=True,
        importance_weighting_kwargs={"n_mc_samples": 10, "max_cells": 40}, n_samples_overall=400,
    )  # fmt: skip
    both = uniform["lfc_median"].to_frame("uniform").join(weighted["lfc_median"].rename("weighted"))
    assert both.corr().iloc[0, 1] > 0.9
    assert list(weighted.columns) == list(uniform.columns)
