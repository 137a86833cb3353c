import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special
from toy_modules import (
    BATCHES,
    CELLS,
    GENES,
    LABELS,
    InNumpy,
    arguments,
    build,
    gradients_are_right,
    log_normal,
    published,
    toy_cells,
)

from diffbio.errors import ConfigError, DataError
from diffbio.nn import SCANVI, SCVI

PRIOR = (0.1, 0.5, 0.4)
GROUPS = {"labels_groups": [0, 0, 1], "use_labels_groups": True}


def total(model, data, **more):
    """The negative bound of every cell."""
    return sum(model.forward(data["counts"], **(arguments(data) | more)))


def bound_in_numpy(model, data, label, rng=None):
    """One-draw estimate of the bound of every cell of type `label` (None: unknown, the type drawn from q(c | z)).

    Reference 003's log p(x, c, z, u) - log q(z | x) - log q(c | z) - log q(u | z, c), where a known c has no
    q(c | z). Without rng: at the means of z and u, KL(q(u | z, c) || N(0, I)) in closed form.
    """
    again = InNumpy(model)
    cells = len(data["counts"])
    mean, var = again.gaussian(model.vae.encoder, np.log1p(np.asarray(data["counts"], float)))
    z = mean if rng is None else mean + np.sqrt(var) * rng.normal(size=mean.shape)
    log_q_class = again.log_q_class(z)
    if label is None:  # by the Gumbel trick
        c = np.argmax(log_q_class + rng.gumbel(size=log_q_class.shape), -1)
        log_q_c = log_q_class[np.arange(cells), c]
    else:
        c, log_q_c = np.full(cells, label), 0.0
    one_hot = np.eye(LABELS)[c]
    u_mean, u_var = again.gaussian(model.encoder_z2_z1, z, one_hot)
    u = u_mean if rng is None else u_mean + np.sqrt(u_var) * rng.normal(size=u_mean.shape)
    log_p_z = log_normal(z, *again.gaussian(model.decoder_z1_z2, u, one_hot, floor=0.0))
    if rng is None:
        of_u = -0.5 * (u_var + u_mean**2 - 1 - np.log(u_var)).sum(-1)
    else:
        of_u = log_normal(u, 0.0, np.ones_like(u)) - log_normal(u, u_mean, u_var)
    prior = np.log(PRIOR)[c]
    return again.log_p_counts(z, data) + log_p_z + of_u + prior - log_normal(z, mean, var) - log_q_c


def copies(data, cell, n):
    return {k: jnp.broadcast_to(v[cell], (n, *v.shape[1:])) for k, v in data.items()}


