from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import check_reverse, in_float64
from flax import nnx
from scipy.special import logsumexp
from scipy.stats import nbinom, poisson

from diffbio.errors import ConfigError
from diffbio.nn import cellassign
from diffbio.nn.cellassign import CellAssign, highest_markers

MARKERS = np.zeros((4, 15), np.float32)  # the last type has none: "other"; genes 12 to 14 are markers of none
for c in range(3):
    MARKERS[c, 4 * c : 4 * c + 4] = 1.0


def simulated(cells=600, seed=0, depth=1.0, effect=2.0, shares=(0.4, 0.3, 0.2, 0.1), covariate=0.0, theta=3.0):
    """Counts of the published model, in which every type has the base of what it does not list; see `best` below."""
    rng = np.random.default_rng(seed)
    base, delta = rng.normal(-0.5, 0.5, 15), effect * rng.uniform(0.7, 1.3, MARKERS.shape)
    truth = rng.choice(4, size=cells, p=shares)
    size = rng.lognormal(0.0, 0.4, cells)
    x = rng.integers(2, size=(cells, 1))
    mean = depth * size[:, None, None] * np.exp(base + MARKERS * delta + (covariate * x)[:, None])
    of_cell = mean[np.arange(cells), truth]
    counts = rng.negative_binomial(theta, theta / (theta + of_cell))
    joint = np.log(np.maximum(shares, 1e-9)) + nbinom.logpmf(counts[:, None], theta, theta / (theta + mean)).sum(-1)
    return Simulated(*map(np.float32, (counts, size, x)), truth, delta, joint.argmax(1))


class Simulated(NamedTuple):
    counts: np.ndarray
    size: np.ndarray
    x: np.ndarray
    truth: np.ndarray
    delta: np.ndarray
    best: np.ndarray  # types by the model that they were drawn from: none can be right more often


def random_model(seed=0, spread=0.5, **how):
    """Every parameter away from its start, so that no gradient is 0 by symmetry."""
    model = CellAssign(15, 4, rngs=nnx.Rngs(seed), **how)
    rng = np.random.default_rng(seed)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + spread * rng.normal(size=p.shape).astype(np.float32), params))
    return model


def example(likelihood="nb", covariates=2, cells=12):
    counts, size, *_ = simulated(cells)
    soft = np.clip(MARKERS + np.random.default_rng(3).uniform(-0.3, 0.3, MARKERS.shape), 0, 1).astype(np.float32)
    x = np.random.default_rng(4).normal(size=(cells, covariates)).astype(np.float32) if covariates else None
    model = random_model(likelihood=likelihood, n_covariates=covariates)
    return model, [jnp.asarray(counts), jnp.asarray(soft), jnp.asarray(size), None if x is None else jnp.asarray(x)]


def fitted(counts, size, markers=MARKERS, x=None, em_rounds=2, **how):
    model = CellAssign(
        counts.shape[1], len(markers), n_covariates=0 if x is None else x.shape[1], rngs=nnx.Rngs(0), **how
    )
    model.start_from(counts, markers, size, x, em_rounds=em_rounds)
    covariates = None if x is None else jnp.asarray(x)
    found = model.log_probabilities(jnp.asarray(counts), jnp.asarray(markers), jnp.asarray(size), covariates)
    return model, np.exp(np.asarray(found))


