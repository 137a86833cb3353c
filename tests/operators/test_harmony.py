"""Harmony: the stored result of the R program, limits, invariances, gradients, new cells."""

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from sklearn.linear_model import Ridge
from sklearn.metrics import silhouette_score

from diffbio.errors import ConfigError, DataError
from diffbio.operators.base import Operator
from diffbio.operators.singlecell import BatchCorrectionConfig, DifferentiableHarmony
from diffbio.operators.singlecell.harmony import learn, project

N, WIDTH, BATCHES = 60, 4, 3


def make(**settings):
    settings = {"n_clusters": 4, "n_features": WIDTH, "n_batches": BATCHES, "n_iterations": 3} | settings
    return DifferentiableHarmony(BatchCorrectionConfig(**settings), rngs=nnx.Rngs(0))


def cells(seed=0, n=N, shift=1.0, n_batches=BATCHES):
    """Three kinds of cells in batches that are shifted against one another."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(0, 3, n), rng.integers(0, n_batches, n)
    x = rng.normal(size=(n, WIDTH)) * 0.5 + 4 * np.eye(3, WIDTH)[kind]
    x = x + shift * np.random.default_rng(99).normal(size=(n_batches, WIDTH))[batch]
    data = {"embeddings": jnp.asarray(x, jnp.float32), "batch_labels": jnp.asarray(batch, jnp.int32)}
    return data, kind


def corrected(op, data):
    return np.asarray(op.apply(data)[0]["corrected_embeddings"])


def test_agrees_with_the_r_program(data_dir):
    with h5py.File(data_dir / "harmony_reference_pbmc3500.h5ad") as file:
        before, wanted = (file["obsm"][key][:].astype(np.float32) for key in ("X_pca", "X_pca_harmony_r"))
        labels = file["obs"]["batch"]["codes"][:].astype(np.int32)
    op = DifferentiableHarmony(BatchCorrectionConfig(n_features=30, n_batches=3), rngs=nnx.Rngs(0))
    got = corrected(op, {"embeddings": before, "batch_labels": labels})
    correlations = [np.corrcoef(got[:, i], wanted[:, i])[0, 1] for i in range(30)]
    # measured 0.9977 and 0.9992; harmonypy 0.996 and 0.999; uncorrected 0.733 and 0.967
    assert min(correlations) >= 0.995
    assert np.mean(correlations) >= 0.999


def test_mixes_batches_and_keeps_the_kinds_apart():
    data, kind = cells(n=300)
    before, after = np.asarray(data["embeddings"]), corrected(make(), data)
    batch = np.asarray(data["batch_labels"])
    assert silhouette_score(before[kind == 0], batch[kind == 0]) > 0.2
    assert silhouette_score(after[kind == 0], batch[kind == 0]) < 0.02
    assert silhouette_score(after, kind) > silhouette_score(before, kind)


def test_one_batch_level_is_the_identity():
    data, _ = cells()
    data["batch_labels"] = data["batch_labels"] * 0
    for n_batches in (1, 3):
        np.testing.assert_allclose(corrected(make(n_batches=n_batches), data), data["embeddings"], atol=1e-5)


def test_no_penalty_and_an_infinite_ridge_are_the_identity():
    data, _ = cells()
    got = corrected(make(theta=0.0, lamb=1e9), data)
    np.testing.assert_allclose(got, data["embeddings"], atol=1e-5)
    assert np.abs(corrected(make(theta=0.0, lamb=1.0), data) - data["embeddings"]).max() > 0.1


def test_cold_clusters_are_hard():
    data, _ = cells()
    memberships = np.asarray(make(sigma=1e-4, theta=0.0).apply(data)[0]["cluster_assignments"])
    np.testing.assert_allclose(memberships.sum(1), 1, atol=1e-5)
    # a cell between two centroids may stay soft: one of 60 at most
    assert (memberships.max(1) > 0.999).mean() > 0.98
    soft = np.asarray(make(sigma=0.5).apply(data)[0]["cluster_assignments"])
    assert soft.max(1).mean() < memberships.max(1).mean()


def test_memberships_are_probabilities_and_one_cluster_takes_all():
    data, _ = cells()
    for n_clusters in (1, 4):
        memberships = np.asarray(make(n_clusters=n_clusters).apply(data)[0]["cluster_assignments"])
        assert (memberships >= 0).all()
        np.testing.assert_allclose(memberships.sum(1), 1, atol=1e-5)


def test_clusters_hold_every_batch_evenly_when_theta_is_large():
    """The penalty is the entropy of the batches within a cluster: it moves memberships, not cells."""
    data, _ = cells(n=300)

    def unevenness(theta):
        # before any correction of the cells: one iteration
        r = np.asarray(make(theta=theta, n_iterations=1, n_rounds=200).apply(data)[0]["cluster_assignments"])
        share = np.stack([r[np.asarray(data["batch_labels"]) == b].mean(0) for b in range(BATCHES)])
        return (share.std(0) / share.mean(0)).mean()

    assert unevenness(4.0) < 0.3 * unevenness(0.0)


def test_the_correction_is_the_ridge_regression_of_the_publication():
    """One iteration, redone with scikit-learn: per cluster, cells on batch, intercept without penalty."""
    data, _ = cells()
    z, batch = np.asarray(data["embeddings"], float), np.asarray(data["batch_labels"])
    out = make(n_iterations=1, lamb=2.0).apply(data)[0]
    design, r = np.eye(BATCHES)[batch], np.asarray(out["cluster_assignments"], float)
    wanted = z.copy()
    for k in range(r.shape[1]):
        shift = Ridge(alpha=2.0).fit(design, z, sample_weight=r[:, k]).coef_
        wanted -= r[:, k : k + 1] * (design @ shift.T)
    np.testing.assert_allclose(out["corrected_embeddings"], wanted, atol=2e-4)


def test_the_penalised_clustering_comes_to_rest():
    """The damped full-batch update ends where R is its own update: no oscillation, also for a large theta."""
    data, _ = cells(n=200, shift=2.0)
    for theta in (2.0, 8.0):
        long, longer = (
            np.asarray(make(theta=theta, n_iterations=1, n_rounds=n).apply(data)[0]["cluster_assignments"])
            for n in (400, 401)
        )
        np.testing.assert_allclose(long, longer, atol=1e-3)  # undamped: 0.03 at theta 2


@pytest.mark.parametrize(
    "setting", [{"theta": 0.5}, {"sigma": 0.2}, {"lamb": 5.0}, {"n_rounds": 3}, {"n_clusters": 6}]
)
def test_every_setting_changes_the_result(setting):
    data, _ = cells(shift=2.0)
    assert np.abs(corrected(make(**setting), data) - corrected(make(), data)).max() > 1e-3


def test_order_of_cells_does_not_matter():
    data, _ = cells(n=300)
    order = np.random.default_rng(1).permutation(300)
    shuffled = {key: value[order] for key, value in data.items()}
    a, b = (make().apply(d)[0] for d in (data, shuffled))
    for key in ("corrected_embeddings", "cluster_assignments"):
        np.testing.assert_allclose(np.asarray(a[key])[order], b[key], atol=1e-4)


def test_gradients_in_cells_and_settings_equal_finite_differences():
    data, _ = cells(n=40)
    labels = data["batch_labels"]
    with jax.enable_x64(True):
        z = jnp.asarray(data["embeddings"], jnp.float64)

        @jax.jit
        def f(z, theta, sigma, lamb):
            found = learn(
                z, labels, n_clusters=4, n_batches=3, n_iterations=3, n_rounds=5,
                theta=theta, sigma=sigma, lamb=lamb,
            )  # fmt: skip
            return project(z, labels, found, sigma=sigma)

        settings = tuple(jnp.asarray(v, jnp.float64) for v in (2.0, 0.1, 1.0))
        check_grads(f, (z, *settings), order=1, modes=["rev"], rtol=1e-4)


def test_a_stored_reference_repeats_its_fit_and_takes_new_cells_in_chunks(tmp_path):
    data, _ = cells(n=300)
    op = make()
    alone = op.apply(data)[0]
    assert op.reference is None
    op.init_from(data)
    again = op.apply(data)[0]
    for key in ("corrected_embeddings", "cluster_assignments"):
        np.testing.assert_allclose(again[key], alone[key], atol=1e-6)  # compiled once whole, once in parts
    chunks = [corrected(op, {k: v[i : i + 7] for k, v in data.items()}) for i in range(0, 300, 7)]
    np.testing.assert_allclose(np.concatenate(chunks), again["corrected_embeddings"], atol=1e-5)

    new, kind = cells(seed=5, n=90)
    batch, got = np.asarray(new["batch_labels"]), corrected(op, new)
    assert silhouette_score(got[kind == 0], batch[kind == 0]) < 0.1
    op.save(tmp_path / "harmony")
    loaded = Operator.load(tmp_path / "harmony")
    np.testing.assert_array_equal(corrected(loaded, new), got)
    op.clear_reference()
    assert np.abs(corrected(op, new) - got).max() > 1e-3


def test_the_stored_reference_is_not_trained_and_passes_through_jit():
    data, _ = cells()
    op = make()
    op.init_from(data)
    assert not jax.tree.leaves(nnx.state(op, nnx.Param))
    inside = nnx.jit(lambda op, d: op.apply(d)[0]["corrected_embeddings"])(op, data)
    np.testing.assert_allclose(inside, corrected(op, data), atol=1e-5)


def test_refuses_labels_and_sizes_that_do_not_fit():
    data, _ = cells()
    with pytest.raises(DataError, match="holds label 2, but n_batches is 2; pass n_batches=3"):
        make(n_batches=2).apply(data)
    with pytest.raises(DataError, match=r"holds label -1; number the batches 0 \.\.\. 2"):
        make().apply(data | {"batch_labels": data["batch_labels"].at[0].set(-1)})
    with pytest.raises(DataError, match="n_clusters is 100, but there are only 60 cells"):
        make(n_clusters=100).apply(data)
    with pytest.raises(DataError, match="NaN or infinity, first in row 7"):
        make().init_from(data | {"embeddings": data["embeddings"].at[7, 0].set(jnp.nan)})
    with pytest.raises(ConfigError, match="theta must be >= 0"):
        make(theta=-1.0)


def test_unseen_labels_under_jit_are_left_alone_and_disturb_nobody():
    data, _ = cells()
    op = make()
    odd = jnp.array([-1, 3, 7], jnp.int32)
    more = {
        "embeddings": jnp.concatenate([data["embeddings"], 50 + data["embeddings"][:3]]),
        "batch_labels": jnp.concatenate([data["batch_labels"], odd]),
    }
    got = jax.jit(lambda d: op.apply(d)[0]["corrected_embeddings"])(more)
    np.testing.assert_array_equal(got[-3:], more["embeddings"][-3:])
    np.testing.assert_allclose(got[:-3], corrected(op, data), atol=1e-4)


def test_as_many_clusters_as_cells():
    data, _ = cells()
    out = make(n_clusters=N).apply(data)[0]
    assert all(jnp.isfinite(out[key]).all() for key in ("corrected_embeddings", "cluster_assignments"))
