import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal

from diffbio.errors import ConfigError, DataError
from diffbio.nn import SCANVI, class_fit
from diffbio.nn.class_fit import adapt_classes, best_temperature, fit_classes, folded_temperature


def blobs(seed=0, cells=300, spread=0.4):
    """Three clouds in two dimensions, one labelled cell in each."""
    rng = np.random.default_rng(seed)
    truth = np.arange(cells) % 3
    z = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])[truth] + spread * rng.normal(size=(cells, 2))
    labels = np.full(cells, -1)
    labels[:3] = truth[:3]
    return z, labels, truth


def probabilities(z, found, batch=None):
    return softmax(found.logits(z, batch), axis=1)


def test_unlabelled_cells_move_the_border_between_three_labels():
    z, labels, truth = blobs()
    p = probabilities(z, fit_classes(z, labels, 3))
    assert (p.argmax(1) == truth).mean() > 0.99
    assert p.max(1).mean() > 0.95  # three labels alone leave a regression unsure


def test_the_origin_of_the_latent_space_does_not_matter():
    z, labels, _ = blobs()
    batch = np.arange(len(z)) // 2 % 2
    here, there = (
        probabilities(x, fit_classes(x, labels, 3, batch, 2), batch) for x in (z, z + np.array([5.0, -2.0]))
    )
    np.testing.assert_allclose(here, there, atol=1e-4)  # as far as the optimiser goes


def test_batches_that_name_cells_differently_get_borders_of_their_own():
    z, _, _ = blobs(cells=600, spread=1.0)
    batch = np.arange(600) // 3 % 2
    truth = (z[:, 0] > np.where(batch == 0, 0.5, 2.5)).astype(int)
    labels = np.where(np.arange(600) < 400, truth, 2)
    shared, own = fit_classes(z, labels, 2), fit_classes(z, labels, 2, batch, 2)
    new = np.arange(600) >= 400
    right = [(p.argmax(1) == truth)[new].mean() for p in (probabilities(z, shared), probabilities(z, own, batch))]
    assert right[1] > right[0] + 0.05


def test_shared_and_own_slopes_have_the_same_prior():
    z, _, truth = blobs(cells=600, spread=1.0)
    batch = np.random.default_rng(0).integers(3, size=600)
    labels = np.where(z[:, 0] > batch - 1, truth, 1)
    found = fit_classes(z, labels, 3, batch, 3)
    kernel = class_fit._border(found.clouds)[0]
    # where the prior is the same, so is the pull: the shared ones are the sum of those of the batches
    added = found.kernel - class_fit.MIXTURE_WEIGHT * kernel
    added -= added.mean(1, keepdims=True)  # what all types have in common is of no effect
    np.testing.assert_allclose(added, found.by_batch[:, :-1].sum(0), atol=0.02)
    assert np.abs(added).max() > 0.3


@pytest.mark.parametrize("bad", [0, 1])
def test_of_two_starts_the_likelier_mixture_is_taken(bad, monkeypatch):
    z, labels, _ = blobs(spread=0.8)
    right, calls = class_fit._mixture, []

    def one_is_bad(*arguments):
        calls.append(right(*arguments))
        clouds = calls[-1]
        return clouds._replace(mean=clouds.mean + 1.5) if len(calls) == 1 + bad else clouds

    monkeypatch.setattr(class_fit, "_mixture", one_is_bad)
    found = fit_classes(z, labels, 3)
    assert len(calls) == 2
    np.testing.assert_allclose(found.clouds.mean, calls[1 - bad].mean + z.mean(0))


def test_likelihood_of_the_mixture_is_that_of_gaussians():
    z, labels, _ = blobs(cells=30)
    rng = np.random.default_rng(0)
    rows, y = np.arange(3), labels[:3]
    values = []
    for scale in (1.0, 2.0):
        precision = scale * np.array([[2.0, 0.3], [0.3, 1.0]])
        clouds = class_fit.TypeClouds(rng.normal(size=(3, 2)), precision, np.ones(3) / 3)
        each = [multivariate_normal(m, np.linalg.inv(clouds.precision)).logpdf(z) + np.log(1 / 3) for m in clouds.mean]
        each = np.stack(each, axis=1)
        wanted = logsumexp(each, axis=1)
        wanted[rows] = each[rows, y]
        values.append(wanted.sum() - class_fit._log_likelihood(z, rows, y, clouds))
    np.testing.assert_allclose(values, -30 * np.log(2 * np.pi))  # the constant, the same for both


