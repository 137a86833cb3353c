import numpy as np
import pytest

from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.models import SCANVI, SCVI
from diffbio.models.base import flat_state
from diffbio.models.surgery import one_hot_inputs
from diffbio.operators.base import to_numpy

from .conftest import cells

SETUP = {"batch_key": "batch", "categorical_covariate_keys": ["site", "one"], "labels_key": "known"}


def query():
    adata = cells()[:120].copy()
    adata.obs["batch"] = np.where(np.arange(120) % 2, "donor 0", "donor 7")
    adata.obs["site"] = np.where(np.arange(120) % 3, "east", "north")
    adata.obs["one"] = np.where(np.arange(120) % 5, "same", "different")
    return adata


@pytest.fixture(scope="module")
def reference():
    adata = cells()
    SCVI.setup_anndata(adata, **SETUP)
    model = SCVI(adata, n_hidden=12, n_latent=3, dispersion="gene-batch", gene_likelihood="nb", encode_covariates=True)
    model.train(max_epochs=2, batch_size=32, progress=False)
    return model


def test_the_query_starts_as_the_reference(reference):
    model = SCVI.load_query_data(query(), reference)
    assert model.registry.batches == ("donor 0", "donor 1", "donor 7")
    assert model.registry.categories == {"site": ("north", "south", "east"), "one": ("same", "different")}
    # covariates of known categories stay where they were, whatever was put between them
    z = reference.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(reference.adata), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.get_elbo(reference.adata), reference.get_elbo(), rtol=1e-5)
    theta = model.module.vae.decoder.log_theta[...]
    np.testing.assert_allclose(theta[2], theta[:2].mean(0), rtol=1e-6)


def test_training_moves_the_new_weights_alone(reference):
    model = SCVI.load_query_data(query(), reference)
    before = {name: to_numpy(leaf) for name, leaf in flat_state(model.module).items()}
    z, elbo = model.get_latent_representation(reference.adata), model.get_elbo(reference.adata)
    own = model.get_elbo()
    model.train(max_epochs=15, batch_size=20, plan_kwargs={"lr": 1e-2}, progress=False)
    np.testing.assert_array_equal(model.get_latent_representation(reference.adata), z)
    assert model.get_elbo(reference.adata) == elbo
    assert model.get_elbo() > own + 0.2
    inputs = one_hot_inputs(model.registry)
    new = [entry in {("batch", "donor 7"), ("site", "east"), ("one", "different")} for entry in inputs]
    for name, leaf in flat_state(model.module).items():
        changed = to_numpy(leaf) != before[name]
        if before[name].dtype.kind != "f":  # random streams
            continue
        if name.endswith("blocks/0/linear/kernel"):
            np.testing.assert_array_equal(changed.any(1)[-len(inputs) :], new)
            changed = changed[: -len(inputs)]
        if name.endswith("log_theta"):
            np.testing.assert_array_equal(changed.any(1), [False, False, True])
            continue
        assert not changed.any(), name


def test_unfrozen_moves_everything(reference):
    model = SCVI.load_query_data(query(), reference, unfrozen=True)
    z = model.get_latent_representation(reference.adata)
    model.train(max_epochs=1, progress=False)
    assert np.abs(model.get_latent_representation(reference.adata) - z).max() > 1e-4


def test_a_query_without_news_has_nothing_to_train(reference):
    model = SCVI.load_query_data(reference.adata[:50].copy(), reference)
    with pytest.raises(ConfigError, match="nothing to train"):
        model.train()


def test_a_saved_query_stays_frozen(reference, tmp_path):
    data = query()
    folder = SCVI.load_query_data(data, reference).save(tmp_path / "query")
    model = SCVI.load(folder, adata=data)
    z = model.get_latent_representation(reference.adata)
    model.train(max_epochs=1, progress=False)
    np.testing.assert_array_equal(model.get_latent_representation(reference.adata), z)


def test_labels_go_to_a_new_batch_with_missing_genes(annotated, tmp_path):
    data = cells()[:150].copy()
    data.obs["batch"] = "donor 7"
    truth = data.obs["cell_type"].astype(str).to_numpy()
    del data.obs["known"], data.obs["cell_type"]
    data = data[:, 3:][:, ::-1].copy()
    folder = annotated.save(tmp_path / "reference")
    with pytest.warns(DataWarning, match="3 of the model's 40 genes are missing"):
        model = SCANVI.load_query_data(data, folder)
    z = annotated.get_latent_representation()
    model.train(max_epochs=3, progress=False)
    np.testing.assert_array_equal(model.get_latent_representation(annotated.adata), z)
    assert (model.predict() == truth).mean() > 0.9


