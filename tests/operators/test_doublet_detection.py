"""Doublet scores against Scrublet's recipe written out; Solo against the library size."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import average_precision_score, roc_auc_score

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.nn.scvi import SCVI
from diffbio.operators.base import Operator
from diffbio.operators.singlecell.doublet_detection import (
    DifferentiableDoubletScorer,
    DifferentiableSoloDetector,
    DoubletScorerConfig,
    SoloDetectorConfig,
)


def mixture(n=300, n_doublets=24, n_genes=60, seed=0):
    """Cells of three types, and sums of two cells of different types."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(n_genes, 0.5), 3)
    kind = rng.integers(0, 3, n)
    counts = rng.poisson(share[kind] * rng.lognormal(np.log(400), 0.5, n)[:, None])
    pairs = np.array([(a, b) for a, b in rng.integers(0, n, (500, 2)) if kind[a] != kind[b]])[:n_doublets]
    both = np.concatenate([counts, counts[pairs].sum(1)]).astype(np.float32)
    return both, np.repeat([False, True], [n, n_doublets])


def scorer(n_genes, **settings):
    config = DoubletScorerConfig(**{"n_genes": n_genes, "gene_percentile": 0.0, "n_pca_components": 5, **settings})
    return DifferentiableDoubletScorer(config, rngs=nnx.Rngs(0))


def test_sharp_scores_are_those_of_the_recipe():
    counts, _ = mixture(n=80, n_doublets=4)
    n = len(counts)
    pairs = np.random.default_rng(1).integers(0, n, (2 * n, 2)).astype(np.int32)
    found = scorer(60, neighbor_temperature=1e-5, expected_doublet_rate=0.1).apply(
        {"counts": counts, "doublet_pairs": pairs}
    )[0]
    total = counts.sum(1, keepdims=True).astype(np.float64)
    x = counts / total * total.mean()
    x = x[:, (x >= 3).sum(0) >= 3]
    summed = (counts[pairs[:, 0]] + counts[pairs[:, 1]])[:, (counts / total * total.mean() >= 3).sum(0) >= 3]
    doubled = summed / total[pairs].sum(1) * total.mean()
    mean, sd = x.mean(0), x.std(0)
    z, of_doublets = (x - mean) / sd, (doubled - mean) / sd
    axes = np.linalg.svd(z, full_matrices=False)[2][:5].T
    points = np.concatenate([z @ axes, of_doublets @ axes])
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distance, np.inf)
    k = round(3 * round(0.5 * np.sqrt(n)))
    nearest = np.argsort(distance, axis=1)[:, :k]
    q = ((nearest >= n).sum(1) + 1) / (k + 2)
    score = q * 0.05 / (0.9 - q * 0.85)
    tied = np.sort(distance, axis=1)
    clear = tied[:, k] - tied[:, k - 1] > 1e-4  # a doublet drawn twice is two neighbours at one distance
    assert clear.mean() > 0.8
    np.testing.assert_allclose(found["doublet_scores"][clear[:n]], score[:n][clear[:n]], atol=1e-5)
    np.testing.assert_allclose(found["simulated_doublet_scores"][clear[n:]], score[n:][clear[n:]], atol=1e-5)


def test_doublets_score_higher_and_the_threshold_calls_them():
    counts, doublet = mixture()
    found = {key: np.asarray(value) for key, value in scorer(60).apply({"counts": counts})[0].items()}
    score = found["doublet_scores"]
    assert roc_auc_score(doublet, score) > 0.95
    assert average_precision_score(doublet, score) > average_precision_score(doublet, counts.sum(1)) + 0.2
    assert bool(found["threshold_found"])
    assert 0.03 < (score > found["doublet_threshold"]).mean() < 0.15
    assert (found["doublet_errors"] > 0).all()
    hard = scorer(60, threshold_temperature=1e-6).apply({"counts": counts})[0]["predicted_doublets"]
    np.testing.assert_array_equal(np.asarray(hard) > 0.5, score > found["doublet_threshold"])


