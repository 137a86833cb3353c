"""The pipeline: trained end to end it finds the types, keeps them when cells are new, and says when it can't."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import another_value
from flax import nnx
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

import diffbio
from diffbio.errors import ConfigError, DataError, MissingKeyError, ModelFileError, TrainingInterrupted
from diffbio.operators.base import Operator
from diffbio.pipelines import SingleCellPipeline, SingleCellPipelineConfig, create_single_cell_pipeline
from diffbio.pipelines import stages as stages_module
from diffbio.pipelines.inference import apply_in_chunks, in_memory, joined

N_TYPES, N_GENES = 3, 40
SMALL = {"n_genes": N_GENES, "n_clusters": N_TYPES, "latent_dim": 5, "hidden_dims": (16, 12)}
QUICK = {"max_epochs": 30, "batch_size": 32, "learning_rate": 5e-3, "progress": False}
DATA_KEYS = ("counts", "ambient_profile", "batch_labels")


def cells(n=180, seed=0):
    """Three types in two batches that see some genes differently, with 10 % soup."""
    rng = np.random.default_rng(7)
    profiles = rng.gamma(0.4, 1.0, (N_TYPES, N_GENES))
    profiles /= profiles.sum(1, keepdims=True)
    shift = np.exp(rng.normal(0, 0.5, (2, N_GENES)))
    soup = profiles.mean(0)
    rng = np.random.default_rng(seed)
    types, batches = rng.integers(0, N_TYPES, n), rng.integers(0, 2, n)
    native = profiles[types] * shift[batches]
    native /= native.sum(1, keepdims=True)
    library = rng.lognormal(6.0, 0.3, n)[:, None]
    counts = rng.poisson(library * (0.9 * native + 0.1 * soup)).astype(np.float32)
    data = {
        "counts": sparse.csr_matrix(counts), "ambient_profile": soup.astype(np.float32), "batch_labels": batches,
    }
    return data, types


def dense(data):
    return {**data, "counts": jnp.asarray(data["counts"].toarray()), "batch_labels": jnp.asarray(data["batch_labels"])}


def compiled(pipeline):
    graph, state = nnx.split(pipeline)

    @jax.jit
    def run(state, data):
        result, _, metadata = nnx.merge(graph, state).apply(data, {}, None)
        return {**result, "unfitted": metadata}

    return lambda data: run(state, data)


def parameters_of(part):
    return [np.asarray(p) for p in jax.tree.leaves(nnx.state(part, nnx.Param))]


@pytest.fixture(scope="module")
def after_ambient():
    """The parameters of ambient removal when its own stage has ended."""
    return []


@pytest.fixture(scope="module")
def fitted(after_ambient):
    data, types = cells()
    pipeline = create_single_cell_pipeline(**SMALL)
    stage = stages_module.Run.stage

    def noted(self, name, action):
        stage(self, name, action)
        if name == "ambient":
            after_ambient.extend(parameters_of(self.pipeline.ambient_removal))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module.Run, "stage", noted)
        history = diffbio.fit(pipeline, data, **QUICK)
    return pipeline, data, types, history


def test_defaults_are_those_of_the_reference():
    config = SingleCellPipelineConfig()
    assert (config.n_genes, config.n_clusters, config.latent_dim, config.hidden_dims) == (2000, 10, 64, (128, 64))
    assert (config.umap_n_components, config.batch_correction_clusters) == (2, 100)
    assert (config.batch_correction_iterations, config.clustering_temperature) == (10, 1.0)
    assert all(getattr(config, name) is True for name in vars(config) if name.startswith("enable_"))
    assert config.n_batches is None


def test_every_setting_reaches_a_stage():
    def stages(config):
        pipeline = SingleCellPipeline(config, rngs=nnx.Rngs(0))
        parts = ("ambient_removal", "vae_normalizer", "batch_correction", "dim_reduction", "clustering")
        return {name: getattr(getattr(pipeline, name), "config", None) for name in parts}

    config = SingleCellPipelineConfig(**SMALL)
    before = stages(config)
    for field in dataclasses.fields(config):
        if field.name in ("clustering", "resolution"):  # communities have no config; see the test of alternatives
            continue
        value = 3 if field.name == "n_batches" else another_value(field, getattr(config, field.name))
        assert stages(dataclasses.replace(config, **{field.name: value})) != before, field.name


@pytest.mark.parametrize(("integration", "embedding", "clustering"), [
    ("mmd", "phate", "communities"), ("wgan", "umap", "kmeans"), ("scvi", "phate", "kmeans"),
])  # fmt: skip
def test_alternatives_of_a_stage_are_trained_saved_and_project(integration, embedding, clustering, tmp_path):
    """Two epochs: that each alternative takes its place; how good it is, benchmarks say."""
    data, _ = cells(n=90)
    data.pop("ambient_profile")
    small = {k: v for k, v in SMALL.items() if k != "n_clusters" or clustering == "kmeans"}
    pipeline = create_single_cell_pipeline(
        **small, integration=integration, embedding=embedding, clustering=clustering, enable_ambient_removal=False,
    )
    diffbio.fit(pipeline, data, **QUICK | {"max_epochs": 2})
    result = compiled(pipeline)(dense(data))
    assert not result["unfitted"]
    assert ("corrected_embeddings" in result) == (integration != "scvi")
    assert result["embeddings_2d"].shape == (90, 2)
    np.testing.assert_allclose(result["cluster_assignments"].sum(axis=1), 1, atol=1e-5)
    pipeline.save(tmp_path / "model")
    again = SingleCellPipeline.load(tmp_path / "model")
    new = dense(cells(n=20, seed=3)[0])
    before, after = compiled(pipeline)(new), compiled(again)(new)
    for key in pipeline.provided():
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    graph, params, rest = nnx.split(pipeline, nnx.Param, ...)

    @jax.jit
    def gradients(params):
        def total(params, key):
            return (nnx.merge(graph, params, rest).apply(new, {}, None)[0][key] ** 2).sum()

        return [jax.grad(total)(params, key) for key in ("embeddings_2d", "cluster_assignments")]

    for gradient in gradients(params):
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient["vae_normalizer"]))
        assert 0 < largest < np.inf


@pytest.mark.parametrize(("settings", "said"), [
    ({"resolution": 2.0}, r"resolution 2\.0 is of clustering"),
    ({"clustering": "communities", "n_clusters": 5}, "n_clusters 5 does nothing for method 'communities'"),
    ({"integration": "mmd", "batch_correction_clusters": 3}, "batch_correction_clusters 3 does nothing for .*'mmd'"),
])  # fmt: skip
def test_settings_of_another_method_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        SingleCellPipelineConfig(**settings)


def test_a_batch_of_one_cell_is_refused_before_training():
    data, _ = cells(n=40)
    data["batch_labels"][:] = 0
    data["batch_labels"][3] = 1
    pipeline = create_single_cell_pipeline(**SMALL, integration="wgan", enable_ambient_removal=False)
    with pytest.raises(DataError, match="'wgan' compares batches, but batch 1 has 1 cells"):
        diffbio.fit(pipeline, data, **QUICK)


def test_finds_the_types_and_mixes_the_batches(fitted):
    pipeline, data, types, _ = fitted
    result, _, metadata = pipeline.apply(dense(data), {}, None)
    assert metadata is None  # nothing unfitted
    labels = np.asarray(result["cluster_assignments"]).argmax(1)
    assert adjusted_rand_score(types, labels) > 0.9
    assert (result["decontaminated_counts"] >= 0).all()
    assert (result["decontaminated_counts"] <= result["counts"]).all()


def test_trains_every_stage_and_then_jointly(fitted):
    history = fitted[3]
    stages = list(dict.fromkeys(row["stage"] for row in history.rows))
    assert stages[:3] == ["ambient", "vae", "umap"]
    assert "joint1" in stages
    for stage in ("ambient", "vae"):
        losses = [row["loss"] for row in history.rows if row["stage"] == stage]
        assert losses[-1] < losses[0]


def test_learns_the_number_of_batches_from_data(fitted):
    assert fitted[0].config.n_batches == 2


def test_new_cells_land_among_their_type(fitted):
    pipeline, data, types, _ = fitted
    new, new_types = cells(n=60, seed=5)
    clusters = np.asarray(pipeline.apply(dense(data), {}, None)[0]["cluster_assignments"]).argmax(1)
    name_of = {c: np.bincount(types[clusters == c]).argmax() for c in np.unique(clusters)}
    found = np.asarray(pipeline.apply(dense(new), {}, None)[0]["cluster_assignments"]).argmax(1)
    assert np.mean([name_of[c] == t for c, t in zip(found, new_types, strict=True)]) > 0.9


def test_cells_are_treated_one_by_one(fitted):
    pipeline, data, _, _ = fitted
    whole = pipeline.apply(dense(data), {}, None)[0]
    first = pipeline.apply({**dense(data), "counts": whole["counts"][:7], "batch_labels": whole["batch_labels"][:7]})[0]
    keys = list(pipeline.provided())
    for key in keys:
        np.testing.assert_allclose(first[key], whole[key][:7], rtol=1e-4, atol=1e-4, err_msg=key)
    from diffbio.fitting import source_for

    source = source_for(pipeline, data)
    chunked, larger = (joined(apply_in_chunks(pipeline, source, keys, chunk_cells=n)) for n in (64, 256))
    for key in keys:
        np.testing.assert_allclose(chunked[key], whole[key], rtol=1e-4, atol=1e-4, err_msg=key)
        scale = np.abs(larger[key]).max()  # float32: measured 1e-7 to 6e-7 of it
        np.testing.assert_allclose(chunked[key], larger[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


def test_cells_and_genes_without_counts_stay_finite_and_cells_of_zeros_stay_zero(fitted):
    pipeline, data, _, _ = fitted
    data = dense(data)
    hard = {**data, "counts": data["counts"].at[jnp.array([4, 17])].set(0).at[:, 3].set(0)}
    result = pipeline.apply(hard, {}, None)[0]
    for key in pipeline.provided():
        assert jnp.isfinite(result[key]).all(), key
    np.testing.assert_array_equal(result["decontaminated_counts"][jnp.array([4, 17])], 0)
    np.testing.assert_array_equal(result["decontaminated_counts"][:, 3], 0)


def test_save_and_load_give_the_same_bits(fitted, tmp_path):
    pipeline, data, _, _ = fitted
    again = Operator.load(pipeline.save(tmp_path / "model"))
    before, after = (p.apply(dense(data), {}, None) for p in (pipeline, again))
    assert after[2] is None
    for key in pipeline.provided():
        np.testing.assert_array_equal(after[0][key], before[0][key], err_msg=key)


def test_an_unknown_batch_is_an_error_and_under_jit_nan(fitted):
    pipeline, data, _, _ = fitted
    odd = dense(data) | {"batch_labels": jnp.asarray(data["batch_labels"]).at[3].set(2)}
    with pytest.raises(DataError, match="n_batches=3"):
        pipeline.apply(odd, {}, None)
    result = jax.jit(lambda d: pipeline.apply(d, {}, None)[0])(odd)
    for key in ("normalized", "latent", "corrected_embeddings", "embeddings_2d", "cluster_assignments"):
        assert jnp.isnan(result[key][3]).all(), key
        assert jnp.isfinite(jnp.delete(result[key], 3, axis=0)).all(), key


def test_undeclared_batches_get_room_before_training_and_an_error_after(fitted):
    pipeline = create_single_cell_pipeline(**SMALL, batch_correction_clusters=3)
    data = dense(cells(n=20)[0])
    data["batch_labels"] = data["batch_labels"].at[0].set(16)
    assert jnp.isfinite(pipeline.apply(data, {}, None)[0]["latent"]).all()
    assert pipeline.vae_normalizer.config.n_batches == pipeline.batch_correction.config.n_batches == 17
    with pytest.raises(DataError, match="pass n_batches=17"):
        fitted[0].apply(data, {}, None)
    declared = create_single_cell_pipeline(**SMALL, n_batches=2)
    with pytest.raises(DataError, match="pass n_batches=17"):
        diffbio.fit(declared, data, **QUICK)


def test_joint_training_leaves_ambient_removal_as_its_own_objective_taught_it(fitted, after_ambient):
    # a likelihood rises with every count removed: through the joint loss the fraction would grow without end
    assert after_ambient
    for ours, theirs in zip(parameters_of(fitted[0].ambient_removal), after_ambient, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_pipelines_own_seed_decides_the_start_also_where_data_decide_the_shapes():
    data, _ = cells(n=60)
    latents = []
    for seed in (1, 1, 2):
        pipeline = create_single_cell_pipeline(**SMALL, seed=seed)
        pipeline.learn_batches(data["batch_labels"], 60)
        latents.append(np.asarray(pipeline.normalise(dense(data))["latent"]))
    np.testing.assert_array_equal(latents[0], latents[1])
    assert np.abs(latents[0] - latents[2]).max() > 0


def test_other_data_of_the_same_batches_keep_what_was_learned(fitted):
    pipeline, data, _, _ = fitted
    before = pipeline.vae_normalizer
    pipeline.learn_batches(data["batch_labels"], 40)
    assert pipeline.vae_normalizer is before
    pipeline.learn_batches(data["batch_labels"], 180)


def test_after_a_loop_of_your_own_a_few_cells_can_be_projected():
    data = dense(cells(n=60)[0])
    pipeline = create_single_cell_pipeline(**SMALL, batch_correction_clusters=10)
    pipeline.mark_fitted()
    pipeline.learn_reference(data)
    whole = pipeline.apply(data, {}, None)[0]["corrected_embeddings"]
    few = {key: value if key == "ambient_profile" else value[:4] for key, value in data.items()}
    np.testing.assert_allclose(pipeline.apply(few, {}, None)[0]["corrected_embeddings"], whole[:4], atol=1e-4)


def test_the_history_of_all_stages_plots(fitted):
    axes = fitted[3].plot()
    labels = [line.get_label() for line in axes.get_lines()]
    assert "vae training" in labels
    assert "vae validation" in labels


def test_missing_input_names_the_switch():
    pipeline = create_single_cell_pipeline(**SMALL)
    data = dense(cells(n=20)[0])
    for key, switch in {"ambient_profile": "ambient_removal", "batch_labels": "batch_correction"}.items():
        with pytest.raises(MissingKeyError, match=f"{key}.*enable_{switch}=False"):
            pipeline.apply({k: v for k, v in data.items() if k != key}, {}, None)


@pytest.mark.parametrize("stage", ["ambient_removal", "batch_correction", "dim_reduction", "clustering"])
def test_a_disabled_stage_yields_nothing(stage):
    keys = {
        "ambient_removal": "decontaminated_counts", "batch_correction": "corrected_embeddings",
        "dim_reduction": "embeddings_2d", "clustering": "cluster_assignments",
    }
    pipeline = create_single_cell_pipeline(**SMALL, batch_correction_clusters=3, **{f"enable_{stage}": False})
    assert getattr(pipeline, stage) is None
    result, _, _ = pipeline.apply(dense(cells(n=20)[0]), {}, None)
    assert keys[stage] not in result
    assert set(keys.values()) - {keys[stage]} <= set(result)


def test_normalisation_alone_trains_without_batches():
    off = {f"enable_{s}": False for s in ("ambient_removal", "batch_correction", "dim_reduction", "clustering")}
    pipeline = create_single_cell_pipeline(**SMALL, **off)
    diffbio.fit(pipeline, {"counts": cells(n=40)[0]["counts"]}, max_epochs=2, progress=False)
    assert pipeline.fitted
    assert pipeline.config.n_batches == 1


def test_one_seed_one_result_and_one_stop_resumes_to_the_bit(tmp_path, monkeypatch):
    data, _ = cells(n=90)
    quick = {**QUICK, "max_epochs": 4}

    def run(**how):
        pipeline = create_single_cell_pipeline(**SMALL)
        diffbio.fit(pipeline, data, **quick, **how)
        return {k: v for k, v in dense_state(pipeline).items() if "rngs" not in k}

    whole = run()
    stage = stages_module._fit_jointly
    monkeypatch.setattr(stages_module, "_fit_jointly", interrupted)
    with pytest.raises(TrainingInterrupted):
        run(checkpoint=tmp_path / "run")
    monkeypatch.setattr(stages_module, "_fit_jointly", stage)
    resumed = run(checkpoint=tmp_path / "run", resume=True)
    for key, value in whole.items():
        np.testing.assert_array_equal(resumed[key], value, err_msg=key)
    other = SingleCellPipeline(SingleCellPipelineConfig(**{**SMALL, "latent_dim": 4}), rngs=nnx.Rngs(0))
    with pytest.raises(ModelFileError, match="config differs"):
        diffbio.fit(other, data, **quick, checkpoint=tmp_path / "run", resume=True)


def interrupted(*_):
    message = "stopped between two stages"
    raise TrainingInterrupted(message, 130)


def dense_state(pipeline):
    return {k: np.asarray(v[...]) for k, v in pipeline.saved_state().items() if v.dtype != jax.random.key(0).dtype}


def test_a_loss_on_the_clusters_trains_what_comes_before():
    pipeline, data = SingleCellPipeline.examples()["all stages"]

    def loss(model):
        out = model.apply(data, {}, None)[0]
        return (out["cluster_assignments"] ** 2).sum() + (out["embeddings_2d"] ** 2).sum()

    grads = dict(nnx.to_flat_state(nnx.grad(loss)(pipeline)))
    reached = {path[0] for path, g in grads.items() if jnp.abs(g[...]).max() > 0}
    assert reached == {"ambient_removal", "vae_normalizer", "dim_reduction", "clustering"}


def test_a_large_source_is_trained_on_a_bounded_reference():
    from diffbio.data.source import ArraySource

    data, _ = cells(n=100)
    source = ArraySource(
        {"counts": data["counts"], "batch_labels": data["batch_labels"]}, {"ambient_profile": data["ambient_profile"]}
    )
    part = in_memory(source, 30, seed=0)
    assert part.n_cells == 30
    assert set(part.keys) == set(DATA_KEYS)
    assert in_memory(source, 200, seed=0) is source


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="clustering_temperature"):
        create_single_cell_pipeline(clustering_temperature=0.0)
    with pytest.raises(ConfigError, match="n_clusters"):
        create_single_cell_pipeline(n_clusters=0)


def test_schedules_go_where_the_objective_takes_them():
    pipeline, _ = SingleCellPipeline.examples()["all stages"]
    own = {"kl_weight": lambda epoch: epoch}
    run = stages_module.Run(pipeline, None, {}, None, resume=False, how={}, schedules=own)
    assert run.schedules_of(pipeline.vae_normalizer)["kl_weight"](3) == 3
    assert run.schedules_of(pipeline)["kl_weight"](3) == np.inf  # after the warm-up
    assert run.schedules_of(pipeline.dim_reduction) == {}
    run.schedules = None
    assert set(run.schedules_of(pipeline.ambient_removal)) == {"kl_weight"}