def test_constructor_and_methods_are_the_published_ones():
    empty = inspect.Parameter.empty
    lines = [
        ("n_input", empty), ("n_batch", 0), ("n_labels", 0), ("n_hidden", 128), ("n_latent", 10), ("n_layers", 1),
        ("dropout_rate", 0.1), ("dispersion", "gene"), ("log_variational", True), ("reconstruction_loss", "zinb"),
        ("y_prior", None), ("labels_groups", None), ("use_labels_groups", False), ("classifier_parameters", None),
    ]  # fmt: skip
    published(SCANVI.__init__, lines)
    # the published ones need the library's prior, ours only where it is latent
    wanted = [("x", empty), ("local_l_mean", None), ("local_l_var", None), ("batch_index", None), ("y", None)]
    published(SCANVI.forward, wanted)
    published(SCANVI.classify, [("x", empty)])
    published(SCANVI.get_latents, [("x", empty), ("y", None)])
    assert issubclass(SCANVI, SCVI)
    # the published examples; an empty dict of classifier parameters is the published default
    SCANVI(GENES, n_batch=BATCHES * False, n_labels=3, classifier_parameters={}, rngs=nnx.Rngs(0))
    model = SCANVI(
        GENES, n_batch=BATCHES * False, n_labels=3, y_prior=jnp.array([[0.1, 0.5, 0.4]]), labels_groups=[0, 0, 1],
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    np.testing.assert_allclose(model.log_y_prior[...], np.log(PRIOR), rtol=1e-6)
    assert model.classifier.network.blocks[0].linear.out_features == 128
    assert model.classifier.network.blocks[0].dropout.rate == 0.1
    reconstruction, kl, zero = model.forward(
        toy_cells()["counts"], jnp.full((CELLS, 1), 3.0), jnp.full((CELLS, 1), 0.5), jnp.zeros(CELLS, int)
    )
    assert reconstruction.shape == kl.shape == zero.shape == (CELLS,)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_gradients(turn):
    """Every likelihood and dispersion, with latent and observed library and groups in turn; the rest is SCVI's."""
    likelihood = ("zinb", "nb", "poisson")[turn]
    for i, dispersion in enumerate(("gene", "gene-batch", "gene-label", "gene-cell")):
        model = build(
            SCANVI, reconstruction_loss=likelihood, dispersion=dispersion, use_observed_lib_size=(i + turn) % 2 == 0,
            **(GROUPS if (i // 2 + turn) % 2 == 0 else {}),
        )  # fmt: skip
        gradients_are_right(model, toy_cells())


def test_gradients_by_every_parameter_one_by_one():
    parts = ("classifier", "classifier_groups", "encoder_z2_z1", "decoder_z1_z2")
    gradients_are_right(build(SCANVI, use_observed_lib_size=False, **GROUPS), toy_cells(), one_by_one=parts)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_labelled_bound_is_that_of_the_reference(label):
    model, data = build(SCANVI, y_prior=PRIOR), toy_cells()
    ours = total(model, data, y=jnp.full(CELLS, label))
    np.testing.assert_allclose(ours, -bound_in_numpy(model, data, label), rtol=1e-5)


def test_unlabelled_bound_sums_over_the_types():
    model, data = build(SCANVI, y_prior=PRIOR), toy_cells()
    z = model.get_latents(data["counts"])[0]
    q = np.exp(InNumpy(model).log_q_class(np.asarray(z, float)))
    by_type = np.stack([bound_in_numpy(model, data, label) for label in range(LABELS)], -1)
    expected = -(q * (by_type - np.log(q))).sum(-1)
    for nobody in (None, jnp.full(CELLS, LABELS), jnp.full(CELLS, -1), jnp.zeros((CELLS, LABELS))):
        np.testing.assert_allclose(total(model, data, y=nobody), expected, rtol=1e-5)


def test_an_unlabelled_cell_has_the_likelihood_of_every_type_in_turn():
    """With a dispersion by type p(x | z, c) is a term of the sum over the types, not one of the mean dispersion."""
    model, data = build(SCANVI, dispersion="gene-label", y_prior=PRIOR), toy_cells()
    by_type = np.stack([total(model, data, y=jnp.full(CELLS, c)) for c in range(LABELS)], -1)
    q = np.asarray(model.classify(data["counts"]), float)
    expected = (q * (by_type + np.log(q))).sum(-1)
    np.testing.assert_allclose(total(model, data, y=None), expected, rtol=1e-5)
    theta = model.vae.decoder.log_theta
    first = total(model, data, y=jnp.zeros(CELLS, int))
    theta.set_value(theta[...].at[1].add(2.0))
    np.testing.assert_array_equal(total(model, data, y=jnp.zeros(CELLS, int)), first)
    assert (np.abs(total(model, data, y=None) - expected) > 1e-4).all()


def test_without_labels_there_is_one_type():
    """The published default, n_labels=0: a prior of z that is learned, of one type."""
    model, data = SCANVI(GENES, rngs=nnx.Rngs(0)), toy_cells()
    prior = {key: data[key] for key in ("local_l_mean", "local_l_var")}
    parts = model.forward(data["counts"], **prior)
    known = model.forward(data["counts"], **prior, y=jnp.zeros(CELLS, int))
    for part, same in zip(parts, known, strict=True):
        np.testing.assert_allclose(part, same, rtol=1e-6)
    np.testing.assert_array_equal(model.classify(data["counts"]), np.ones((CELLS, 1)))


@pytest.mark.parametrize("label", [None, 1])
def test_bound_equals_monte_carlo_over_position_type_and_state(label):
    model, n = build(SCANVI, y_prior=PRIOR), 40_000
    data = copies(toy_cells(), 3, n)
    y = jnp.full(n, LABELS if label is None else label)
    ours = -np.asarray(total(model, data, y=y, key=jax.random.key(0)), float)
    theirs = bound_in_numpy(model, data, label, np.random.default_rng(0))
    error = np.hypot(ours.std(), theirs.std()) / np.sqrt(n)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    # the error is small against each term that could be forgotten
    q = np.asarray(model.classify(data["counts"][:1]))[0]
    assert error < 0.1 * -(q * np.log(q)).sum()
    # summing over the types in place of drawing one leaves less noise
    assert label is not None or ours.std() < theirs.std()


def test_labelled_cells_among_unlabelled_ones():
    model, data = build(SCANVI, y_prior=PRIOR), toy_cells()
    y = jnp.array([0, LABELS, 1, -1, 2, 99, 0])
    mixed = total(model, data, y=y)
    for i, label in enumerate(y):
        alone = total(model, data, y=jnp.full(CELLS, label) if 0 <= label < LABELS else None)
        np.testing.assert_allclose(mixed[i], alone[i], rtol=1e-5)
    for same in (y[:, None], jax.nn.one_hot(y, LABELS)):
        np.testing.assert_allclose(total(model, data, y=same), mixed, rtol=1e-6)


def test_parts_of_forward():
    """The first holds what is of x and z, the second what is of u, c and the library."""
    model, data = build(SCANVI, y_prior=PRIOR, use_observed_lib_size=False), toy_cells()
    again = InNumpy(model)
    y = jnp.full(CELLS, 1)
    _, kl, zero = model.forward(data["counts"], **(arguments(data) | {"y": y}))
    z = np.asarray(model.get_latents(data["counts"], y)[0], float)
    u = np.asarray(model.get_latents_u(data["counts"], y), float)
    one_hot = np.eye(LABELS)[np.asarray(y)]
    mean, var = again.gaussian(model.encoder_z2_z1, z, one_hot)
    np.testing.assert_allclose(u, mean, rtol=1e-5)
    m, v = again.gaussian(model.vae.library_encoder, np.log1p(np.asarray(data["counts"], float)))
    m0, v0 = (np.asarray(data[k], float)[:, None] for k in ("local_l_mean", "local_l_var"))
    kl_library = (0.5 * np.log(v0 / v) + (v + (m - m0) ** 2) / (2 * v0) - 0.5)[:, 0]
    kl_u = 0.5 * (var + mean**2 - 1 - np.log(var)).sum(-1)
    np.testing.assert_allclose(kl, kl_u - np.log(PRIOR[1]) + kl_library, rtol=1e-5)
    assert (zero == 0).all()
    with pytest.raises(DataError, match="SCANVI: the library size is latent; pass local_l_mean and local_l_var"):
        model.forward(data["counts"], **arguments(data, without=("local_l_mean",)))


def test_objective_weighs_the_divergences_and_the_classifier():
    model, data = build(SCANVI, y_prior=PRIOR, use_observed_lib_size=False), toy_cells()
    reconstruction, kl, _ = (np.asarray(p, float) for p in model.forward(data["counts"], **arguments(data)))
    y = np.asarray(data["labels"])
    known = y < LABELS
    assert 0 < known.sum() < CELLS
    log_p = np.log(model.classify(data["counts"]))
    cross_entropy = -log_p[known, y[known]].mean()
    for kl_weight, weight in ((1.0, 0.0), (0.3, 50.0), (0.0, 2.0)):
        loss, metrics = model.objective(data, kl_weight=kl_weight, classification_weight=weight)
        expected = (reconstruction + kl_weight * kl).mean() + weight * cross_entropy
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["classification"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (log_p.argmax(-1) == y)[known].mean(), rtol=1e-6)
    nobody = data | {"labels": jnp.full(CELLS, LABELS)}
    loss, metrics = model.objective(nobody)
    assert metrics["classification"] == 0
    assert jnp.isfinite(loss)


def test_labelled_cells_of_their_own():
    model, data = build(SCANVI, encode_covariates=True), toy_cells()
    plain = model.objective(data)[1]
    other = toy_cells(seed=4)
    other["labels"] = jnp.arange(CELLS) % LABELS
    extra = {f"labelled_{k}": v for k, v in other.items()}
    loss, metrics = model.objective(data | extra, classification_weight=7.0)
    np.testing.assert_allclose(metrics["kl"], plain["kl"], rtol=1e-6)
    known = {"batch_index": other["batch_labels"], "cat_covs": other["cat_covs"], "cont_covs": other["cont_covs"]}
    log_p = np.log(model.classify(other["counts"], **known))
    cross_entropy = -log_p[np.arange(CELLS), np.asarray(other["labels"])].mean()
    np.testing.assert_allclose(metrics["classification"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(loss - model.objective(data, classification_weight=0.0)[0], 7 * cross_entropy, rtol=1e-3)


def test_classes_without_groups_are_the_softmax_of_the_classifier_at_the_mean():
    model, data = build(SCANVI), toy_cells()
    z = InNumpy(model).gaussian(model.vae.encoder, np.log1p(np.asarray(data["counts"], float)))[0]
    np.testing.assert_allclose(model.classify(data["counts"]), np.exp(InNumpy(model).log_q_class(z)), rtol=1e-4)


def test_hierarchical_classes():
    model, data = build(SCANVI, **GROUPS), toy_cells()
    z = model.get_latents(data["counts"])[0]
    p = np.asarray(model.classify(data["counts"]), float)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)
    of_group = special.softmax(np.asarray(model.classifier_groups(z), float), -1)
    np.testing.assert_allclose(p[:, 0] + p[:, 1], of_group[:, 0], rtol=1e-5)
    np.testing.assert_allclose(p[:, 2], of_group[:, 1], rtol=1e-5)
    unnormalised = np.exp(np.asarray(model.classifier(z), float))
    np.testing.assert_allclose(p[:, 0] / p[:, 1], unnormalised[:, 0] / unnormalised[:, 1], rtol=1e-4)
    # the groups are a label for people alone where they are not used
    plain = build(SCANVI, labels_groups=[0, 0, 1])
    assert plain.classifier_groups is None
    np.testing.assert_array_equal(plain.classify(data["counts"]), build(SCANVI).classify(data["counts"]))
    # the bound uses the same q(c | z)
    loss = total(model, data, y=None)
    model.classifier_groups.logits.bias[...] = jnp.array([3.0, -3.0])
    assert (jnp.abs(total(model, data, y=None) - loss) > 1e-3).all()


def test_temperature_is_that_of_predictions_alone():
    def of_groups(q):
        return np.stack([q[:, :2].sum(-1), q[:, 2]], -1)

    data = toy_cells()
    for settings in ({}, GROUPS):
        model = build(SCANVI, **settings)
        p, loss = np.asarray(model.classify(data["counts"]), float), total(model, data, y=None)
        model.temperature.set_value(jnp.array(2.0))
        np.testing.assert_array_equal(total(model, data, y=None), loss)
        found = np.asarray(model.classify(data["counts"]), float)
        # of the types, or of the groups and of the types within the first of them
        tempered = [of_groups, lambda q: q[:, :2]] if settings else [lambda q: q]
        for take in tempered:
            expected, part = np.sqrt(take(p)), take(found)
            expected, part = (x / x.sum(-1, keepdims=True) for x in (expected, part))
            np.testing.assert_allclose(part, expected, rtol=1e-4)
        np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-5)


def test_modes_latents_and_jit():
    model, data = build(SCANVI, use_observed_lib_size=False), toy_cells()
    np.testing.assert_array_equal(total(model, data), total(model, data))
    assert (jnp.abs(total(model, data, key=jax.random.key(0)) - total(model, data)) > 0).all()
    (z,) = model.get_latents(data["counts"])  # the published form: a list of one
    u = model.get_latents_u(data["counts"])
    likeliest = jnp.argmax(model.classify(data["counts"]), -1)
    np.testing.assert_allclose(u, model.get_latents_u(data["counts"], likeliest), rtol=1e-6)
    assert jnp.abs(u - model.get_latents_u(data["counts"], (likeliest + 1) % LABELS)).max() > 1e-3
    assert z.shape == u.shape == (CELLS, 2)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, data):
        return nnx.merge(graph, state).objective(data)[0]

    np.testing.assert_allclose(run(state, data), model.objective(data)[0], rtol=1e-5)
    model.train()
    assert (jnp.abs(total(model, data) - total(model, data)) > 0).all()


def test_empty_and_single_cells_are_finite():
    model, data = build(SCANVI), toy_cells()
    data["counts"] = data["counts"].at[1].set(0.0)
    whole = total(model, data)
    for i in (0, 1):
        one = {k: v[i : i + 1] for k, v in data.items()}
        np.testing.assert_allclose(total(model, one), whole[i : i + 1], rtol=1e-5)
    slopes = jax.grad(lambda x: model.objective(data | {"counts": x})[0])(data["counts"])
    assert jnp.isfinite(slopes).all()
    assert jnp.isfinite(model.classify(jnp.zeros((1, GENES)))).all()


def test_classifier_parameters():
    linear = build(SCANVI, classifier_parameters={"n_layers": 0})
    assert len(linear.classifier.network.blocks) == 0
    deep = build(SCANVI, classifier_parameters={"n_hidden": 9, "n_layers": 2, "dropout_rate": 0.4})
    assert [b.linear.out_features for b in deep.classifier.network.blocks] == [9, 9]
    assert deep.classifier.network.blocks[0].dropout.rate == 0.4
    own = build(SCANVI, n_layers=2)
    assert [b.linear.out_features for b in own.classifier.network.blocks] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_labels": -1}, "n_labels must be a whole number, at least 0, got -1"),
        ({"n_labels": 0, "dispersion": "gene-label"}, "dispersion 'gene-label' needs n_labels"),
        ({"use_layer_norm": "all"}, "use_layer_norm must be one of 'encoder', 'decoder', 'both', 'none', got 'all'"),
        ({"y_prior": (0.5, 0.5)}, "y_prior must be 3 probabilities above 0 that sum to 1"),
        ({"y_prior": (0.5, 0.4, 0.0)}, "y_prior must be 3 probabilities"),
        ({"y_prior": (1.0, 1.0, 1.0)}, "y_prior must be 3 probabilities"),
        ({"use_labels_groups": True}, "use_labels_groups needs labels_groups"),
        ({"labels_groups": (0, 2, 2)}, "labels_groups must hold 3 group numbers from 0 without a gap"),
        ({"labels_groups": (0, 1)}, "labels_groups must hold 3 group numbers"),
        ({"labels_groups": ()}, "labels_groups must hold 3 group numbers"),
        ({"classifier_parameters": {"n_hiden": 3}}, r"unknown classifier_parameters \['n_hiden'\]; known are n_hidden"),
        ({"reconstruction_loss": "gauss"}, "reconstruction_loss must be one of"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=f"SCANVI: {message}"):
        build(SCANVI, **settings)


def test_bad_data_is_named():
    model, data = build(SCANVI), toy_cells()
    with pytest.raises(DataError, match="SCANVI: batch_index is None, but the model was built for it; pass it"):
        total(model, data, batch_index=None)
    with pytest.raises(DataError, match=r"SCANVI: y must have shape \(cells,\), \(cells, 1\) or \(cells, 3\), got"):
        total(model, data, y=jnp.zeros((CELLS, 2)))
    with pytest.raises(DataError, match="SCANVI: cat_covs has 1 columns, but the model was built for 2"):
        total(model, data, cat_covs=data["cat_covs"][:, :1])
    reads = build(SCANVI, encode_covariates=True)
    with pytest.raises(DataError, match="SCANVI: batch_index is None"):
        reads.classify(data["counts"])
