import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from diffbio.errors import ConfigError, DataError
from diffbio.nn import SCANVI
from diffbio.nn.class_fit import fit_classes


def blobs(seed=0, cells=300, spread=0.4):
    """Three clouds in two dimensions, one labelled cell in each."""
    rng = np.random.default_rng(seed)
    truth = np.arange(cells) % 3
    z = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])[truth] + spread * rng.normal(size=(cells, 2))
    labels = np.full(cells, -1)
    labels[:3] = truth[:3]
    return z, labels, truth


def probabilities(z, found, batch=None):
    logits = z @ found.kernel + found.bias
    if batch is not None:
        own = found.by_batch[batch]
        logits = logits + np.einsum("nd,ndk->nk", z, own[:, :-1]) + own[:, -1]
    return softmax(logits, axis=1)


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
