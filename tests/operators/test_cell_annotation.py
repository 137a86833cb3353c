import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffbio
from diffbio.errors import ConfigError, DataError, MissingKeyError
from diffbio.nn import SCANVI
from diffbio.operators.base import mode_of
from diffbio.operators.singlecell import CellAnnotatorConfig, DifferentiableCellAnnotator

MODES = ("celltypist", "cellassign", "scanvi")


def make(mode, **settings):
    sizes = {"n_cell_types": 3, "n_genes": 20, "latent_dim": 8, "hidden_dims": [32, 16], **settings}
    return DifferentiableCellAnnotator(CellAnnotatorConfig(annotation_mode=mode, **sizes), rngs=nnx.Rngs(0))


def three_types(n_per_type=50, seed=0):
    """The page's cells: 20 genes, of which 7, 7 and 6 mark the types."""
    types = np.repeat(np.arange(3), n_per_type)
    markers = np.zeros((3, 20), np.float32)
    markers[0, :7] = markers[1, 7:14] = markers[2, 14:] = 1
    counts = np.random.default_rng(seed).poisson(1 + 3 * markers[types]).astype(np.float32)
    return counts, types, markers


def run(op, data):
    return op.apply(data, {}, None)[0]


@pytest.fixture(scope="module")
def classifier():
    counts, types, _ = three_types()
    op = make("celltypist")
    diffbio.fit(op, {"counts": counts, "labels": types}, max_epochs=5, progress=False)
    return op


@pytest.fixture(scope="module")
def by_markers():
    counts, _, markers = three_types()
    op = make("cellassign", marker_matrix_shape=(3, 20), gene_likelihood="nb")
    diffbio.fit(op, {"counts": counts, "marker_matrix": markers}, max_epochs=5, progress=False)
    return op


def test_marker_mode_calls_new_cells_with_the_matrix_it_keeps(by_markers):
    counts, types, _ = three_types(seed=1)
    found = run(by_markers, {"counts": counts})
    assert (found["cell_type_labels"] == types).mean() > 0.97
    assert found["latent"].shape == (150, 8)


def test_marker_mode_does_not_depend_on_depth_nor_on_the_company(by_markers):
    counts, types, _ = three_types(seed=1)
    deep = run(by_markers, {"counts": counts * 10})["cell_type_labels"]
    assert (deep == types).mean() > 0.97
    alone = run(by_markers, {"counts": counts[:1]})["cell_type_probabilities"]
    np.testing.assert_allclose(alone, run(by_markers, {"counts": counts})["cell_type_probabilities"][:1], rtol=1e-4)


def test_marker_mode_is_unsure_of_cells_that_no_type_explains(by_markers):
    counts, _, _ = three_types(seed=1)
    known = by_markers.judge({"counts": jnp.asarray(counts)})["confidence"]
    strange = np.random.default_rng(3).poisson(np.tile([9.0, 0.0], 10), (50, 20)).astype(np.float32)
    odd = by_markers.judge({"counts": jnp.asarray(strange)})["confidence"]
    assert np.median(known) > 0.8
    assert np.quantile(odd, 0.9) < np.quantile(known, 0.1)


def test_a_type_without_markers_takes_the_cells_of_no_type():
    counts, types, markers = three_types()
    counts = np.where((types == 2)[:, None], np.random.default_rng(2).poisson(1.0, counts.shape), counts)
    markers[2] = 0  # "other": none of the genes is raised in the last fifty cells
    op = make("cellassign", gene_likelihood="nb")
    depth = np.full(150, 40.0, np.float32)  # of all genes; of these alone it would tell the types apart
    data = {"counts": counts.astype(np.float32), "marker_matrix": markers, "library_size": depth}
    diffbio.fit(op, data, max_epochs=5, progress=False)
    assert (run(op, data)["cell_type_labels"] == types).mean() > 0.95


