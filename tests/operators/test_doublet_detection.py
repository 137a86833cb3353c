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
    # one type: the scores of the simulated doublets have one mode
    counts = np.random.default_rng(0).poisson(6.0, (200, 40)).astype(np.float32)
    for rate, width in ((0.05, 20), (0.2, 30)):
        found = scorer(40, expected_doublet_rate=rate, n_pca_components=width).apply({"counts": counts})[0]
        called = np.asarray(found["doublet_scores"]) > np.asarray(found["doublet_threshold"])
        assert not bool(found["threshold_found"])
        assert called.mean() == pytest.approx(rate, abs=0.01)


def test_bad_data_is_named():
    counts, _ = mixture(n=40, n_doublets=1)
    op = scorer(60)
    with pytest.raises(DataError, match="at least 30"):
        op.apply({"counts": counts[:20]})
    with pytest.raises(DataError, match=r"rows 3, 5"):
        op.apply({"counts": np.where(np.isin(np.arange(41), [3, 5])[:, None], 0, counts)})
    with pytest.raises(DataError, match=r"DoubletScorer: data\['counts'\].*row 2, column 0 holds -1"):
        op.apply({"counts": np.where((np.arange(41) == 2)[:, None], -1, counts)})
    with pytest.raises(DataError, match="from 0 to 40"):
        op.apply({"counts": counts, "doublet_pairs": np.array([[0, 41]])})
    with pytest.raises(DataError, match="no gene"):
        op.apply({"counts": np.ones((40, 60))})
    with pytest.raises(DataError, match="n_pca_components is 30"):
        scorer(60, n_pca_components=30, gene_percentile=85.0).apply({"counts": counts})
    with pytest.raises(ConfigError, match="expected_doublet_rate"):
        DoubletScorerConfig(expected_doublet_rate=0.7)


def test_of_genes_tied_at_the_percentile_the_highest_scores_are_used():
    counts, _ = mixture(n=60, n_doublets=1)
    copies = np.concatenate([np.repeat(counts[:, :1], 8, axis=1), counts], axis=1)  # tied, and first in order
    library = copies.sum(1)
    pairs = np.random.default_rng(1).integers(0, 61, (122, 2))
    order = np.random.default_rng(0).permutation(68)
    op = scorer(68, gene_percentile=60.0, n_pca_components=3)
    data = {"library_size": library, "doublet_pairs": pairs}
    scores = [op.apply({"counts": c, **data})[0]["doublet_scores"] for c in (copies, copies[:, order])]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_beyond_the_reference_size_neither_seed_nor_mode_choose_the_reference(monkeypatch):
    from diffbio.operators.singlecell import doublet_detection

    monkeypatch.setattr(doublet_detection, "REFERENCE_CELLS", 40)
    counts, _ = mixture(n=60, n_doublets=1)
    drawn = []

    def noted(observed, simulated, reference, **settings):
        drawn.append((np.asarray(reference), len(simulated)))
        return jnp.full(len(observed), 0.5), jnp.linspace(0.1, 0.9, len(simulated))

    monkeypatch.setattr(doublet_detection, "simulated_share", noted)
    for seed, training in ((0, False), (1, False), (0, True)):
        config = DoubletScorerConfig(n_genes=60, gene_percentile=0.0, n_pca_components=5)
        op = DifferentiableDoubletScorer(config, rngs=nnx.Rngs(seed))
        (op.train_mode if training else op.eval_mode)()
        op.apply({"counts": counts})
    assert len(drawn[0][0]) == 40
    assert drawn[0][1] == 80
    for reference, _ in drawn[1:]:
        np.testing.assert_array_equal(reference, drawn[0][0])


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
    with pytest.raises(ConfigError, match="not trained"):
        DifferentiableSoloDetector.from_scvi(module, rngs=nnx.Rngs(0))
    module.train()
    module.vae.encoder(jnp.log1p(counts))  # as training does, moves the running statistics
    module.eval()
    for setting in ({"likelihood": "zinb"}, {"dropout_rate": 0.5}, {"latent_dim": 4}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} is the model's"):
            DifferentiableSoloDetector.from_scvi(module, rngs=nnx.Rngs(0), **setting)
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


def test_solo_pairs_no_cell_with_itself_where_a_chunk_is_filled_up(monkeypatch):
    n = 5  # a chunk of 8: three cells come twice
    counts = np.eye(n, dtype=np.float32) * 8 + 1
    config = SoloDetectorConfig(n_genes=n, latent_dim=2, hidden_dims=(4,), sim_doublet_ratio=4)
    op = DifferentiableSoloDetector(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(op, "_seen", lambda counts: (counts, counts.sum(1)))  # the doublets' counts
    filled = counts[np.arange(8) % n]
    for training in (False, True):
        (op.train_mode if training else op.eval_mode)()
        for _ in range(20 if training else 1):
            doublets = np.asarray(op.positions({"counts": filled})["doublet_latent"])[:n]
            assert (doublets < 18).all()  # a cell with itself: 18


def test_solo_refuses_bad_counts():
    op = DifferentiableSoloDetector(SoloDetectorConfig(n_genes=3), rngs=nnx.Rngs(0))
    with pytest.raises(DataError, match=r"SoloDetector: data\['counts'\].*row 1, column 2 holds nan"):
        op.apply({"counts": np.array([[1, 1, 1], [1, 1, np.nan]])})


def test_solo_is_differentiable_through_the_neighbours(solo):
    op, counts, _ = solo
    gradient = jax.grad(lambda x: op(x)["doublet_probabilities"].sum())(jnp.asarray(counts[:8]))
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient).max()) > 0
