import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse
from toy_modules import (
    BATCHES,
    CELLS,
    GENES,
    LABELS,
    InNumpy,
    arguments,
    build,
    gradients_are_right,
    published,
    toy_cells,
)

from diffbio.data.source import ArraySource
from diffbio.errors import ConfigError, DataError
from diffbio.math.sparse import SparseRows
from diffbio.nn import SCVI

LIKELIHOODS = ("zinb", "nb", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")


def as_sparse(counts):
    rows = ArraySource({"counts": sparse.csr_array(np.asarray(counts, np.float32))})
    return jax.device_put(rows.take_sparse(np.arange(len(counts)))["counts"])


def test_constructor_has_the_published_arguments_in_their_order():
    published(
        SCVI.__init__,
        [
            ("n_input", inspect.Parameter.empty), ("n_batch", 0), ("n_labels", 0), ("n_hidden", 128), ("n_latent", 10),
            ("n_layers", 1), ("dropout_rate", 0.1), ("dispersion", "gene"), ("log_variational", True),
            ("reconstruction_loss", "zinb"),
        ],
    )  # fmt: skip
    empty = inspect.Parameter.empty
    wanted = [("x", empty), ("local_l_mean", None), ("local_l_var", None), ("batch_index", None), ("y", None)]
    published(SCVI.forward, wanted)
    published(SCVI.get_latents, [("x", empty), ("y", None)])
    published(SCVI.get_reconstruction_loss, [(n, empty) for n in ("x", "px_rate", "px_r", "px_dropout")])
    model = SCVI(GENES, rngs=nnx.Rngs(0))
    assert model.vae.encoder.network.blocks[0].linear.out_features == 128
    assert model.vae.encoder.network.blocks[0].dropout.rate == 0.1
    assert len(model.vae.decoder.network.blocks) == 1
    assert model.vae.decoder.network.blocks[0].dropout.rate == 0.0


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients(likelihood, observed):
    for dispersion in DISPERSIONS:
        model = build(SCVI, reconstruction_loss=likelihood, dispersion=dispersion, use_observed_lib_size=observed)
        gradients_are_right(model, toy_cells())


def test_gradients_by_every_parameter_one_by_one():
    model = build(SCVI, dispersion="gene-cell", use_observed_lib_size=False, encode_covariates=True, n_layers=2)
    gradients_are_right(model, toy_cells(), one_by_one=("vae",))


def test_forward_is_the_elbo_restated_in_numpy():
    model, data = build(SCVI), toy_cells()
    again = InNumpy(model)
    mean, var = again.gaussian(model.vae.encoder, np.log1p(np.asarray(data["counts"], float)))
    reconstruction, kl, zero = model.forward(data["counts"], **arguments(data))
    np.testing.assert_allclose(reconstruction, -again.log_p_counts(mean, data), rtol=1e-5)
    np.testing.assert_allclose(kl, 0.5 * (var + mean**2 - 1 - np.log(var)).sum(-1), rtol=1e-5)
    assert reconstruction.shape == kl.shape == zero.shape == (CELLS,)
    assert (zero == 0).all()


def test_objective_is_the_mean_of_forward_with_the_kl_divergence_of_z_weighted():
    data = toy_cells()
    for observed in (True, False):
        model = build(SCVI, use_observed_lib_size=observed)
        reconstruction, kl, _ = model.forward(data["counts"], **arguments(data))
        for weight in (0.0, 0.3, 1.0):
            loss, metrics = model.objective(data, kl_weight=weight)
            np.testing.assert_allclose(loss, (reconstruction + weight * kl).mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["kl"], kl.mean(), rtol=1e-6)


def test_kl_divergence_of_the_log_library():
    model, data = build(SCVI, use_observed_lib_size=False), toy_cells()
    m, v = InNumpy(model).gaussian(model.vae.library_encoder, np.log1p(np.asarray(data["counts"], float)))
    m0, v0 = (np.asarray(data[k], float)[:, None] for k in ("local_l_mean", "local_l_var"))
    expected = (np.log(np.sqrt(v0 / v)) + (v + (m - m0) ** 2) / (2 * v0) - 0.5)[:, 0]
    known = model.covariates(*(data[k] for k in ("batch_labels", "labels", "cat_covs", "cont_covs")), None)
    drawn = model.draw(data["counts"], known, None)
    kl = model.kl_library(drawn, data["local_l_mean"], data["local_l_var"])
    np.testing.assert_allclose(kl, expected, rtol=1e-5)
    reconstruction = model.forward(data["counts"], **arguments(data))[0]
    alone = -model.log_prob(data["counts"], model.decode(drawn, known))
    np.testing.assert_allclose(reconstruction - alone, expected, rtol=1e-4)
    # the prior in which the library is latent is needed; where it is observed, it costs nothing
    with pytest.raises(DataError, match="pass local_l_mean and local_l_var"):
        model.forward(data["counts"], **arguments(data, without=("local_l_var",)))
    observed = build(SCVI)
    given, not_given = (
        observed.forward(data["counts"], **arguments(data, without=without))[0]
        for without in ((), ("local_l_mean", "local_l_var"))
    )
    np.testing.assert_array_equal(given, not_given)


def test_rates_sum_to_the_library():
    data = toy_cells()
    known = arguments(data, without=("local_l_mean", "local_l_var"))
    for observed in (True, False):
        found = build(SCVI, use_observed_lib_size=observed).inference(data["counts"], **known)
        np.testing.assert_allclose(found["px_rate"].sum(-1), jnp.exp(found["library"][:, 0]), rtol=1e-5)
        np.testing.assert_allclose(found["px_scale"].sum(-1), 1.0, rtol=1e-5)
        is_sum = np.allclose(jnp.exp(found["library"][:, 0]), data["counts"].sum(-1), rtol=1e-4)
        assert is_sum == observed


def test_forward_takes_its_arguments_in_every_published_shape():
    model, data = build(SCVI, dispersion="gene-label", use_observed_lib_size=False), toy_cells()
    given = arguments(data)
    expected = model.forward(data["counts"], **given)
    columns = {k: given[k][:, None] for k in ("local_l_mean", "local_l_var", "batch_index", "y")}
    one_hot = {"batch_index": jax.nn.one_hot(given["batch_index"], BATCHES), "y": jax.nn.one_hot(given["y"], LABELS)}
    floats = {k: given[k].astype(float) for k in ("batch_index", "y")}
    for other in (columns, one_hot, floats):
        for ours, theirs in zip(model.forward(data["counts"], **(given | other)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    with pytest.raises(DataError, match=r"batch_index must have shape \(cells,\), \(cells, 1\) or \(cells, 2\), got"):
        model.forward(data["counts"], **(given | {"batch_index": jnp.zeros((CELLS, 3))}))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sparse_counts_give_what_dense_ones_give(likelihood):
    data = toy_cells()
    model = build(SCVI, reconstruction_loss=likelihood, use_observed_lib_size=False, dispersion="gene-batch")
    rows = as_sparse(data["counts"])
    assert isinstance(rows, SparseRows)
    pairs = zip(*(model.forward(x, **arguments(data)) for x in (rows, data["counts"])), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    known = {k: v for k, v in arguments(data).items() if not k.startswith("local")}
    one, two = (model.inference(x, **known, transform_batch=1) for x in (rows, data["counts"]))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_jit_equals_eager_and_compiles_once():
    model, data = build(SCVI, use_observed_lib_size=False, dispersion="gene-batch"), toy_cells()
    graph, state = nnx.split(model)
    traces = []

    @jax.jit
    def forward(state, data):
        traces.append(0)
        return nnx.merge(graph, state).forward(data["counts"], **arguments(data), key=jax.random.key(1))

    forward(state, toy_cells(1))
    eager = model.forward(data["counts"], **arguments(data), key=jax.random.key(1))
    for ours, theirs in zip(forward(state, data), eager, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


def test_modes_and_keys():
    model, data = build(SCVI, use_observed_lib_size=False), toy_cells()

    def run(**key):
        return model.forward(data["counts"], **arguments(data), **key)[0]

    np.testing.assert_array_equal(run(), run())  # born in eval mode: the posterior mean
    one, same, other = (run(key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert jnp.abs(one - other).min() > 0
    assert jnp.abs(one - run()).min() > 0
    at_mean = model.get_latents(data["counts"])[0]
    model.train()
    assert jnp.abs(run() - run()).min() > 0
    assert jnp.abs(model.get_latents(data["counts"])[0] - model.get_latents(data["counts"])[0]).max() > 0
    model.eval()
    # running averages have moved by a few batches
    np.testing.assert_allclose(model.get_latents(data["counts"])[0], at_mean, rtol=0.2, atol=0.2)


def test_draws_have_the_posteriors_mean_and_variance():
    model = build(SCVI, use_observed_lib_size=False)
    x = jnp.broadcast_to(toy_cells()["counts"][:1], (20_000, GENES))
    key = jax.random.key(0)
    found = model.inference(x, jnp.zeros(20_000, int), cat_covs=jnp.zeros((20_000, 2), int),
                            cont_covs=jnp.zeros((20_000, 1)), key=key)  # fmt: skip
    for draws, mean, var in (("z", "qz_m", "qz_v"), ("library", "ql_m", "ql_v")):
        sd = jnp.sqrt(found[var][0])
        np.testing.assert_allclose(found[draws].mean(0), found[mean][0], atol=4 * sd.max() / 141)
        np.testing.assert_allclose(found[draws].var(0), found[var][0], rtol=0.05)
    # the two are independent
    assert abs(np.corrcoef(found["z"][:, 0], found["library"][:, 0])[0, 1]) < 0.03
    z = model.get_sample_from_posterior_z(x, key=key)
    np.testing.assert_allclose(z.var(0), found["qz_v"][0], rtol=0.05)
    many = model.sample_from_posterior_z(x, None, False, 4, key=key)
    np.testing.assert_allclose(many.var(0), found["qz_v"][0] / 4, rtol=0.05)
    np.testing.assert_array_equal(model.get_sample_from_posterior_z(x[:5], None, True), found["qz_m"][:5])
    library = model.sample_from_posterior_l(x, False, key=key)
    np.testing.assert_allclose(library.var(0), found["ql_v"][0], rtol=0.05)
    np.testing.assert_allclose(model.sample_from_posterior_l(x[:5]), found["ql_m"][:5], rtol=1e-6)


def test_inference_with_several_draws():
    model, data = build(SCVI), toy_cells()
    known = arguments(data, without=("local_l_mean", "local_l_var"))
    found = model.inference(data["counts"], **known, n_samples=3)
    for name in ("z", "library", "px_scale", "px_rate", "px_dropout"):
        assert found[name].shape[:2] == (3, CELLS), name
    assert found["qz_m"].shape == (CELLS, 2)
    assert jnp.abs(found["z"][0] - found["z"][1]).max() > 0
    one = model.inference(data["counts"], **known)
    np.testing.assert_array_equal(model.get_sample_scale(data["counts"], **known), one["px_scale"])
    np.testing.assert_array_equal(model.get_sample_rate(data["counts"], **known), one["px_rate"])
    loss = model.get_reconstruction_loss(data["counts"], one["px_rate"], one["px_r"], one["px_dropout"])
    np.testing.assert_allclose(loss, model.forward(data["counts"], **known)[0], rtol=1e-5)


@pytest.mark.parametrize("encode", [True, False])
def test_every_covariate_matters(encode):
    model, data = build(SCVI, encode_covariates=encode, n_hidden=32), toy_cells()
    known = arguments(data, without=("local_l_mean", "local_l_var"))
    before = model.inference(data["counts"], **known)
    changes = {
        "batch_index": 1 - known["batch_index"],
        "cont_covs": known["cont_covs"] + 1,
        "cat_covs": known["cat_covs"].at[:, 0].set(1 - known["cat_covs"][:, 0]),
    }
    others = [*changes.items(), ("cat_covs", known["cat_covs"].at[:, 1].add(1))]
    for name, value in others:
        after = model.inference(data["counts"], **(known | {name: value}))
        assert (jnp.abs(after["px_scale"] - before["px_scale"]).max(-1) > 1e-5).all(), name
        moved = jnp.abs(after["qz_m"] - before["qz_m"]).max()
        assert (moved > 1e-5) == encode, name


def test_transform_batch_decodes_as_another_batch_and_encodes_as_its_own():
    model, data = build(SCVI, encode_covariates=True, dispersion="gene-batch"), toy_cells()
    known = arguments(data, without=("local_l_mean", "local_l_var"))
    own = model.inference(data["counts"], **known)
    found = model.inference(data["counts"], **known, transform_batch=1)
    np.testing.assert_array_equal(found["z"], own["z"])
    there = np.asarray(known["batch_index"]) == 1
    for name in ("px_scale", "px_r"):
        np.testing.assert_allclose(found[name][there], own[name][there], rtol=1e-6)
        assert (jnp.abs(found[name] - own[name])[~there].max(-1) > 1e-5).all()
    with pytest.raises(DataError, match=r"transform_batch must be in 0\.\.1, got 2"):
        model.inference(data["counts"], **known, transform_batch=2)


def test_rows_of_dispersion_are_those_of_the_batch_or_the_label():
    data = toy_cells()
    known = arguments(data, without=("local_l_mean", "local_l_var"))
    for dispersion, index in (("gene-batch", known["batch_index"]), ("gene-label", known["y"])):
        model = build(SCVI, dispersion=dispersion)
        theta = jnp.exp(model.vae.decoder.log_theta[...])
        found = model.inference(data["counts"], **known)["px_r"]
        for row, i in zip(found, index, strict=True):
            expected = theta[i] if i < len(theta) else jnp.exp(jnp.log(theta).mean(0))
            np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_one_batch_is_no_batch():
    data = toy_cells()
    models = [build(SCVI, n_batch=n, n_cats_per_cov=(), n_continuous_cov=0) for n in (0, 1)]
    assert models[0].vae.decoder.network.n_covariates == 0
    found = [m.forward(data["counts"])[0] for m in models]
    np.testing.assert_array_equal(*found)
    with_zeros = models[1].forward(data["counts"], batch_index=jnp.zeros((CELLS, 1), int))[0]
    np.testing.assert_array_equal(with_zeros, found[0])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_one_cell_and_an_empty_cell(likelihood):
    data = toy_cells()
    data["counts"] = data["counts"].at[2].set(0.0)
    for observed, dispersion in itertools.product((True, False), ("gene", "gene-cell")):
        model = build(SCVI, reconstruction_loss=likelihood, use_observed_lib_size=observed, dispersion=dispersion)
        whole = model.forward(data["counts"], **arguments(data))
        for i in (0, 2):
            one = {k: v[i : i + 1] for k, v in data.items()}
            for part, of_all in zip(model.forward(one["counts"], **arguments(one)), whole, strict=True):
                np.testing.assert_allclose(part, of_all[i : i + 1], rtol=1e-5, atol=1e-6)
                assert jnp.isfinite(part).all()
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, x, graph=graph, rest=rest):
            return nnx.merge(graph, params, rest).objective(data | {"counts": x})[0]

        for g in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, data["counts"])):
            assert jnp.isfinite(g).all()


def test_size_factors():
    model, data = build(SCVI, use_size_factor=True), toy_cells()
    known = arguments(data, without=("local_l_mean", "local_l_var"))
    with pytest.raises(DataError, match="size_factor is None, but the model was built for it; pass it"):
        model.forward(data["counts"], **known)
    one, two = (model.inference(data["counts"], **known, size_factor=jnp.full(CELLS, s)) for s in (1.0, 2.0))
    np.testing.assert_allclose(two["px_rate"], 2 * one["px_rate"], rtol=1e-5)
    np.testing.assert_allclose(two["px_scale"], one["px_rate"], rtol=1e-5)
    h = InNumpy(model).network(
        model.vae.decoder.network, np.concatenate([one["z"], data["cont_covs"]], -1), InNumpy(model).injected(data)
    )
    softplus = np.logaddexp(0, InNumpy(model).linear(model.vae.decoder.fraction, h))
    np.testing.assert_allclose(one["px_scale"], softplus, rtol=1e-4)


def test_encoder_reads_log_counts_or_counts():
    data = toy_cells()
    for log, read in ((True, np.log1p), (False, np.asarray)):
        model = build(SCVI, log_variational=log)
        expected = InNumpy(model).gaussian(model.vae.encoder, read(np.asarray(data["counts"], float)))[0]
        np.testing.assert_allclose(model.get_latents(data["counts"])[0], expected, rtol=1e-4, atol=1e-5)


def test_starts_from_the_mean_fractions():
    model, counts = SCVI(GENES, rngs=nnx.Rngs(0)), np.asarray(toy_cells(cells=200)["counts"])
    model.start_from(counts)
    start = jax.nn.softmax(model.vae.decoder.fraction.bias[...])
    np.testing.assert_allclose(start, counts.sum(0) / counts.sum(), atol=0.01)


def test_latents_of_a_model_whose_encoders_read_covariates():
    model, data = build(SCVI, encode_covariates=True, use_observed_lib_size=False), toy_cells()
    known = {"batch_index": data["batch_labels"], "cat_covs": data["cat_covs"], "cont_covs": data["cont_covs"]}
    found = model.inference(data["counts"], **known)
    np.testing.assert_allclose(model.get_latents(data["counts"], **known)[0], found["qz_m"], rtol=1e-6)
    np.testing.assert_allclose(model.sample_from_posterior_l(data["counts"], **known), found["ql_m"], rtol=1e-6)
    for call in (model.get_latents, model.sample_from_posterior_l, model.get_sample_from_posterior_z):
        with pytest.raises(DataError, match="batch_index is None, but the model was built for it; pass it"):
            call(data["counts"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dispersion": "cell"},
            "dispersion must be one of 'gene', 'gene-batch', 'gene-label', 'gene-cell', got 'cell'",
        ),
        ({"reconstruction_loss": "normal"}, "reconstruction_loss must be one of 'zinb', 'nb', 'poisson', got 'normal'"),
        ({"n_latent": 0}, "n_latent must be a whole number, at least 1, got 0"),
        ({"n_layers": 0}, "n_layers must be a whole number, at least 1, got 0"),
        ({"n_batch": -1}, "n_batch must be a whole number, at least 0, got -1"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
        ({"n_cats_per_cov": (2, 0)}, "n_cats_per_cov must be a whole number, at least 1, got 0"),
        ({"dispersion": "gene-label", "n_labels": 0}, "dispersion 'gene-label' needs n_labels"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=f"SCVI: {message}"):
        build(SCVI, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_index": None}, "batch_index is None, but the model was built for it; pass it"),
        ({"cat_covs": None}, "cat_covs is None"),
        ({"cont_covs": None}, "cont_covs is None"),
        ({"cat_covs": jnp.zeros((CELLS, 3), int)}, "cat_covs has 3 columns, but the model was built for 2"),
        ({"cont_covs": jnp.zeros((CELLS, 2))}, "cont_covs has 2 columns, but the model was built for 1"),
    ],
)
def test_bad_data_is_named(change, message):
    data = toy_cells()
    with pytest.raises(DataError, match=f"SCVI: {message}"):
        build(SCVI).forward(data["counts"], **(arguments(data) | change))


def test_norms_and_deep_injection():
    """Without a batch norm cells do not depend on each other in train mode; the layer norm is that of numpy."""
    data = toy_cells()
    model = build(SCVI, use_batch_norm="none", use_layer_norm="both", deeply_inject_covariates=False, n_layers=2)
    block = model.vae.encoder.network.blocks[0]
    h = np.log1p(np.asarray(data["counts"])) @ block.linear.kernel[...] + block.linear.bias[...]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(block(jnp.log1p(data["counts"])), np.maximum(h, 0), rtol=1e-4, atol=1e-5)
    assert model.vae.decoder.network.blocks[1].linear.in_features == 4  # nothing is injected there
    gradients_are_right(model, data)
    for where, of_encoder, of_decoder in (("encoder", True, False), ("decoder", False, True)):
        vae = build(SCVI, use_batch_norm=where, use_layer_norm=where).vae
        blocks = (vae.encoder.network.blocks[0], of_encoder), (vae.decoder.network.blocks[0], of_decoder)
        for block, has in blocks:
            assert (block.norm is not None) == (block.layer_norm is not None) == has


def test_the_published_default_is_a_latent_library():
    model, data = SCVI(GENES, rngs=nnx.Rngs(0)), toy_cells()
    with pytest.raises(DataError, match="pass local_l_mean and local_l_var, or build the model with use_observed_lib"):
        model.forward(data["counts"])
    low, high = (model.forward(data["counts"], jnp.full(CELLS, m), jnp.ones(CELLS))[0] for m in (3.0, 9.0))
    assert (high > low).all()