def test_a_new_batch_is_met_by_its_shift_and_its_shares():
    z, _, truth = blobs(cells=900, spread=0.6)
    found = fit_classes(z, truth, 3)
    new, _, kind = blobs(seed=1, cells=900, spread=0.6)
    new, kind = new[kind < 2] + np.array([0.9, 0.5]), kind[kind < 2]  # one type is missing
    added = adapt_classes(new, found)
    before, after = (softmax(found.logits(new) + bias, axis=1) for bias in (0.0, added))
    wrong = [(p.argmax(1) != kind).mean() for p in (before, after)]
    assert wrong[0] > 0.03
    assert wrong[1] < 0.5 * wrong[0]
    assert (before.argmax(1) == 2).sum() > 2
    assert (after.argmax(1) == 2).sum() == 0


def test_known_cells_of_a_new_batch_settle_shift_and_shares():
    z, _, truth = blobs(cells=900, spread=0.6)
    found = fit_classes(z, truth, 3)
    new, _, _ = blobs(seed=1, cells=60, spread=0.6)
    labels = np.repeat([0, 1], 30)
    precision, share = found.clouds.precision, found.clouds.share
    stiffness = np.diag(4 / np.diag(np.linalg.inv(precision)))
    shift = np.linalg.solve(60 * precision + stiffness, precision @ (new - found.clouds.mean[labels]).sum(0))
    ratio = (np.array([30, 30, 0]) + 3 * share) / 63 / share
    added = adapt_classes(new, found, labels, temperature=2.0)
    wanted = softmax(found.logits(new - shift) / 2.0, axis=1) * ratio
    p = softmax((found.logits(new) + added) / 2.0, axis=1)
    np.testing.assert_allclose(p, wanted / wanted.sum(1, keepdims=True), rtol=1e-6, atol=1e-12)


def test_a_batch_that_the_classifier_is_unsure_of_is_left_alone():
    z, _, truth = blobs(cells=900, spread=0.6)
    found = fit_classes(z, truth, 3)
    between = np.array([1.5, 0.0]) + 0.2 * np.random.default_rng(0).normal(size=(100, 2))
    assert adapt_classes(between, found) is None
    assert adapt_classes(z[: class_fit.LEAST_CELLS - 1], found) is None
    assert adapt_classes(z[: class_fit.LEAST_CELLS], found) is not None


@pytest.mark.parametrize("spread", [0.5, 0.8])
def test_folds_of_few_labels_calibrate_the_others(spread):
    z, _, truth = blobs(cells=900, spread=spread)
    labels = np.where(np.arange(900) < 45, truth, -1)
    temperature = folded_temperature(z, labels, 3)
    logits, hidden = fit_classes(z, labels, 3).logits(z), labels < 0

    def loss(t):
        p = softmax(logits[hidden] / t, axis=1)
        return -np.log(p[np.arange(len(p)), truth[hidden]]).sum()

    assert loss(temperature) < 0.95 * loss(1.0)
    assert 0.4 < temperature < 0.95


def test_folds_need_two_cells_of_a_type():
    z, labels, _ = blobs()
    assert folded_temperature(z, labels, 3) == 1.0


def test_a_few_right_calls_do_not_make_certain():
    logits = np.array([[4.0, 0.0], [5.0, 0.0], [6.0, 0.0]])
    temperature = best_temperature(lambda t: np.log1p(np.exp(-(logits[:, 0] - logits[:, 1]) / t)).sum())
    assert 0.8 < temperature < 1.0


def test_module_classifies_as_fitted():
    z, labels, _ = blobs()
    batch = np.arange(len(z)) % 2
    model = SCANVI(5, 2, 3, n_latent=2, classifier_parameters={"n_layers": 0, "by_batch": True}, rngs=nnx.Rngs(0))
    model.fit_classifier(z, labels, batch)
    found = fit_classes(z, labels, 3, batch, 2)
    p = jnp.exp(model.log_class_probabilities(jnp.asarray(z), 1.0, jnp.asarray(batch)))
    np.testing.assert_allclose(p, probabilities(z, found, batch), atol=1e-4)
    without = jnp.exp(model.log_class_probabilities(jnp.asarray(z)))
    np.testing.assert_allclose(without, probabilities(z, found), atol=1e-4)


def test_what_cannot_be_fitted_is_named():
    z, _, _ = blobs()
    with pytest.raises(DataError, match="no cell is labelled"):
        fit_classes(z, np.full(len(z), 3), 3)
    with pytest.raises(ConfigError, match="linear"):
        SCANVI(5, 1, 3, n_latent=2, rngs=nnx.Rngs(0)).fit_classifier(z, np.zeros(len(z), int))