@pytest.mark.parametrize("type_sd", [0.0, 0.3])
@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_the_posterior_is_the_one_that_scipy_computes(likelihood, type_sd):
    model = random_model(likelihood=likelihood, n_covariates=2, type_sd=type_sd)
    counts, size, *_ = simulated(20)
    x = np.random.default_rng(4).normal(size=(20, 2)).astype(np.float32)
    p = {name: np.asarray(value[...], float) for name, value in nnx.state(model, nnx.Param).items()}
    log_mean = p["base"] + MARKERS * (0.2 + np.exp(p["log_effect"]))
    if type_sd:
        log_mean += type_sd * (1 - MARKERS) * MARKERS.any(0) * p["deviation"]
    mean = size[:, None, None] * np.exp(log_mean + (x @ p["covariate_weights"])[:, None])
    if likelihood == "poisson":
        by_type = poisson.logpmf(counts[:, None], mean).sum(-1)
    else:
        centres = np.linspace(np.log(1e-3), np.log(1e4), 10)
        bases = np.exp(-0.5 * ((log_mean[..., None] - centres) / (centres[1] - centres[0])) ** 2)
        theta = np.exp(bases @ p["dispersion_weights"] / bases.sum(-1))
        by_type = nbinom.logpmf(counts[:, None], theta, theta / (theta + mean)).sum(-1)
    joint = p["type_logits"] - logsumexp(p["type_logits"]) + by_type
    data = jnp.asarray(counts), jnp.asarray(MARKERS), jnp.asarray(size), jnp.asarray(x)
    np.testing.assert_allclose(model.log_joint(*data), joint, rtol=2e-5, atol=1e-3)
    found = model.log_probabilities(*data)
    np.testing.assert_allclose(np.exp(found), np.exp(joint - logsumexp(joint, axis=1, keepdims=True)), atol=1e-3)
    loss, parts = model.loss(*data)
    np.testing.assert_allclose(parts["negative_log_likelihood"], -logsumexp(joint, axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, sum(parts.values()), rtol=1e-6)


def test_cells_of_the_model_are_given_their_types_and_effects():
    made = simulated(1000)
    model, p = fitted(made.counts, made.size, em_rounds=6)
    called = p.argmax(1)
    assert (called == made.truth).mean() > (made.best == made.truth).mean() - 0.01
    other = made.truth == 3
    assert (called == made.truth)[other].mean() > (made.best == made.truth)[other].mean() - 0.05
    assert abs(p.max(1).mean() - (called == made.truth).mean()) < 0.02  # probabilities mean what they say
    listed = MARKERS > 0
    found = np.asarray(model.log_fold_change)[listed]
    assert np.corrcoef(found, made.delta[listed])[0, 1] > 0.9
    assert abs(found - made.delta[listed]).mean() < 0.25
    np.testing.assert_allclose(np.exp(model.log_proportions), np.bincount(made.truth) / 1000, atol=0.03)
    # the inverse dispersion that they were drawn with, 3, at the mean of most counts
    assert 2.0 < np.exp(model.log_dispersion(jnp.asarray(1.0))) < 4.5


def test_types_that_lie_off_the_base_are_told_apart():
    """A gene that one type lists is half as high in another: the published model calls that other type by it."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=500)
    log_mean = np.full((3, 9), -1.0)
    for c in range(3):
        log_mean[c, 3 * c : 3 * c + 3] = 1.5
    log_mean[1, 0:3] = 0.7
    markers = (log_mean > 1).astype(np.float32)
    counts = rng.negative_binomial(4, 4 / (4 + np.exp(log_mean[truth]))).astype(np.float32)
    size = np.ones(500, np.float32)
    right = {sd: (fitted(counts, size, markers, type_sd=sd)[1].argmax(1) == truth).mean() for sd in (0.0, 0.3)}
    assert right[0.3] > 0.97
    assert right[0.3] >= right[0.0]


def test_the_loss_has_the_gradient_of_expectation_maximisation():
    model, data = example()
    graphdef, params = nnx.split(model)
    members = jnp.exp(model.log_probabilities(*data))

    def expected(params):
        model = nnx.merge(graphdef, params)
        joint = (members * model.log_joint(*data)).sum(1).mean()
        return -joint - model.log_prior(data[1]) / len(data[0])

    both = jax.jit(lambda p: (jax.grad(lambda p: nnx.merge(graphdef, p).loss(*data)[0])(p), jax.grad(expected)(p)))
    for a, b in zip(*map(jax.tree.leaves, both(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_prior_is_shared_by_the_minibatches_of_an_epoch():
    model, data = example(cells=12)
    halves = [
        [None if v is None else v if v is data[1] else v[rows] for v in data] for rows in (slice(6), slice(6, 12))
    ]
    whole = model.loss(*data)[0]
    np.testing.assert_allclose(np.mean([model.loss(*half, n_cells=12)[0] for half in halves]), whole, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "poisson", "zinb"])
def test_gradients_are_those_of_finite_differences(likelihood):
    with jax.enable_x64(True):
        model, data = example(likelihood)
        if likelihood == "zinb":
            data[0] = data[0] + 0.5  # it is not continuous at 0
        model, data = nnx.merge(nnx.split(model)[0], in_float64(nnx.split(model)[1])), in_float64(data)
        graphdef, params = nnx.split(model)
        check_reverse(lambda data: model.log_probabilities(*data), data)

        def both(params):
            model = nnx.merge(graphdef, params)
            return model.log_probabilities(*data), model.loss(*data)[0]

        check_reverse(both, params)


@pytest.mark.parametrize(("likelihood", "covariates"), [("nb", 0), ("poisson", 0), ("zinb", 2)])
def test_every_parameter_and_input_has_a_gradient(likelihood, covariates):
    model, data = example(likelihood, covariates)
    grads, of_inputs = gradients(*nnx.split(model), [v for v in data if v is not None])
    assert ("covariate_weights" in grads) == (covariates > 0)
    assert ("dropout_logit" in grads) == (likelihood == "zinb")
    for path, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad[...]).all(), path
        assert np.abs(grad[...]).max() > 0, path
    for grad in of_inputs:
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 0


@partial(jax.jit, static_argnums=0)
def gradients(graphdef, params, inputs):
    def total(params, inputs):
        model = nnx.merge(graphdef, params)
        return model.loss(*inputs)[0] + (model.log_probabilities(*inputs) ** 2).mean()

    return jax.grad(total, (0, 1))(params, inputs)


@pytest.mark.parametrize(
    ("counts", "size", "likelihood"),
    [
        (np.zeros((5, 15)), np.zeros(5), "nb"),
        (np.zeros((5, 15)), np.ones(5), "zinb"),
        (np.full((1, 15), 7.0), np.ones(1), "nb"),
        (np.ones((5, 15)), np.ones(5), "nb"),
        (np.full((5, 15), 1e5), np.full(5, 1e3), "nb"),
    ],
)
def test_odd_cells_stay_finite_with_their_gradients(counts, size, likelihood):
    model = CellAssign(15, 4, likelihood=likelihood, rngs=nnx.Rngs(0))
    counts, size = np.float32(counts), np.float32(size)
    model.start_from(counts, MARKERS, size)
    inputs = [jnp.asarray(v) for v in (counts, MARKERS, size)]
    found = model.log_probabilities(*inputs)
    for leaf in jax.tree.leaves((nnx.state(model), found, gradients(*nnx.split(model), inputs))):
        assert np.isfinite(leaf).all()


def test_genes_that_are_no_markers_tell_nothing_of_types():
    model, data = example(covariates=0)
    counts, _, size, _ = data
    rho = jnp.asarray(MARKERS)
    more = counts.at[:, 12:].add(5.0)
    np.testing.assert_allclose(
        model.log_probabilities(counts, rho, size), model.log_probabilities(more, rho, size), atol=1e-4
    )


def test_depth_does_not_matter():
    counts, size, *_ = simulated(500, depth=10.0)
    rng = np.random.default_rng(0)
    fewer = rng.binomial(counts.astype(int), 0.3).astype(np.float32)
    deep, shallow = fitted(counts, size)[1], fitted(fewer, size)[1]
    assert (deep.argmax(1) == shallow.argmax(1)).mean() > 0.95
    # counts and size factor together: the same rates
    same = fitted(counts, 10 * size)[1]
    assert (deep.argmax(1) == same.argmax(1)).mean() > 0.99
    np.testing.assert_array_equal(highest_markers(counts, MARKERS, size), highest_markers(0.3 * counts, MARKERS, size))


def test_types_with_more_markers_are_not_favoured():
    made = simulated(500, shares=(0.4, 0.3, 0.3, 0.0), effect=3.0)
    markers = MARKERS[:3].copy()
    markers[0, :3] = 0.0  # one marker left of four
    called = fitted(made.counts, made.size, markers)[1].argmax(1)
    assert (called == made.truth).mean() > 0.95
    np.testing.assert_allclose(np.bincount(called, minlength=3), np.bincount(made.truth), atol=20)


def test_covariates_are_taken_out():
    made = simulated(500, covariate=1.5)
    model, p = fitted(made.counts, made.size, x=made.x)
    assert (p.argmax(1) == made.truth).mean() > (made.best == made.truth).mean() - 0.01
    np.testing.assert_allclose(model.covariate_weights[:, :12], 1.5, atol=0.4)


def test_more_cells_than_are_fitted_at_the_start(monkeypatch):
    made = simulated(1000)
    monkeypatch.setattr(cellassign, "START_CELLS", 500)
    called = fitted(made.counts, made.size)[1].argmax(1)
    assert (called == made.truth).mean() > (made.best == made.truth).mean() - 0.03


def test_a_list_without_markers_leaves_all_types_alike():
    counts, size, *_ = simulated(50)
    model, p = fitted(counts, size, np.zeros_like(MARKERS))
    np.testing.assert_allclose(p, 0.25, atol=1e-3)
    np.testing.assert_allclose(model.base[...], np.log(counts.sum(0) / size.sum()), atol=0.3)


@pytest.mark.parametrize(
    "wrong",
    [{"n_genes": 0}, {"n_types": 1.5}, {"likelihood": "normal"}, {"type_sd": -1.0}, {"min_log_fold_change": np.inf}],
)
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises((ConfigError, TypeError), match=next(iter(wrong))):
        CellAssign(**({"n_genes": 3, "n_types": 2} | wrong), rngs=nnx.Rngs(0))


def test_missing_covariates_are_named():
    model, data = example()
    with pytest.raises(ConfigError, match="covariates is None"):
        model.log_joint(*data[:3])


def test_surprise_is_the_mean_squared_pearson_residual():
    rng = np.random.default_rng(0)
    markers = (np.arange(12)[None] % 3 == np.arange(3)[:, None]).astype(np.float32)
    model = CellAssign(12, 3, rngs=nnx.Rngs(0))
    model.base[...] = jnp.asarray(rng.normal(0.5, 0.3, 12), jnp.float32)
    size = rng.uniform(0.5, 2.0, 4000).astype(np.float32)
    log_mean = np.asarray(model.log_mean(jnp.asarray(markers)))
    theta = np.exp(np.asarray(model.log_dispersion(jnp.asarray(log_mean))))
    mean = size[:, None] * np.exp(log_mean[1])
    counts = rng.poisson(rng.gamma(theta[1], mean / theta[1])).astype(np.float32)
    found = np.asarray(model.surprise(jnp.asarray(counts), jnp.asarray(markers), jnp.asarray(size)))
    np.testing.assert_allclose(found[:, 1], ((counts - mean) ** 2 / (mean + mean**2 / theta[1])).mean(1), rtol=1e-3)
    assert abs(found[:, 1].mean() - 1) < 0.05, "of cells that are of the type it is 1 on average"
    assert found[:, 0].mean() > 1.2
