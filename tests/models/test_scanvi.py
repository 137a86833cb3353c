import signal

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from diffbio import train as train_module
from diffbio.errors import ConfigError, DataError, DataWarning, TrainingInterrupted
from diffbio.models import SCANVI, SCVI, posterior
from diffbio.models.base import flat_state
from diffbio.models.calibration import expected_calibration_error
from diffbio.models.cells import LabelledBeside
from diffbio.nn.class_fit import best_temperature, folded_temperature

from .conftest import cells


def accuracy(model, answers, mask=slice(None)):
    return (answers == model.adata.obs["cell_type"].astype(str).to_numpy())[mask].mean()


def test_the_start_is_the_scvi_model(trained):
    model = SCANVI.from_scvi_model(trained, "Unknown")
    model.is_trained = True
    np.testing.assert_allclose(model.get_latent_representation(), trained.get_latent_representation(), rtol=1e-5)
    mine = model.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(mine, trained.get_normalized_expression(return_numpy=True), rtol=1e-4)
    assert model.registry.labels == ("type 0", "type 1", "type 2")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [({"n_hidden": 3}, ConfigError, "as in the SCVI model"), ({"labels_key": "type"}, DataError, "no column 'type'")],
)
def test_from_scvi_model_refuses(trained, arguments, error, words):
    with pytest.raises(error, match=words):
        SCANVI.from_scvi_model(trained, "Unknown", **arguments)


def test_labels_are_needed():
    adata = cells()
    SCVI.setup_anndata(adata)
    with pytest.raises(DataError, match="pass labels_key="):
        SCANVI.from_scvi_model(SCVI(adata, n_hidden=8), "Unknown")


def test_unlabelled_cells_are_found(annotated):
    unknown = (annotated.adata.obs["known"] == "Unknown").to_numpy()
    assert accuracy(annotated, annotated.predict(), unknown) > 0.9
    soft = annotated.predict(soft=True)
    assert list(soft.columns) == ["type 0", "type 1", "type 2"]
    assert list(soft.index) == list(annotated.adata.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    assert (soft.idxmax(axis=1).to_numpy() == annotated.predict()).all()
    few = annotated.predict(indices=[4, 8], soft=True)
    np.testing.assert_allclose(few, soft.iloc[[4, 8]], rtol=1e-4)
    drawn = annotated.predict(use_posterior_mean=False, soft=True)
    assert np.abs(drawn - soft).to_numpy().max() > 1e-4
    assert {"validation_accuracy", "validation_classification_loss", "elbo_train"} <= set(annotated.history)


def test_unknown_is_an_answer(annotated):
    soft = annotated.predict(soft=True).max(axis=1).to_numpy()
    least = float(np.median(soft))
    answers = annotated.predict(min_confidence=least)
    np.testing.assert_array_equal(answers == "unknown", soft < least)
    with pytest.raises(ConfigError, match="min_confidence"):
        annotated.predict(min_confidence=1.5)
    with pytest.raises(ConfigError, match="min_confidence is for the answers of soft=False"):
        annotated.predict(soft=True, min_confidence=0.5)


def test_calibration_uses_labels_training_has_not_seen(annotated):
    known = (annotated.adata.obs["known"] != "Unknown").to_numpy()
    held = annotated.held_out_labels
    assert len(held) >= annotated.fit_defaults["least_held_out_labels"]
    assert known[held].all()
    assert not set(held) & set(annotated.train_indices)
    assert annotated.temperature != 1.0
    assert 0 <= annotated.calibration_error() < 0.3
    assert 0 <= annotated.calibration_error(indices=np.arange(100)) < 0.3
    with pytest.raises(DataError, match="labelled cells"):
        annotated.calibration_error(indices=np.flatnonzero(~known))


def test_temperature_undoes_what_was_multiplied():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(4000, 3))
    p = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    labels = (rng.random((4000, 1)) > p.cumsum(1)).sum(1)

    def loss(temperature):
        scaled = 3 * logits / temperature
        return (logsumexp(scaled, axis=1) - scaled[np.arange(4000), labels]).sum()

    assert abs(best_temperature(loss) - 3) < 0.2
    assert expected_calibration_error(p, labels) < 0.03
    sure = np.exp(3 * logits - logsumexp(3 * logits, axis=1, keepdims=True))
    assert expected_calibration_error(sure, labels) > 0.1


