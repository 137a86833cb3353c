import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.manifold import trustworthiness

import diffbio
from diffbio.errors import ConfigError, DataError
from diffbio.math.graph import Edges, find_ab_params
from diffbio.math.linalg import pca
from diffbio.operators.normalization import DifferentiableUMAP, UMAPConfig
from diffbio.operators.normalization.umap import EdgeSampler


def make(n_features, **settings):
    return DifferentiableUMAP(UMAPConfig(input_features=n_features, **settings), rngs=nnx.Rngs(0))


def embedded(op, x):
    return np.asarray(op.apply({"features": x}, {}, None)[0]["embedding"])


def clusters(n=300, width=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    centers = np.random.default_rng(9).normal(size=(5, width)) * 4
    return (centers[labels] + rng.normal(size=(n, width))).astype(np.float32), labels


@pytest.fixture(scope="module")
def fitted():
    x, _ = clusters()
    op = make(8)
    diffbio.fit(op, {"features": x}, max_epochs=25, batch_size=512, progress=False)
    return op


def test_fitted_keeps_neighbours_better_than_pca(fitted):
    x, _ = clusters()
    ours = trustworthiness(x, embedded(fitted, x), n_neighbors=15)
    assert ours >= 0.95
    assert ours > trustworthiness(x, pca(x, 2).scores, n_neighbors=15)


def test_new_cells_land_in_their_cluster(fitted):
    x, labels = clusters()
    new, new_labels = clusters(100, seed=1)
    train, test = embedded(fitted, x), embedded(fitted, new)
    nearest = ((test[:, None] - train) ** 2).sum(-1).argmin(1)
    assert (labels[nearest] == new_labels).mean() >= 0.98


def test_same_seed_gives_the_same_map():
    x, _ = clusters(60)
    maps = []
    for _ in range(2):
        op = make(8)
        diffbio.fit(op, {"features": x}, max_epochs=2, batch_size=128, progress=False)
        maps.append(embedded(op, x))
    np.testing.assert_array_equal(*maps)


def test_starts_from_the_principal_components():
    x, _ = clusters()
    op = make(8)
    op.init_from({"features": x})
    y, scores = embedded(op, x), pca(x, 2).scores
    for i in range(2):
        assert abs(np.corrcoef(y[:, i], scores[:, i])[0, 1]) > 0.9
    np.testing.assert_allclose(y[:, 0].std(), 3.0, rtol=0.2)


def test_fewer_cells_than_dimensions_can_start():
    op = make(8, n_components=5)
    op.init_from({"features": np.arange(16.0).reshape(2, 8)})
    assert np.isfinite(embedded(op, np.ones((3, 8), np.float32))).all()


def test_loss_equals_the_cross_entropy_written_out():
    op = make(4, n_negatives=2, min_dist=0.3)
    x = jax.random.normal(jax.random.key(0), (12, 4))
    y = embedded(op, x).astype(float)
    heads, tails = y[:6], y[6:]
    a, b = find_ab_params(1.0, 0.3)

    def q(gap):
        return 1 / (1 + a * ((gap**2).sum(-1) + 1e-3) ** b)

    shifts = np.asarray(op._shifts(6))
    assert ((shifts % 6) != 0).all(), "an edge is never its own negative"
    repulsion = 2 / 2 * np.mean([-np.log(1 - q(heads - np.roll(tails, -s, axis=0))) for s in shifts])
    attraction = np.mean(-np.log(q(heads - tails)))
    loss, parts = op.objective({"features": x})
    np.testing.assert_allclose(parts["attraction"], attraction, rtol=1e-5)
    np.testing.assert_allclose(loss, attraction + repulsion, rtol=1e-5)


def test_an_odd_batch_drops_its_last_cell():
    op = make(4)
    x = jax.random.normal(jax.random.key(0), (13, 4))
    np.testing.assert_array_equal(op.objective({"features": x})[0], op.objective({"features": x[:12]})[0])


def test_a_batch_of_one_edge_is_refused():
    with pytest.raises(DataError, match="at least 4 cells"):
        make(4).objective({"features": jnp.ones((3, 4))})


def test_train_mode_draws_other_pairs_each_time():
    op = make(4)
    x = jax.random.normal(jax.random.key(0), (40, 4))
    op.train_mode()
    first, second = (float(op.objective({"features": x})[0]) for _ in range(2))
    assert first != second
    op.eval_mode()
    assert float(op.objective({"features": x})[0]) == float(op.objective({"features": x})[0])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("min_dist", (0.1, 0.8)), ("spread", (1.0, 2.0)), ("n_negatives", (5, 9)), ("jitter", (0.0, 0.5)),
        ("n_layers", (0, 2)), ("metric", ("euclidean", "cosine")),
    ],
)
def test_each_setting_changes_the_training_loss(name, values):
    x = jax.random.normal(jax.random.key(0), (40, 4))
    losses = []
    for value in values:
        op = make(4, **{"hidden_dim": 8, name: value})
        op.train_mode()
        losses.append(float(op.objective({"features": x})[0]))
    assert losses[0] != losses[1]


def test_more_neighbours_make_more_edges():
    x, _ = clusters(100)
    few, many = (make(8, n_neighbors=k).sampler({"features": x}) for k in (5, 20))
    assert len(many.rows) > 2 * len(few.rows)


def test_cosine_map_knows_no_length():
    x, _ = clusters(80)
    op = make(8, metric="cosine")
    diffbio.fit(op, {"features": x}, max_epochs=1, batch_size=64, progress=False)
    np.testing.assert_allclose(embedded(op, x), embedded(op, 7 * x), atol=1e-4)


def test_edges_are_drawn_by_weight():
    edges = Edges(np.arange(4), np.arange(4)[::-1].copy(), jnp.array([0.1, 0.2, 0.3, 0.4]))
    batches = EdgeSampler(edges).order(np.random.default_rng(0), 201)
    assert batches.shape == (10, 200)
    np.testing.assert_array_equal(batches[:, :100] + batches[:, 100:], 3)
    np.testing.assert_allclose(np.bincount(batches[:, :100].ravel()) / 1000, [0.1, 0.2, 0.3, 0.4], atol=2e-3)


def test_an_epoch_is_one_pass_over_the_edges():
    n = 3000
    edges = Edges(np.arange(n), np.arange(n), jnp.ones(n))
    batches = EdgeSampler(edges).order(np.random.default_rng(0), 200)
    assert batches.shape == (30, 200)
    np.testing.assert_array_equal(np.sort(batches[:, :100].ravel()), np.arange(n))


def test_too_many_neighbours_are_named():
    with pytest.raises(ConfigError, match="n_neighbors must be at most the number of cells, 10, got 15"):
        diffbio.fit(make(8), {"features": clusters(10)[0]}, progress=False)
    with pytest.raises(ConfigError, match="min_dist must be at most spread"):
        UMAPConfig(min_dist=2.0)


def test_wrong_width_names_the_setting():
    with pytest.raises(DataError, match=r"has 5 features, but config\.n_features says 8"):
        embedded(make(8), np.zeros((4, 5), np.float32))