def test_a_labelled_cell_is_what_its_label_says():
    counts, types, _ = three_types()
    rows = np.array([3, 60, 149])
    wrong = (types[rows] + 1) % 3
    op = make("scanvi")
    free = run(op, {"counts": counts})["cell_type_probabilities"]
    found = run(op, {"counts": counts, "known_labels": wrong, "label_indices": rows})
    np.testing.assert_array_equal(found["cell_type_labels"][rows], wrong)
    np.testing.assert_array_equal(found["cell_type_probabilities"][rows], np.eye(3)[wrong])
    others = np.setdiff1d(np.arange(150), rows)
    np.testing.assert_array_equal(found["cell_type_probabilities"][others], free[others])


def test_labels_of_some_cells_and_labels_of_every_cell_say_the_same():
    counts, types, _ = three_types()
    rows = np.array([3, 60, 149])
    every = np.full(150, -1)
    every[rows] = types[rows]
    op = make("scanvi")
    some = {"counts": counts, "known_labels": types[rows], "label_indices": rows}
    whole = {"counts": counts, "labels": every}
    np.testing.assert_array_equal(op.for_training(some)["labels"], every)
    assert op.objective(some)[0] == op.objective(whole)[0]
    np.testing.assert_array_equal(run(op, some)["cell_type_labels"], run(op, whole)["cell_type_labels"])


def test_scanvi_is_the_one_model_of_nn():
    op = make("scanvi", gene_likelihood="zinb")
    assert type(op.mode.model) is SCANVI
    counts, types, _ = three_types()
    data = {"counts": jnp.asarray(counts), "labels": jnp.asarray(types)}
    loss, metrics = op.objective(data, kl_weight=0.3)
    theirs, parts = op.mode.model.objective(data, kl_weight=0.3)
    np.testing.assert_allclose(loss, theirs, rtol=1e-6)
    assert set(metrics) == set(parts)


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
def test_the_likelihood_decides_what_the_decoder_has(likelihood):
    decoder = make("scanvi", gene_likelihood=likelihood).mode.model.vae.decoder
    assert (decoder.extra_zeros is not None) == (likelihood == "zinb")
    assert (decoder.log_theta is not None) == (likelihood != "poisson")


def test_labels_teach_scanvi_the_cells_without_labels():
    counts, types, _ = three_types()
    rows = np.array([0, 1, 50, 51, 100])
    op = make("scanvi")
    data = {"counts": counts, "known_labels": types[rows], "label_indices": rows}
    diffbio.fit(op, data, max_epochs=60, progress=False)
    assert (run(op, {"counts": counts})["cell_type_labels"] == types).mean() > 0.97


def test_the_classifier_is_sure_of_its_types_and_not_of_others(classifier):
    counts, types, _ = three_types(seed=1)
    found = classifier.judge({"counts": jnp.asarray(counts)})
    assert (found["probabilities"].argmax(1) == types).mean() > 0.97
    strange = np.random.default_rng(3).poisson(np.tile([40.0, 0.0], 10), (50, 20)).astype(np.float32)
    assert np.median(found["confidence"]) > 0.9
    unsure = classifier.judge({"counts": jnp.asarray(strange)})["confidence"]
    assert np.quantile(unsure, 0.9) < np.quantile(found["confidence"], 0.2)
    assert found["independent"].shape == (150, 3)
    assert 0 <= found["independent"].min() <= found["independent"].max() <= 1


def test_top_genes_are_the_markers(classifier):
    counts, types, markers = three_types()
    scores = classifier.marker_scores({"counts": counts, "labels": types})
    for kind in range(3):
        n = int(markers[kind].sum())
        assert set(np.argsort(-scores[kind])[:n].tolist()) == set(np.flatnonzero(markers[kind]).tolist())
    with pytest.raises(ConfigError, match="marker_scores is for mode 'celltypist'"):
        make("scanvi").marker_scores({"counts": counts, "labels": types})