def test_few_labels_are_all_trained_on(trained):
    adata = trained.adata.copy()
    rows = np.r_[0:12]
    adata.obs["few"] = "Unknown"
    adata.obs.loc[adata.obs_names[rows], "few"] = adata.obs["cell_type"].astype(str).iloc[rows]
    model = SCANVI.from_scvi_model(trained, "Unknown", labels_key="few", adata=adata)
    model.train(max_epochs=2, batch_size=32, n_samples_per_label=3, progress=False)
    assert len(model.held_out_labels) == 0
    # calibrated by folds in the latent space of SCVI, which has not seen the labels
    columns = model.cells().columns
    z, labels = trained.get_latent_representation(), np.where(columns["labels"] < 3, columns["labels"], -1)
    wanted = folded_temperature(z, labels, 3, columns["batch_labels"], 2)
    np.testing.assert_allclose(model.temperature, wanted, rtol=1e-3)
    assert wanted != 1.0
    model.train(max_epochs=1, batch_size=32, progress=False)  # now the latent space has
    np.testing.assert_allclose(model.temperature, wanted, rtol=1e-3)
    with pytest.raises(DataError, match="no labelled cells were held out"):
        model.calibration_error()


def test_a_run_that_goes_on_after_a_signal_keeps_its_calibration(trained, tmp_path):
    adata = trained.adata.copy()
    adata.obs["few"] = np.where(np.arange(adata.n_obs) < 12, adata.obs["cell_type"].astype(str), "Unknown")

    def model():
        return SCANVI.from_scvi_model(trained, "Unknown", labels_key="few", adata=adata)

    def go_on(model, **more):
        model.train(max_epochs=4, batch_size=32, progress=False, checkpoint=tmp_path / "run", **more)

    at_once, stopped = model(), model()
    at_once.train(max_epochs=4, batch_size=32, progress=False)
    original = train_module.Progress.step

    def interrupted(self, epoch, step, *rest):
        if epoch == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, epoch, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.Progress, "step", interrupted)
        with pytest.raises(TrainingInterrupted):
            go_on(stopped)
    go_on(stopped, resume=True)
    assert stopped.temperature == at_once.temperature
    np.testing.assert_array_equal(stopped.predict(soft=True), at_once.predict(soft=True))


def test_labelled_cells_beside_a_batch_depend_on_the_batch_and_the_seed_alone(annotated):
    labels = annotated.cells().columns["labels"]
    known = np.flatnonzero(labels < 3)
    held_out, seen = known[::10], np.setdiff1d(known, known[::10])

    def beside(**how):
        arguments = {"held_out": held_out, "labelled_held_out": held_out, "n_samples_per_label": None, "seed": 0, **how}
        return LabelledBeside(annotated.cells(), seen, **arguments)

    rows = np.setdiff1d(np.arange(300), held_out)[:32]
    picked = beside().picked(rows)
    np.testing.assert_array_equal(picked, beside().picked(rows))
    assert len(set(picked)) == 32
    assert set(picked) <= set(seen)
    assert set(picked) != set(beside(seed=1).picked(rows))
    assert set(picked) != set(beside().picked(rows[::-1]))
    assert set(beside().picked(held_out)) == set(held_out)
    even = beside(n_samples_per_label=5).picked(rows)
    np.testing.assert_array_equal(np.bincount(labels[even]), [5, 5, 5])
    batch = beside(labelled_held_out=np.empty(0, int)).take(held_out)
    assert (batch["labelled_labels"] >= 3).all()  # validation without labels
    batch = beside().take_sparse(rows)
    np.testing.assert_array_equal(batch["labelled_labels"], labels[picked])
    np.testing.assert_array_equal(batch["labelled_counts"].dense(), annotated.adata.X[picked].toarray())