def test_without_a_valley_the_expected_rate_is_called():
    rng = np.random.default_rng(0)
    counts = rng.poisson(5.0, (120, 40)).astype(np.float32)
    found = scorer(40, expected_doublet_rate=0.05).apply({"counts": counts})[0]
    called = np.asarray(found["doublet_scores"]) > np.asarray(found["doublet_threshold"])
    assert called.mean() <= 0.15 if bool(found["threshold_found"]) else abs(called.mean() - 0.05) < 0.02


def test_bad_data_is_named():
    counts, _ = mixture(n=40, n_doublets=1)
    op = scorer(60)
    with pytest.raises(DataError, match="at least 30"):
        op.apply({"counts": counts[:20]})
    with pytest.raises(DataError, match=r"rows 3, 5"):
        op.apply({"counts": np.where(np.isin(np.arange(41), [3, 5])[:, None], 0, counts)})
    with pytest.raises(DataError, match="row 2"):
        op.apply({"counts": np.where((np.arange(41) == 2)[:, None], -1, counts)})
    with pytest.raises(DataError, match="from 0 to 40"):
        op.apply({"counts": counts, "doublet_pairs": np.array([[0, 41]])})
    with pytest.raises(DataError, match="no gene"):
        op.apply({"counts": np.ones((40, 60))})
    with pytest.raises(DataError, match="n_pca_components is 30"):
        scorer(60, n_pca_components=30, gene_percentile=85.0).apply({"counts": counts})
    with pytest.raises(ConfigError, match="expected_doublet_rate"):
        DoubletScorerConfig(expected_doublet_rate=0.7)


def test_train_mode_draws_new_pairs():
    counts, _ = mixture(n=40, n_doublets=1)
    op = scorer(60)
    op.train_mode()
    first, second = (op.apply({"counts": counts})[0]["doublet_scores"] for _ in range(2))
    assert bool((first != second).any())


@pytest.fixture(scope="module")
def solo():
    counts, doublet = mixture()
    config = SoloDetectorConfig(n_genes=60, latent_dim=4, hidden_dims=(32,), classifier_hidden_dim=32)
    op = DifferentiableSoloDetector(config, rngs=nnx.Rngs(0))
    assert not op.fitted
    diffbio.fit(op, {"counts": np.random.default_rng(0).permutation(counts)}, max_epochs=60, progress=False)
    return op, counts, doublet


def test_trained_solo_beats_the_library_size(solo, tmp_path):
    op, counts, doublet = solo
    out, _, metadata = op.apply({"counts": counts})
    score = np.asarray(out["doublet_probabilities"])
    assert metadata is None
    assert roc_auc_score(doublet, score) > 0.9
    assert average_precision_score(doublet, score) > average_precision_score(doublet, counts.sum(1)) + 0.1
    np.testing.assert_array_equal(np.asarray(out["doublet_labels"]), score > 0.5)
    op.save(tmp_path / "solo")
    again = Operator.load(tmp_path / "solo").apply({"counts": counts})[0]["doublet_probabilities"]
    np.testing.assert_array_equal(again, score)
    assert op.reference_doublet_probabilities().mean() > score.mean() + 0.2


def test_solo_takes_the_encoder_of_a_fitted_scvi(tmp_path):
    counts, _ = mixture(n=100, n_doublets=4)
    module = SCVI(60, n_latent=4, n_hidden=16, use_observed_lib_size=True, rngs=nnx.Rngs(1))
    op = DifferentiableSoloDetector.from_scvi(module, rngs=nnx.Rngs(0), classifier_hidden_dim=8)
    expected = module.vae.encode(jnp.asarray(counts)).mean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffbio.fit(op, {"counts": counts}, max_epochs=1, progress=False)
    out = op.apply({"counts": counts})[0]
    np.testing.assert_allclose(out["latent"], expected, rtol=1e-5, atol=1e-6)
    op.save(tmp_path / "solo")
    assert Operator.load(tmp_path / "solo").encoder_given
    with pytest.raises(ConfigError, match="from_scvi"):
        DifferentiableSoloDetector.from_scvi(SCVI(60, use_batch_norm="none", rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


def test_solo_is_differentiable_through_the_neighbours(solo):
    op, counts, _ = solo
    gradient = jax.grad(lambda x: op(x)["doublet_probabilities"].sum())(jnp.asarray(counts[:8]))
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient).max()) > 0