def test_without_chance_train_mode_repeats_itself():
    counts, types, _ = three_types()
    op = make("celltypist", stochastic=False)
    with mode_of(op, training=True):
        first, second = (op.objective({"counts": counts, "labels": types})[0] for _ in range(2))
    assert first == second
    op = make("celltypist")
    with mode_of(op, training=True):
        first, second = (op.objective({"counts": counts, "labels": types})[0] for _ in range(2))
    assert first != second


def test_draws_come_from_the_named_stream():
    counts, _, _ = three_types()

    def drawn(stream, **seeds):
        config = CellAnnotatorConfig(
            annotation_mode="celltypist", n_cell_types=3, n_genes=20, latent_dim=8, hidden_dims=[32, 16],
            stream_name=stream,
        )
        op = DifferentiableCellAnnotator(config, rngs=nnx.Rngs(0, **seeds))
        with mode_of(op, training=True):
            return run(op, {"counts": counts})["latent"]

    assert (drawn("mine", mine=1) != drawn("mine", mine=2)).any()
    np.testing.assert_array_equal(drawn("mine", other=1), drawn("mine", other=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"annotation_mode": "cellassign", "marker_matrix_shape": (3, 7)}, r"must be \(n_cell_types, n_genes\)"),
        ({"annotation_mode": "celltypist", "n_batches": 2}, "n_batches is for mode 'scanvi'"),
        ({"annotation_mode": "scanvi", "n_covariates": 2}, "n_covariates is for mode 'cellassign'"),
        ({"annotation_mode": "seurat"}, "'celltypist', 'cellassign', 'scanvi'"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        CellAnnotatorConfig(n_cell_types=3, n_genes=20, **settings)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"known_labels": np.array([0, 3]), "label_indices": np.array([0, 1])}, r"known_labels'\] must be in 0\.\.2"),
        ({"known_labels": np.array([0, 1]), "label_indices": np.array([0, 999])}, r"must be in 0\.\.149, got 999"),
        ({"known_labels": np.array([0, 1]), "label_indices": np.array([-1, 1])}, "got -1"),
        ({"known_labels": np.array([0, 1]), "label_indices": np.array([1])}, "labelled"),
        ({"known_labels": np.array([0, 1])}, "known_labels with label_indices"),
    ],
)
def test_labels_out_of_range_are_named(extra, said):
    counts, _, _ = three_types()
    with pytest.raises(DataError, match=said):
        run(make("scanvi"), {"counts": counts, **extra})


def test_what_a_mode_lacks_is_named():
    counts, types, markers = three_types()
    with pytest.raises(MissingKeyError, match="marker_matrix"):
        run(make("cellassign"), {"counts": counts})
    with pytest.raises(MissingKeyError, match="batch_labels"):
        make("scanvi", n_batches=2).objective({"counts": counts, "labels": types})
    with pytest.raises(MissingKeyError, match="covariates"):
        run(make("cellassign", n_covariates=1), {"counts": counts, "marker_matrix": markers})
    with pytest.raises(DataError, match=r"must be in 0\.\.1, got 0\.0 to 5\.0"):
        run(make("cellassign"), {"counts": counts, "marker_matrix": markers * 5})
    with pytest.raises(DataError, match="no cell is labelled"):
        diffbio.fit(make("celltypist"), {"counts": counts}, progress=False)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_the_counts(mode):
    counts, _, markers = three_types(10)
    op = make(mode)
    data = {"marker_matrix": jnp.asarray(markers)} if mode == "cellassign" else {}

    def loss(counts):
        return jnp.log(run(op, {"counts": counts, **data})["cell_type_probabilities"] + 1e-9)[:, 0].sum()

    gradient = jax.grad(loss)(jnp.asarray(counts))
    assert jnp.isfinite(gradient).all()
    assert (gradient != 0).any(axis=1).all(), "of every cell"
