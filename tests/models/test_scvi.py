import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from diffbio.errors import ConfigError, DataError, ModelFileError, OutputError
from diffbio.models import SCANVI, SCVI
from diffbio.models.cells import LATENT_MEAN
from diffbio.models.defaults import default_batch_size
from diffbio.models.training import Trainee, _rate, plan_of, start_told, told_rows
from diffbio.train import split

from .conftest import cells


def small(**arguments):
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch")
    return SCVI(adata, **{"n_hidden": 8, "n_latent": 2, "gene_likelihood": "nb", **arguments})


def test_training_raises_the_held_out_bound_and_keeps_the_best(trained):
    table = trained.history["elbo_validation"]
    assert table["elbo_validation"].iloc[-1] < table["elbo_validation"].iloc[0] - 3
    best = trained.training_history.best_epoch
    assert best == trained.history["validation_loss"]["validation_loss"].to_numpy().argmin()
    elbo = trained.get_elbo(indices=trained.validation_indices)
    np.testing.assert_allclose(-elbo, table["elbo_validation"].iloc[best], rtol=0.02)
    assert len(trained.train_indices) + len(trained.validation_indices) == 300
    assert trained.is_trained
    assert "Training status: Trained" in repr(trained)


def test_every_cell_is_trained_on_when_asked():
    model = small()
    model.train(max_epochs=1, batch_size=32, train_size=1.0, progress=False)
    assert len(model.train_indices) == 300
    assert model.validation_indices is None


def test_same_seed_same_weights_other_seed_others():
    z = []
    for seed in (0, 0, 1):
        model = small(seed=seed)
        model.train(max_epochs=1, batch_size=32, progress=False)
        z.append(model.get_latent_representation())
    np.testing.assert_array_equal(z[0], z[1])
    assert np.abs(z[0] - z[2]).max() > 0.01


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    z = []
    for stops in ((4,), (2, 4)):
        model = small()
        for epochs in stops:
            model.train(
                max_epochs=epochs, batch_size=32, checkpoint=tmp_path / f"run{len(stops)}", resume=True, progress=False,
                plan_kwargs={"n_epochs_kl_warmup": 2, "lr_schedule": "constant", "lr_warmup": 0},
            )
        z.append(model.get_latent_representation())
    np.testing.assert_array_equal(*z)


def test_plan():
    adam = {**SCVI.fit_defaults}
    plan = plan_of(adam, {"n_epochs_kl_warmup": 10, "max_kl_weight": 0.5}, max_epochs=100, steps_per_epoch=4)
    kl = plan.schedules["kl_weight"]
    np.testing.assert_allclose([kl(0.0), kl(5.0), kl(10.0), kl(np.inf)], [0, 0.25, 0.5, 0.5])
    steps = plan_of(adam, {"n_steps_kl_warmup": 8}, max_epochs=100, steps_per_epoch=4).schedules["kl_weight"]
    np.testing.assert_allclose([steps(1.0), steps(3.0)], [0.5, 1.0])
    short = plan_of(adam, None, max_epochs=8, steps_per_epoch=4).schedules["kl_weight"]
    np.testing.assert_allclose(short(2.0), 1.0)  # the default warm-up ends before training does
    given = optax.sgd(0.1)
    assert plan_of(adam, {"optimizer": given}, max_epochs=8, steps_per_epoch=4).optimizer is given
    params = split(Trainee(small().module, config="", only_new=False))[1]
    nothing = jax.tree.map(jnp.zeros_like, params)
    for optimizer in ("Adam", "AdamW"):
        for matrices_only in (True, False):
            asked = {"optimizer": optimizer, "weight_decay": 0.5, "decay_matrices_only": matrices_only}
            still = plan_of(adam, asked, max_epochs=8, steps_per_epoch=4).optimizer
            updates, _ = still.update(nothing, still.init(params), params)
            moved = {path[-1]: bool(jnp.any(leaf[...] != 0)) for path, leaf in nnx.to_flat_state(updates)}
            assert moved["kernel"]  # the decay pulls without a gradient
            assert moved["scale"] is not matrices_only


