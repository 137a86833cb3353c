"""scvi-tools' signatures are ours, and what has no counterpart is refused with what takes its place."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from diffbio.errors import ConfigError, DataError, DataWarning, ModelFileError
from diffbio.models import SCANVI, SCVI
from diffbio.models import as_scvi as scvi
from diffbio.models.base import flat_state
from diffbio.models.peer import ELSEWHERE, devices_of
from diffbio.models.training import OWN_ARGUMENTS, run_of
from diffbio.operators.base import to_numpy

from .conftest import cells

# names of scvi-tools 1.4.2, read off its classes
PUBLISHED = json.loads((Path(__file__).parents[1] / "oracles" / "scvi_tools_signatures.json").read_text())


def test_every_verb_has_the_published_arguments_in_their_order():
    for verb, names in PUBLISHED.items():
        model, name = verb.split(".")
        method = getattr({"SCVI": SCVI, "SCANVI": SCANVI}[model], name, None)
        if method is None:
            assert name in ELSEWHERE, verb
            continue
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        ours = [p.name for p in inspect.signature(method).parameters.values() if p.kind is kind and p.name != "self"]
        assert ours[: len(names)] == names, verb


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.train(accelerator="tpu"), "accelerator='tpu', but JAX computes on"),
        (lambda m: m.train(devices=[7]), "JAX sees 1, numbered from 0"),
        (lambda m: m.train(devices="all"), "devices must be 'auto'"),
        (lambda m: m.train(callbacks=[1]), "callbacks=.1. is of scvi-tools .* early_stopping="),
        (lambda m: m.train(use_gpu=True), "use_gpu=True is of scvi-tools"),
        (lambda m: m.train(trainer_config={"max_steps": 9}), "max_steps=9 .* pass max_epochs="),
        (lambda m: m.train(epochs=9), "unknown argument epochs=9"),
        (lambda m: m.train(early_stopping_monitor="kl_local_validation"), "training stops by validation_loss"),
        (lambda m: m.train(early_stopping_mode="max"), "leave it at 'min'"),
        (lambda m: m.train(check_val_every_n_epoch=0), "check_val_every_n_epoch must be"),
        (lambda m: m.train(datasplitter_kwargs={"pin_memory": True}), "pass train_size="),
        (lambda m: m.train(plan_kwargs={"reduce_lr_on_plateau": True}), "lr_schedule='cosine'"),
        (lambda m: m.train(plan_config={"lr_patience": 3}), "lr_patience=3 .* lr_schedule='cosine'"),
        (lambda m: m.train(plan_config=[1]), "plan_config must be a dict"),
        (lambda m: m.train(train_size=0.9, validation_size=0.2), "at most 1 - train_size"),
        (lambda m: m.train(datamodule=1), "set up an AnnData"),
        (lambda m: m.train(resume=True), "resume=True needs checkpoint="),
        (lambda m: m.get_elbo(dataloader=1), "pass adata="),
        (lambda m: m.get_elbo(batch_size=-1), "batch_size must be at least 1"),
        (lambda m: m.get_marginal_ll(n_mc_samples=0), "n_mc_samples must be at least 1"),
        (lambda m: m.get_latent_representation(give_mean=False, mc_samples=0), "mc_samples must be at least 1"),
        (lambda m: m.get_normalized_expression(weights="importance"), "needs n_samples_overall"),
        (lambda m: m.get_normalized_expression(n_samples=2, n_samples_overall=3), "or n_samples_overall"),
        (lambda m: m.get_normalized_expression(n_samples_overall=3, max_cells=4), "concern weights='importance'"),
        (lambda m: m.get_normalized_expression(foo=4), "unknown arguments .'foo'."),
        (
            lambda m: m.get_normalized_expression(
                transform_batch=["donor 0", "donor 1"], n_samples_overall=3, weights="importance"
            ),
            "one transform_batch",
        ),
        (lambda m: m.differential_expression(groupby="site", weights="even"), "'uniform' or 'importance'"),
        (lambda m: m.differential_expression(groupby="site", change_fn=np.subtract), "read by mode='change'"),
        (lambda m: m.differential_abundance(), "pass sample_key="),
        (lambda m: m.get_aggregated_posterior(dof=0), "dof must be above 0"),
        (lambda m: m.save("nowhere", "prefix"), "a folder of its own"),
        (lambda m: m.save("nowhere", compression="gzip"), "concern save_anndata=True"),
        (lambda m: SCVI.load("nowhere", backup_url="https://example.org"), "download the folder first"),
        (lambda m: SCVI.load_query_data(m.adata), "pass adata=, the query, and reference_model="),
        (lambda m: SCVI.load_query_data(m.adata, m, device="cuda:0"), "devices must be"),
        (lambda m: SCVI.setup_anndata(m.adata, batch="site"), "unknown argument batch='site'"),
        (lambda m: SCVI(m.adata, latent_distribution="ln"), "'normal' is the one there is"),
        (lambda m: SCVI(m.adata, n_hiden=3), "unknown argument n_hiden=3"),
        (lambda m: SCVI(m.adata, gene_likelihood="normal"), "gene_likelihood must be one of"),
        (lambda m: SCANVI.from_scvi_model(m.adata, "Unknown"), "must be a diffbio.models.SCVI, got AnnData"),
        (lambda m: m.minify_adata("latent_posterior_parameters_with_counts"), "needs none of it"),
        (lambda m: m.minify_adata(use_latent_qzm_key="X"), "the posterior is computed"),
        (lambda m: m.get_from_registry(m.adata, "size_factor"), "there are X, batch, labels"),
        (lambda m: m.get_setup_arg("foo"), "there are layer, batch_key"),
        (lambda m: m.to_device("tpu"), "JAX computes on"),
        (lambda m: setattr(scvi.settings, "batch_size", 9), "pass batch_size="),
        (lambda m: setattr(scvi.settings, "seed", "x"), "settings.seed must be a whole number"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_what_takes_its_place(trained, call, words):
    with pytest.raises(ConfigError, match=words):
        call(trained)


def test_missing_verbs_say_where_to_look(trained):
    with pytest.raises(AttributeError, match="pass weights='importance'"):
        trained.get_importance_weights()
    with pytest.raises(AttributeError, match="no attribute 'foo'"):
        trained.foo()
    with pytest.raises(KeyError, match="history has no 'validation_f1_score'; it has"):
        trained.history["validation_f1_score"]
    with pytest.raises(AttributeError, match=r"scvi.data has no counterpart"):
        scvi.data  # noqa: B018


def test_devices_by_the_peers_names():
    assert devices_of("train", "auto", "auto") is None
    assert devices_of("train", "cpu", "1") == 1
    assert devices_of("train", None, -1) == -1
    assert [d.id for d in devices_of("train", "auto", [0])] == [0]


def test_train_validation_and_test_cells():
    """In the order of the data; and a type of one cell, among those to train on, is no trouble."""
    adata = cells()
    kind = adata.obs["known"].astype(str).to_numpy()
    kind[101] = "rare"
    adata.obs["known"] = kind
    SCANVI.setup_anndata(adata, "known", "Unknown")
    model = SCANVI(adata, n_hidden=8, n_latent=2)
    sizes = {"train_size": 0.6, "validation_size": 0.3}
    model.train(1, n_samples_per_label=3, shuffle_set_split=False, batch_size=64, progress=False, **sizes)
    np.testing.assert_array_equal(model.validation_indices, np.arange(90))
    np.testing.assert_array_equal(model.train_indices, np.arange(90, 270))
    np.testing.assert_array_equal(model.test_indices, np.arange(270, 300))
    np.testing.assert_array_equal(model.held_out_labels, np.flatnonzero(kind[:90] != "Unknown"))
    # the noted bound is that of the noted cells
    error = model.get_reconstruction_error(indices=model.validation_indices)
    noted = model.history["reconstruction_loss_validation"].to_numpy()[-1, 0]
    np.testing.assert_allclose(error, noted, rtol=0.05)
    assert list(model.predict(soft=True).columns) == ["rare", "type 0", "type 1", "type 2"]
    none = ("trainer_config", "plan_config", "plan_kwargs", "datamodule", "datasplitter_kwargs")
    given = dict.fromkeys(OWN_ARGUMENTS) | dict.fromkeys(none)
    given |= {"trainer_kwargs": {}, "progress": False, "accelerator": "auto", "devices": "auto", "early_stopping": True}
    run = run_of(
        given | sizes | {"shuffle_set_split": True}, SCANVI.fit_defaults, n_cells=300, epochs=1, seed=0, batch_size=128
    )
    parts = [run.held_out.train, run.held_out.validation, run.test]
    assert [len(part) for part in parts] == [180, 90, 30]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(300))


def test_data_lie_beside_a_model_when_asked(trained, tmp_path):
    folder = trained.save(tmp_path / "model", save_anndata=True, compression="gzip")
    assert (folder / "adata.h5ad").is_file()
    assert SCVI.load(folder, adata=False).adata is None
    again = SCVI.load(folder)
    np.testing.assert_allclose(again.get_latent_representation(), trained.get_latent_representation(), rtol=1e-5)
    trained.save(folder, overwrite=True)
    assert not (folder / "adata.h5ad").exists()
    with pytest.raises(ConfigError, match="True has nothing to write"):
        SCVI.load(folder).save(tmp_path / "other", save_anndata=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.pt").touch()
    with pytest.raises(ModelFileError, match=r"a pickle, which diffbio never reads; see .*from_scvi_tools"):
        SCVI.load(tmp_path / "theirs")


def test_what_a_model_says_of_itself(trained, tmp_path, capsys):
    assert trained.summary_string.splitlines()[-2:] == ["Training status: Trained", "Model's adata is minified?: False"]
    assert trained.registry["setup_args"]["batch_key"] == trained.get_setup_arg("batch_key") == "batch"
    with pytest.raises(KeyError, match="registry has no 'foo'; it has model_name"):
        trained.registry["foo"]
    assert list(trained.get_var_names()) == list(trained.adata.var_names)
    codes = trained.get_from_registry(trained.adata, "batch")
    np.testing.assert_array_equal(codes[:, 0], trained.adata.obs["batch"].cat.codes)
    np.testing.assert_array_equal(trained.get_from_registry(trained.adata, "X").toarray(), trained.adata.X.toarray())
    assert list(trained.view_anndata_setup(trained.adata, hide_state_registries=True).columns) == ["field", "key"]
    folder = trained.save(tmp_path / "model")
    SCVI.view_setup_args(folder)
    trained.view_registry()
    assert capsys.readouterr().out.count("batch_key: 'batch'") == 2
    assert SCVI.load_registry(folder) == trained.registry
    trained.to_device("cpu" if trained.device.platform == "cpu" else "cuda:0")
    assert "kl_global_train" in trained.history


def test_a_seed_of_all_models():
    adata = cells()
    SCVI.setup_anndata(adata)
    scvi.settings.seed = 5
    try:
        made = [SCVI(adata, n_hidden=8, seed=seed) for seed in (None, 5, 6)]
    finally:
        scvi.settings.seed = None
    weights = [to_numpy(flat_state(model.module)["vae/encoder/mean/kernel"]) for model in made]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 0


@pytest.mark.filterwarnings("ignore:.*genes have no count")
def test_switches_of_surgery(annotated):
    """What is not frozen moves; the defaults move the new batch's weights alone."""
    query = cells()[:100].copy()
    query.obs["batch"] = "donor 7"
    opened = {
        "freeze_expression": "vae/encoder/network/blocks/0/linear/kernel",
        "freeze_decoder_first_layer": "vae/decoder/network/blocks/0/linear/kernel",
        "freeze_batchnorm_encoder": "vae/encoder/network/blocks/0/norm/",
        "freeze_batchnorm_decoder": "vae/decoder/network/blocks/0/norm/",
        "freeze_classifier": "classifier/",
    }
    model = SCANVI.load_query_data(query, annotated, **dict.fromkeys(opened, False), freeze_dropout=False)
    before = {name: to_numpy(leaf) for name, leaf in flat_state(model.module).items()}
    model.train(1, batch_size=32, plan_kwargs={"lr_warmup": 0}, progress=False)
    moved = {name: before[name] != to_numpy(leaf) for name, leaf in flat_state(model.module).items()}
    for name, changed in moved.items():
        if before[name].dtype.kind == "f":
            assert bool(changed.any()) == any(name.startswith(start) for start in opened.values()), name
    assert moved["vae/decoder/network/blocks/0/linear/kernel"][:4].all(0).any()  # the latent dimensions
    with pytest.raises(DataError, match="transfer_batch=False, but 'donor 7' are no batches of the reference"):
        SCANVI.load_query_data(query, annotated, transfer_batch=False)
    short = query[:, 2:].copy()
    with pytest.warns(DataWarning, match="2 of the model's 40 genes"):
        SCANVI.load_query_data(short, annotated, inplace_subset_query_vars=True)
    assert short.n_vars == 40


