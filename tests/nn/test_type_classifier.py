import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import float64_copy
from flax import nnx
from scipy import sparse
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from diffbio.data.source import ArraySource
from diffbio.data.type_genes import type_genes
from diffbio.errors import DataError
from diffbio.nn.type_classifier import (
    SLOPE_SD,
    TypeClassifier,
    clouds,
    fold_temperature,
    ridge_classes,
    standards,
)
from diffbio.train import Settings, train

GENES, TYPES = 20, 3


def toy(seed=0, cells=150, types=TYPES, genes=GENES, depth=1.0):
    """Cells of each type in turn, five genes of a type six times as high as elsewhere, depths apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(cells) % types
    rate = np.ones((types, genes))
    for code in range(types):
        rate[code, 5 * code : 5 * code + 5] = 6.0
    counts = rng.poisson(depth * rate[labels] * rng.uniform(0.5, 2.0, (cells, 1)))
    return counts.astype(np.float32), labels.astype(np.int32)


def small(likelihood="zinb", types=TYPES, genes=GENES, seed=0):
    return TypeClassifier(
        genes, types, latent_dim=8, hidden_dims=(32, 16), likelihood=likelihood, rngs=nnx.Rngs(seed)
    )


@functools.cache
def _started(likelihood):
    counts, labels = toy()
    model = small(likelihood)
    model.start_from(counts, labels)
    return model, counts, labels


def started(likelihood="zinb"):
    model, counts, labels = _started(likelihood)
    return nnx.clone(model), counts, labels


def called(model, counts):
    return np.asarray(model.log_probabilities(model.latent(jnp.asarray(counts))).argmax(-1))


class Trained(nnx.Module):
    """What the training loop needs."""

    def __init__(self, model):
        self.model = model

    def objective(self, data, *, kl_weight=1.0):
        return self.model.loss(jnp.asarray(data["counts"]), data["labels"], kl_weight=kl_weight)

    def train_mode(self):
        self.train()

    def eval_mode(self):
        self.eval()


@pytest.mark.parametrize("start", [True, False])
def test_new_cells_are_called_right(start):
    model, counts, labels = started()
    if not start:
        model = small()
    source = ArraySource({"counts": counts, "labels": labels})
    settings = Settings(max_epochs=30, batch_size=32, learning_rate=1e-3 if start else 2e-2)
    history = train(Trained(model), source, settings, progress=False)
    model.finish_from(np.asarray(model.latent(jnp.asarray(counts))), labels)
    new, truth = toy(seed=1)
    assert (called(model, new) == truth).mean() > (0.99 if start else 0.95)
    assert history.rows[-1]["reconstruction"] < history.rows[0]["reconstruction"]


def test_the_answer_does_not_depend_on_depth():
    model, counts, _ = started()
    z = model.latent(jnp.asarray(counts))
    np.testing.assert_allclose(model.latent(jnp.asarray(7 * counts)), z, atol=2e-5)  # float32
    library = jnp.asarray(counts.sum(1) * 3.0)
    np.testing.assert_allclose(model.latent(jnp.asarray(3 * counts), library), z, atol=2e-5)
    assert float(jnp.abs(model.latent(jnp.asarray(counts), library) - z).max()) > 0.05  # two thirds are elsewhere


def test_probabilities_are_probabilities():
    model, counts, _ = started()
    z = model.latent(jnp.asarray(counts))
    np.testing.assert_allclose(jnp.exp(model.log_probabilities(z)).sum(-1), 1.0, rtol=1e-5)
    alone = model.multi_label(z)
    assert float(alone.min()) > 0.0
    assert float(alone.max()) < 1.0
    np.testing.assert_array_equal(model.confidence(z), model.typical(z).max(-1))
    assert (alone <= model.typical(z)).all()


def test_temperature_calibrates_without_changing_the_call():
    model, counts, _ = started()
    z = model.latent(jnp.asarray(counts))
    sharp = model.log_probabilities(z)
    model.temperature.set_value(jnp.asarray(4.0))
    soft = model.log_probabilities(z)
    np.testing.assert_array_equal(sharp.argmax(-1), soft.argmax(-1))
    np.testing.assert_allclose(soft, jax.nn.log_softmax(model.logits(z) / 4.0), rtol=1e-6)


def test_a_type_that_was_not_in_training_has_low_confidence():
    counts, labels = toy(types=4, cells=400, depth=5.0)
    known = labels < 3
    model = TypeClassifier(GENES, TYPES, latent_dim=20, hidden_dims=(8,), rngs=nnx.Rngs(0))
    model.start_from(counts[known], labels[known])
    new, truth = toy(seed=1, types=4, cells=400, depth=5.0)
    confidence = np.asarray(model.confidence(model.latent(jnp.asarray(new))))
    strange, usual = confidence[truth == 3], confidence[truth < 3]
    assert (strange[:, None] < usual).mean() > 0.9  # the AUROC
    assert (usual > 0.5).mean() > 0.9


def test_the_start_is_logistic_regression_of_all_genes():
    model, counts, labels = started()
    x = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    center, _, scale = standards(x, labels, TYPES)
    model.vae.encoder.mean.kernel.set_value(jnp.zeros_like(model.vae.encoder.mean.kernel[...]))
    z = np.asarray(model.latent(jnp.asarray(counts)))
    slopes, intercept = ridge_classes((x - center) * scale, labels, TYPES, SLOPE_SD)
    wanted = (x - center) * scale @ slopes + intercept
    np.testing.assert_array_equal(wanted.argmax(1), called(model, counts))
    # the latent positions hold these logits whole: they are linear in z
    features = np.c_[z, np.ones(len(z))]
    left = wanted - features @ np.linalg.lstsq(features, wanted, rcond=None)[0]
    assert np.abs(left - left.mean(1, keepdims=True)).max() < 1e-3 * np.abs(wanted).max()
    np.testing.assert_allclose(z[:, :2].std(0), 1.0, atol=1e-2)


def test_ridge_is_scikit_learns():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(200, 4)), rng.integers(0, 3, 200)
    x[:, 0] += labels
    slopes, intercept = ridge_classes(x, labels, 3, 2.0)
    peer = LogisticRegression(C=4.0, max_iter=1000, tol=1e-8).fit(x, labels)
    np.testing.assert_allclose(softmax(x @ slopes + intercept, axis=1), peer.predict_proba(x), atol=2e-3)


def test_a_gene_weighs_as_much_as_it_tells():
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 3
    x = rng.normal(size=(3000, 4)) * np.array([1.0, 1.0, 5.0, 0.0])
    x[:, 0] += 10.0 * labels
    x[:, 2] += 5.0 * labels
    center, sd, scale = standards(x, labels, 3)
    eta2 = (scale * sd) ** 2
    assert eta2[1] < 1e-3 * eta2[0]
    assert eta2[3] == 0.0
    # between / total: of the first 100 * 2/3 of 1 + 100 * 2/3, of the third (2/3) / (1 + 2/3)
    np.testing.assert_allclose(eta2[2] / eta2[0], 0.4 / (200 / 203), rtol=0.1)
    length = (((x - center) * scale) ** 2).sum(1).mean()
    np.testing.assert_allclose(length, 1.0, rtol=1e-5)


def test_the_ridge_is_calibrated_by_cells_it_has_not_seen():
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 2
    x = rng.normal(size=(600, 30)).astype(np.float32)
    x[:, 0] += 8.0 * labels
    assert fold_temperature(x, labels, 2) < 0.8  # nothing is mistaken for the other type: the ridge is too unsure
    assert fold_temperature(x, rng.permutation(labels), 2) > 1.0  # by heart alone
    assert fold_temperature(x[:2], labels[:2], 2) == 1.0


def test_a_gene_that_is_constant_in_training_tells_nothing():
    x, labels = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32), np.arange(60) % 2
    x[:, 1] = np.float32(0.1) + np.float32(1e-8) * labels
    _, sd, scale = standards(x, labels, 2)
    assert scale[1] == 0.0
    assert sd[1] == 1.0


def test_clouds_are_where_the_cells_are():
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2
    z = rng.normal(size=(4000, 3)) * np.array([1.0, 2.0, 0.5]) + 4.0 * labels[:, None]
    mean, precision, radius = clouds(z, labels, 3)
    np.testing.assert_allclose(mean[:2], [[0.0] * 3, [4.0] * 3], atol=0.15)
    np.testing.assert_allclose(np.diag(precision), [1.0, 0.25, 4.0], rtol=0.1)
    np.testing.assert_allclose(radius, 11.34, rtol=0.1)  # chi² of 3 degrees of freedom
    assert np.isfinite(mean).all()  # the third type has no cells


def test_markers_of_a_linear_classifier_are_its_weights():
    model, counts, labels = started()
    model.vae.encoder.mean.kernel.set_value(jnp.zeros_like(model.vae.encoder.mean.kernel[...]))
    kernel = model.classifier.kernel[...]
    contrast = model.linear[...] @ (kernel - kernel.mean(1, keepdims=True))
    slopes = (model.scale[...] * model.sd[...])[:, None] * contrast
    found = model.marker_scores(jnp.asarray(counts), jnp.asarray(labels))
    np.testing.assert_allclose(found, slopes.T, rtol=1e-3, atol=1e-4)
    for code in range(TYPES):
        assert sorted(np.argsort(-np.asarray(found[code]))[:5]) == list(range(5 * code, 5 * code + 5))
    none = model.marker_scores(jnp.asarray(counts), jnp.where(jnp.asarray(labels) == 2, -1, labels))
    assert not none[2].any()


def test_unlabelled_cells_leave_the_bound_alone():
    model, counts, labels = started()
    counts = jnp.asarray(counts)
    total, parts = model.loss(counts, jnp.full(len(labels), -1), kl_weight=0.5, classification_weight=100.0)
    np.testing.assert_allclose(total, parts["reconstruction"] + 0.5 * parts["kl"], rtol=1e-6)
    assert float(parts["classification"]) == 0.0
    half = jnp.where(jnp.arange(len(labels)) < 75, jnp.asarray(labels), TYPES)
    _, of_half = model.loss(counts, half)
    _, alone = model.loss(counts[:75], jnp.asarray(labels[:75]))
    np.testing.assert_allclose(of_half["classification"], alone["classification"], rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_gradients(likelihood):
    counts, labels = toy(cells=9)
    model = small(likelihood)
    model.start_from(counts, labels)
    with jax.enable_x64(True):
        model = float64_copy(model)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        x, labels = jnp.asarray(counts + 1.0, jnp.float64), jnp.asarray(labels).at[0].set(-1)

        @jax.jit
        def total(params, x):
            model = nnx.merge(graph, params, rest, copy=True)
            z = model.latent(x)
            shown = (jnp.cos(jnp.arange(TYPES)) * (model.log_probabilities(z) + model.multi_label(z))).sum()
            model.train()
            return shown + model.loss(x, labels, kl_weight=0.7, classification_weight=5.0)[0]

        slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)
        rng = np.random.default_rng(0)
        for part, leaves in enumerate(slopes):
            flat, tree = jax.tree.flatten(leaves)
            for number, slope in enumerate(flat):
                assert np.isfinite(slope).all()
                assert np.abs(slope).max() > 0
                step = rng.normal(size=slope.shape) + np.sign(slope)
                step /= np.linalg.norm(step)

                def moved(by, part=part, tree=tree, number=number, step=step):
                    both = [params, x]
                    own = jax.tree.leaves(both[part])
                    own[number] = own[number] + by * step
                    both[part] = jax.tree.unflatten(tree, own)
                    return total(*both)

                found = (moved(1e-5) - moved(-1e-5)) / 2e-5
                np.testing.assert_allclose(found, (slope * step).sum(), rtol=1e-4, atol=1e-6)


def test_jit_sparse_and_eager_agree():
    model, counts, labels = started("nb")
    rows = ArraySource({"counts": sparse.csr_array(counts)}).take_sparse(np.arange(len(counts)))["counts"]
    graph, state = nnx.split(model)

    @jax.jit
    def compiled(state, counts):
        model = nnx.merge(graph, state)
        z = model.latent(counts)
        return model.log_probabilities(z), model.multi_label(z), model.loss(counts, jnp.asarray(labels))[0]

    with jax.disable_jit():
        z = model.latent(jnp.asarray(counts))
        loss, _ = model.loss(jnp.asarray(counts), jnp.asarray(labels))
        wanted = model.log_probabilities(z), model.multi_label(z), loss
    for given in (jnp.asarray(counts), jax.device_put(rows)):
        for found, right in zip(compiled(state, given), wanted, strict=True):
            np.testing.assert_allclose(found, right, rtol=2e-3, atol=1e-4)


def test_degenerate_cells_have_finite_answers():
    def total(counts, graph, state):
        model, labels = nnx.merge(graph, state), jnp.arange(len(counts)) % TYPES
        z = model.latent(counts)
        return model.loss(counts, labels)[0] + model.multi_label(z).sum() + model.log_probabilities(z)[:, 0].sum()

    slope_of = jax.jit(jax.value_and_grad(total), static_argnums=1)
    for model in (small(), started()[0]):
        for counts in (np.zeros((5, GENES)), np.ones((5, GENES)), 900 * np.eye(5, GENES), np.ones((1, GENES))):
            value, slope = slope_of(jnp.asarray(counts, jnp.float32), *nnx.split(model))
            assert np.isfinite(value)
            assert np.isfinite(slope).all()


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 2, -1], [2, -1, -1, -1]])
def test_few_cells_and_few_types_are_a_start(labels):
    counts = toy()[0][:4]
    for given in (counts, np.ones_like(counts), np.zeros_like(counts)):
        model = small()
        model.start_from(given, np.array(labels))
        z = model.latent(jnp.asarray(given))
        assert np.isfinite(model.log_probabilities(z)).all()
        assert np.isfinite(model.multi_label(z)).all()


def test_without_labels_there_is_nothing_to_start_from():
    with pytest.raises(DataError, match="no cell is labelled"):
        small().start_from(toy()[0], np.full(150, -1))


def test_a_latent_space_narrower_than_the_types_is_enough():
    counts, labels = toy(types=4, cells=400)
    model = TypeClassifier(GENES, 4, latent_dim=2, hidden_dims=(8,), rngs=nnx.Rngs(0))
    model.start_from(sparse.csr_array(counts), labels)
    assert (called(model, counts) == labels).mean() > 0.8


def test_train_mode_draws_and_eval_mode_does_not():
    model, counts, _ = started()
    counts = jnp.asarray(counts)
    np.testing.assert_array_equal(model.latent(counts), model.latent(counts))
    model.train()
    assert float(jnp.abs(model.latent(counts) - model.latent(counts)).max()) > 0


def test_textbook_markers_of_blood_cells(data_dir):
    import anndata

    cells = anndata.read_h5ad(data_dir / "pbmc3k.h5ad")
    names, labels = np.unique(cells.obs["cell_type"].astype(str), return_inverse=True)
    genes = type_genes(cells.X, labels, 1000)
    counts = cells.X[:, genes].toarray()
    model = TypeClassifier(len(genes), len(names), latent_dim=8, hidden_dims=(16,), rngs=nnx.Rngs(0))
    model.start_from(counts, labels)
    scores = np.asarray(model.marker_scores(jnp.asarray(counts), jnp.asarray(labels)))
    symbols = cells.var_names.to_numpy()[genes]
    textbook = {"B": "MS4A1", "NK": "GNLY", "CD14+ Mono": "CD14", "CD8 T": "CD8A", "Platelet": "PPBP"}
    for name, marker in textbook.items():
        top = symbols[np.argsort(-scores[list(names).index(name)])[:20]]
        assert marker in top, (name, top)