@pytest.fixture(scope="module")
def two_types():
    data = cells()[:200]
    data = data[data.obs["cell_type"].astype(str) != "type 2"].copy()
    data.obs["batch"] = "donor 7"
    del data.obs["known"]
    return data


def test_the_classifier_adapts_to_the_new_batch_alone(annotated, two_types, tmp_path):
    folder = annotated.save(tmp_path / "reference")
    before = annotated.predict(soft=True)
    model = SCANVI.load_query_data(two_types, folder)
    plain = model.predict(soft=True)
    own = to_numpy(model.module.classifier.by_batch)
    model.train(max_epochs=1, progress=False)
    np.testing.assert_array_equal(model.predict(annotated.adata, soft=True), before)
    new = to_numpy(model.module.classifier.by_batch)
    np.testing.assert_array_equal(new[:2], own[:2])
    assert not own[2].any()
    assert np.abs(new[2, -1]).min() > 0.01
    assert not new[2, :-1].any()  # the shift of a linear classifier is an intercept
    adapted = model.predict(soft=True)
    assert adapted["type 2"].sum() < plain["type 2"].sum()  # no cell of the query is of this type
    again = SCANVI.load(model.save(tmp_path / "query"), adata=two_types)
    np.testing.assert_array_equal(again.predict(soft=True), adapted)
    again.train(max_epochs=1, progress=False)
    np.testing.assert_allclose(again.predict(soft=True), adapted, atol=1e-6)


def test_the_classifier_stays_where_it_is_asked_to_or_unsure(annotated, two_types, monkeypatch):
    model = SCANVI.load_query_data(two_types, annotated)
    plain = model.predict(soft=True)
    model.train(max_epochs=1, progress=False)
    assert not np.array_equal(model.predict(soft=True), plain)
    model.train(max_epochs=1, progress=False, adapt_classifier=False)
    np.testing.assert_array_equal(model.predict(soft=True), plain)  # the encoder is not told the batch
    monkeypatch.setattr("diffbio.nn.class_fit.LEAST_CONFIDENCE", 1.01)
    with pytest.warns(DataWarning, match="not adapted to batch 'donor 7'"):
        model.train(max_epochs=1, progress=False)
    np.testing.assert_array_equal(model.predict(soft=True), plain)


def test_too_many_missing_genes_or_another_model_are_refused(annotated, reference):
    with pytest.raises(DataError, match="12 of the model's 40 genes are missing"):
        SCVI.load_query_data(query()[:, 12:].copy(), reference)
    with pytest.raises(ConfigError, match="reference_model is of class SCANVI, not SCVI"):
        SCVI.load_query_data(query(), annotated)


def test_prepare_query_pads_and_sorts(reference):
    data = query()[:, ::-1].copy()
    data.var["symbol"] = data.var_names
    short = data[:, 2:].copy()
    with pytest.warns(DataWarning, match="2 of the model's 40 genes"):
        padded = SCVI.prepare_query_anndata(short, reference, inplace=False)
    assert short.n_vars == 38
    assert list(padded.var_names) == list(reference.adata.var_names)
    assert (padded.X.toarray()[:, -2:] == 0).all()
    np.testing.assert_array_equal(padded.X.toarray()[:, :38], query().X.toarray()[:, :38])
    with pytest.warns(DataWarning, match="2 of the model's 40 genes"):
        assert SCVI.prepare_query_anndata(short, reference) is None
    assert list(short.var_names) == list(reference.adata.var_names)
    assert short.obs.equals(padded.obs)
    names = SCVI.prepare_query_anndata(short, reference, return_reference_var_names=True)
    assert list(names) == list(reference.adata.var_names)


def test_a_latent_library_takes_the_prior_of_the_new_batch():
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_hidden=8, use_observed_lib_size=False)
    data = query()
    made = SCVI.load_query_data(data, model)
    mean, _ = made.library_prior
    np.testing.assert_array_equal(mean[:2], model.library_prior[0])
    own = np.log(data.X.toarray().sum(1))[data.obs["batch"] == "donor 7"].mean()
    np.testing.assert_allclose(mean[2], own, rtol=1e-5)