def test_a_resumed_run_is_the_same(trained, tmp_path):
    answers = []
    for stops in ((3,), (1, 3)):
        model = SCANVI.from_scvi_model(trained, "Unknown")
        for epochs in stops:
            model.train(
                epochs, batch_size=32, checkpoint=tmp_path / f"run{len(stops)}", resume=True, progress=False,
                plan_kwargs={"lr_schedule": "constant", "lr_warmup": 0},
            )
        answers.append(model.predict(soft=True).to_numpy())
    np.testing.assert_array_equal(*answers)


def test_save_and_load(annotated, tmp_path):
    folder = annotated.save(tmp_path / "model")
    model = SCANVI.load(folder, adata=annotated.adata)
    np.testing.assert_array_equal(model.predict(soft=True), annotated.predict(soft=True))
    np.testing.assert_array_equal(model.held_out_labels, annotated.held_out_labels)
    assert model.was_pretrained
    assert model.temperature == annotated.temperature
    model.minify_adata()
    np.testing.assert_allclose(model.predict(soft=True), annotated.predict(soft=True), rtol=1e-4)


def test_prior_of_z_is_what_the_generative_model_draws(annotated):
    """p(z) by importance sampling from q(u | z, c), and by plain Monte Carlo from p(u), p(c)."""
    import jax
    import jax.numpy as jnp

    module = annotated.module
    z = jnp.asarray(annotated.get_latent_representation(indices=np.arange(6)))
    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.jit(jax.vmap(lambda key: posterior.log_prior(module, z, key)))(keys)
    found = logsumexp(draws, axis=(0, 2)) - np.log(400)
    u = jax.random.normal(jax.random.key(1), (60_000, 4))
    parts = []
    for code in range(3):
        p = module.decoder_z1_z2(u, jnp.broadcast_to(jnp.eye(3)[code], (60_000, 3)))
        log_p = norm.logpdf(np.asarray(z)[:, None], p.mean, np.exp(0.5 * p.logvar)).sum(-1)
        parts.append(logsumexp(log_p, axis=1) - np.log(60_000))
    wanted = logsumexp(parts, axis=0) - np.log(3)
    np.testing.assert_allclose(found, wanted, atol=0.25)
    assert annotated.get_elbo() < annotated.get_marginal_ll(n_mc_samples=50)


def test_settings_of_the_classifier_reach_it():
    adata = cells()
    SCANVI.setup_anndata(adata, "known", "Unknown", batch_key="batch")
    linear = SCANVI(adata, n_hidden=8, linear_classifier=True, dispersion="gene-label", gene_likelihood="nb")
    names = [name for name in flat_state(linear.module) if name.startswith("classifier/network")]
    assert not any("kernel" in name for name in names)
    linear.train(max_epochs=1, batch_size=64, progress=False)
    assert linear.get_normalized_expression().shape == (300, 40)
    grouped = SCANVI(
        adata, n_hidden=8, linear_classifier=False, labels_groups=[0, 0, 1], use_labels_groups=True,
        y_prior=[0.2, 0.3, 0.5],
        classifier_parameters={"n_hidden": 5},
    )
    assert grouped.module.classifier_groups.logits.kernel.shape == (5, 2)
    with pytest.raises(ConfigError, match="n_samples_per_label"):
        linear.train(1, n_samples_per_label=0)


def test_from_scvi_keeps_the_dispersion_of_every_type():
    adata = cells()
    SCVI.setup_anndata(adata, labels_key="known")
    model = SCVI(adata, n_hidden=8, dispersion="gene-label")
    theta = np.arange(4 * 40, dtype=np.float32).reshape(4, 40)
    model.module.vae.decoder.log_theta.set_value(theta)
    assert model.registry.labels[0] == "Unknown"
    with pytest.warns(DataWarning, match="the SCVI model is not trained"):
        made = SCANVI.from_scvi_model(model, "Unknown")
    np.testing.assert_array_equal(made.module.vae.decoder.log_theta[...], theta[1:])