@pytest.mark.parametrize(("deep", "n_layers", "free"), [(True, 1, [0]), (True, 2, [0, 1]), (False, 2, [0])])
def test_no_decay_of_what_the_decoder_is_told(deep, n_layers, free):
    model = small(deeply_inject_covariates=deep, n_layers=n_layers, encode_covariates=True)
    params = split(Trainee(model.module, config="", only_new=False))[1]
    nothing = jax.tree.map(jnp.zeros_like, params)
    n_told = model.module.vae.decoder.network.n_covariates
    assert n_told > 1
    for optimizer in ("Adam", "AdamW"):
        asked = {"optimizer": optimizer, "weight_decay": 0.5, "lr_warmup": 0}
        plan = plan_of(
            SCVI.fit_defaults, asked, max_epochs=8, steps_per_epoch=4, told=told_rows(model.module)
        ).optimizer
        updates = dict(nnx.to_flat_state(plan.update(nothing, plan.init(params), params)[0]))
        for path, update in updates.items():
            if path[-1] != "kernel":
                continue
            still = ~np.asarray(update[...] != 0).any(1)
            is_free = path[:5] == ("module", "vae", "decoder", "network", "blocks") and path[5] in free
            assert still.sum() == (n_told if is_free else 0)
            assert not is_free or still[-n_told:].all()


def test_the_encoder_decays_less():
    module = small().module
    params = split(Trainee(module, config="", only_new=False))[1]
    nothing = jax.tree.map(jnp.zeros_like, params)
    asked = {"weight_decay": 0.5, "encoder_decay": 0.1, "lr": 1.0, "lr_warmup": 0, "lr_schedule": "constant"}
    plan = plan_of(SCVI.fit_defaults, asked, max_epochs=8, steps_per_epoch=4, told=told_rows(module)).optimizer
    updates = dict(nnx.to_flat_state(plan.update(nothing, plan.init(params), params)[0]))
    for part, share in (("encoder", 0.1), ("decoder", 1.0)):
        head = {"encoder": "mean", "decoder": "fraction"}[part]
        kernel = np.asarray(getattr(getattr(module.vae, part), head).kernel[...])
        update = np.asarray(updates["module", "vae", part, head, "kernel"][...])
        np.testing.assert_allclose(update, -0.5 * share * kernel, rtol=1e-5)
    with pytest.raises(ConfigError, match="encoder_decay must be at least 0"):
        plan_of(SCVI.fit_defaults, {"encoder_decay": -1.0}, max_epochs=8, steps_per_epoch=4)


def test_few_cells_come_in_smaller_minibatches():
    assert [default_batch_size(n, 128) for n in (300, 999, 1_000, 10**6)] == [64, 64, 128, 128]
    model = small()
    model.train(max_epochs=1, progress=False)
    assert model.training_history.rows[0]["good_steps"] == 270 // 64


def test_batches_start_as_heard_as_z():
    model, other = small(n_latent=4, seed=1), small(n_latent=4, seed=1)
    start_told(model.module)
    kernel, before = (np.asarray(m.module.vae.decoder.network.blocks[0].linear.kernel[...]) for m in (model, other))
    np.testing.assert_array_equal(kernel[:4], before[:4])
    np.testing.assert_allclose(kernel[4:], 2 * before[4:], rtol=1e-6)
    other.train(max_epochs=1, batch_size=32, progress=False, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0})
    started = np.asarray(other.module.vae.decoder.network.blocks[0].linear.kernel[...])
    np.testing.assert_allclose(started, kernel, atol=1e-6)
    other.train(max_epochs=1, batch_size=32, progress=False, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0})
    again = np.asarray(other.module.vae.decoder.network.blocks[0].linear.kernel[...])
    np.testing.assert_allclose(again, kernel, atol=1e-6)  # what has been trained is not started anew


def test_a_run_that_diverged_does_not_scale_the_weights_twice():
    model = small(n_latent=4, seed=1)
    kernels = []
    for _ in range(2):
        model._start_from(np.arange(50), 0)
        kernels.append(np.asarray(model.module.vae.decoder.network.blocks[0].linear.kernel[...]))
    np.testing.assert_array_equal(*kernels)


def test_learning_rate():
    asked = {"lr": 1.0, "lr_warmup": 0.1}
    rate = _rate({**SCVI.fit_defaults, **asked, "lr_schedule": "cosine"}, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 55, 100)], [0.1, 0.55, 1, 0.5, 0], atol=1e-6)
    rate = _rate({**SCVI.fit_defaults, **asked, "lr_schedule": "constant", "lr_warmup": 0}, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 99)], 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plan_kwargs": {"momentum": 1}}, "unknown plan_kwargs .'momentum'."),
        ({"plan_kwargs": {"classification_ratio": 1}}, "unknown plan_kwargs"),
        ({"plan_kwargs": {"optimizer": "SGD"}}, "optimizer must be"),
        ({"plan_kwargs": {"lr": 0}}, "lr must be above 0"),
        ({"plan_kwargs": {"lr_schedule": "steps"}}, "lr_schedule must be"),
        ({"train_size": 0}, "train_size must be"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"early_stopping_patience": 0}, "patience"),
    ],
)
def test_bad_training_arguments_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        small().train(**arguments)