def test_setup_looks_at_what_it_is_given():
    adata = cells()
    with pytest.raises(DataError, match="each of the 300 cells has its own value"):
        SCVI.setup_anndata(adata, batch_key="age")
    with pytest.warns(DataWarning, match="'Unknown' counts as a cell type; unlabeled_category is 'unknwn'"):
        SCANVI.setup_anndata(adata, "known", "unknwn")
    SCVI.setup_anndata(adata)
    with pytest.raises(DataError, match="the genes are not those that SCVI"):
        SCVI(adata[:, :30].copy())
    with pytest.raises(DataError, match="layers are none"):
        SCVI.setup_anndata(adata, layer="counts")


def test_empty_lists_and_single_names(trained):
    with pytest.raises(DataError, match="the list of batches is empty"):
        trained.get_normalized_expression(transform_batch=[])
    with pytest.raises(DataError, match="gene_list is empty"):
        trained.get_normalized_expression(gene_list=[])
    assert list(trained.get_normalized_expression(gene_list="gene3", indices=[0]).columns) == ["gene3"]
    with pytest.warns(DataWarning, match="return_numpy=False is not met"):
        assert trained.get_normalized_expression(
            indices=[0, 1], n_samples=3, return_mean=False, return_numpy=False
        ).shape == (3, 2, 40)
    for idx in ([999], "foo == 3"):
        with pytest.raises(DataError, match=r"indices must be|no query of obs"):
            trained.differential_expression(idx1=idx)
