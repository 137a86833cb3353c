"""Soft k-means: Lloyd's rule in the cold limit, k-means++ from data, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from diffbio.errors import DataError
from diffbio.operators.singlecell import SoftClusteringConfig, SoftKMeansClustering


def make(seed=0, **settings):
    return SoftKMeansClustering(SoftClusteringConfig(**settings), rngs=nnx.Rngs(seed))


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 5)) * 6
    truth = np.repeat(np.arange(4), 40)
    return (centres[truth] + rng.normal(size=(160, 5))).astype(np.float32), truth


def test_cold_limit_is_lloyds_rule(blobs):
    cells, _ = blobs
    op = make(n_clusters=4, n_features=5, temperature=1e-4)
    out = op.apply({"embeddings": cells})[0]
    centroids = np.asarray(op.centroids[...])
    nearest = ((cells[:, None] - centroids) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(out["cluster_labels"], nearest)
    np.testing.assert_allclose(out["cluster_assignments"], np.eye(4)[nearest], atol=1e-5)
    loss, metrics = op.objective({"embeddings": cells})
    inertia = ((cells - centroids[nearest]) ** 2).sum(1).mean()
    np.testing.assert_allclose(loss, inertia, rtol=1e-4)
    np.testing.assert_allclose(metrics["inertia"], inertia, rtol=1e-4)


def test_rows_sum_to_one_and_sharpen_as_it_cools(blobs):
    cells, _ = blobs
    ops = (make(n_clusters=4, n_features=5, temperature=t) for t in (10.0, 1.0))
    warm, cool = (np.asarray(op.apply({"embeddings": cells})[0]["cluster_assignments"]) for op in ops)
    np.testing.assert_allclose(warm.sum(1), 1, atol=1e-5)
    assert cool.max(1).mean() > warm.max(1).mean()


def test_one_cluster_takes_all_and_labels_are_in_range(blobs):
    out = make(n_clusters=1, n_features=5).apply({"embeddings": blobs[0]})[0]
    np.testing.assert_array_equal(out["cluster_assignments"], 1)
    np.testing.assert_array_equal(out["cluster_labels"], 0)
    labels = make(n_clusters=9, n_features=5).apply({"embeddings": blobs[0]})[0]["cluster_labels"]
    assert set(np.unique(labels)) <= set(range(9))


def test_a_minimum_of_the_cold_objective_is_a_fixed_point_of_lloyd(blobs):
    cells, truth = blobs
    op = make(n_clusters=4, n_features=5, temperature=0.05)
    op.centroids[...] = jnp.asarray(cells[[5, 50, 90, 130]])
    graphdef, params, rest = nnx.split(op, nnx.Param, ...)
    optimizer = optax.adam(0.05)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry

            def loss(p):
                return nnx.merge(graphdef, p, rest, copy=True).objective({"embeddings": cells})[0]

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=400)
        return params, values

    params, values = descend(params)
    assert values[-1] < values[0]
    op = nnx.merge(graphdef, params, rest)
    out = op.apply({"embeddings": cells})[0]
    labels = np.asarray(out["cluster_labels"])
    means = np.stack([cells[labels == k].mean(0) for k in range(4)])
    np.testing.assert_allclose(out["centroids"], means, atol=0.02)  # Adam's last steps still rock a little
    assert adjusted_rand_score(truth, labels) > 0.99


def test_starts_where_kmeans_ends(blobs):
    cells, truth = blobs
    op = make(n_clusters=4, n_features=5, temperature=0.01)
    assert not op.fitted
    op.init_from({"embeddings": cells})
    assert op.fitted
    inertia = float(op.objective({"embeddings": cells})[1]["inertia"]) * len(cells)
    assert inertia <= 1.0001 * KMeans(4, n_init=10, random_state=0).fit(cells).inertia_
    labels = op.apply({"embeddings": cells})[0]["cluster_labels"]
    assert adjusted_rand_score(truth, labels) > 0.99
    before = np.asarray(op.centroids[...])
    op.init_from({"embeddings": cells})
    np.testing.assert_array_equal(op.centroids[...], before)


def test_fixed_centroids_are_not_parameters():
    assert not jax.tree.leaves(nnx.state(make(n_clusters=3, learnable_centroids=False), nnx.Param))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (np.zeros((3, 5)), "n_clusters is 4, .* only 3 cells"),
        (np.tile(np.arange(5.0), (9, 1)), "n_clusters is 4, .* only 1 different cells"),
        (np.full((9, 5), np.nan), "NaN or infinity, first in row 0"),
    ],
)
def test_refuses_a_start_from_too_few_cells(cells, message):
    with pytest.raises(DataError, match=message):
        make(n_clusters=4, n_features=5).init_from({"embeddings": cells})