def test_bad_model_arguments_are_refused():
    with pytest.raises(ConfigError, match="dispersion"):
        small(dispersion="cell")
    with pytest.raises(ConfigError, match="pass the AnnData"):
        SCVI()


def test_many_cells_get_fewer_epochs():
    model = small()
    epochs = [model._default_epochs(n) for n in (1000, 20_000, 200_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > 10 * epochs[2]


def test_saved_models_load_without_data_and_answer_the_same(trained, tmp_path):
    folder = trained.save(tmp_path / "model")
    assert {p.name for p in folder.iterdir()} == {"model.json", "weights.safetensors"}
    assert json.loads((folder / "model.json").read_text())["model"] == "SCVI"
    assert "module/vae/encoder/mean/kernel" in load_file(folder / "weights.safetensors")
    alone = SCVI.load(folder)
    assert alone.is_trained
    with pytest.raises(DataError, match="loaded without data"):
        alone.get_elbo()
    z = trained.get_latent_representation()
    np.testing.assert_array_equal(alone.get_latent_representation(trained.adata), z)
    model = SCVI.load(folder, adata=trained.adata)
    np.testing.assert_array_equal(model.get_latent_representation(), z)
    assert model.history["elbo_train"].equals(trained.history["elbo_train"])
    np.testing.assert_array_equal(model.validation_indices, trained.validation_indices)
    model.train(max_epochs=1, batch_size=32, progress=False)  # and goes on


def test_load_refuses_what_is_not_the_model(trained, tmp_path):
    folder = trained.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="overwrite=True"):
        trained.save(folder)
    trained.save(folder, overwrite=True)
    with pytest.raises(ModelFileError, match="holds 'SCVI', not SCANVI"):
        SCANVI.load(folder)
    with pytest.raises(DataError, match="30 of the model's 40"):
        SCVI.load(folder, adata=trained.adata[:, :30].copy())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a diffbio model"):
        trained.save(tmp_path / "notes.txt", overwrite=True)
    header = json.loads((folder / "model.json").read_text())
    header["init_params"]["n_latent"] = 7
    (folder / "model.json").write_text(json.dumps(header))
    with pytest.raises(ModelFileError, match="damaged or was edited"):
        SCVI.load(folder)
    del header["sha256"]["model.json"]
    (folder / "model.json").write_text(json.dumps(header))
    with pytest.raises(ModelFileError, match="does not fit SCVI"):
        SCVI.load(folder)


def test_minified_data_answer_what_needs_no_counts(trained, tmp_path):
    folder = trained.save(tmp_path / "model")
    model = SCVI.load(folder, adata=trained.adata)
    full = model.adata
    model.minify_adata()
    assert model.minified_data_type == "latent_posterior_parameters"
    assert full.X.nnz > 0
    assert model.adata.X.nnz == 0
    np.testing.assert_array_equal(model.adata.obsm[LATENT_MEAN], trained.get_latent_representation())
    np.testing.assert_array_equal(model.get_latent_representation(), trained.get_latent_representation())
    for library in (1, "latent"):
        np.testing.assert_allclose(
            model.get_normalized_expression(library_size=library, return_numpy=True),
            trained.get_normalized_expression(library_size=library, return_numpy=True), rtol=1e-3,
        )
    np.testing.assert_allclose(model.get_latent_library_size(), trained.get_latent_library_size())
    assert model.posterior_predictive_sample().shape == (300, 40)
    for method in ("get_elbo", "get_reconstruction_error", "get_marginal_ll", "train", "minify_adata"):
        with pytest.raises(DataError, match=rf"{method} needs the counts, but the data are minified"):
            getattr(model, method)()
    with pytest.raises(DataError, match="pass all_stats=False"):
        model.differential_expression(groupby="cell_type")
    assert len(model.differential_expression(groupby="cell_type", all_stats=False, n_samples_overall=50)) == 120
    assert model.get_elbo(full) == trained.get_elbo()  # other data may have counts
    model.adata.write_h5ad(tmp_path / "small.h5ad")
    import anndata as ad

    again = SCVI.load(folder, adata=ad.read_h5ad(tmp_path / "small.h5ad"))
    np.testing.assert_array_equal(again.get_latent_representation(), trained.get_latent_representation())
    with pytest.raises(DataError, match="minified"):
        SCVI.setup_anndata(model.adata)
