"""Losses on an embedding: limits, brute force, gradients that are exact and that work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from diffbio.errors import ConfigError, DataError
from diffbio.losses import BatchMixingLoss, ClusteringCompactnessLoss, clustering


def blobs(spread, seed=0, n=60):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    centres = rng.normal(size=(3, 4)) * 3
    cells = centres[labels] + spread * rng.normal(size=(n, 4))
    return jnp.asarray(cells, jnp.float32), jnp.asarray(np.eye(3)[labels], jnp.float32)


def test_tight_clusters_cost_less_than_spread_ones():
    loss = ClusteringCompactnessLoss()
    assert loss(*blobs(0.1)) < loss(*blobs(1.0)) < loss(*blobs(3.0))


def test_hard_memberships_give_the_kmeans_inertia_and_the_hinge():
    cells, hard = blobs(1.0)
    x = np.asarray(cells)
    means = np.stack([x[np.asarray(hard[:, k]) == 1].mean(0) for k in range(3)])
    inertia = ((x - np.asarray(hard) @ means) ** 2).sum(1).mean()
    within = ClusteringCompactnessLoss(separation_weight=0.0)
    np.testing.assert_allclose(within(cells, hard), inertia, rtol=1e-4)
    gaps = np.array([np.linalg.norm(means[i] - means[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    wanted = inertia + 2 * (np.maximum(100 - gaps, 0) ** 2).mean()
    loss = ClusteringCompactnessLoss(separation_weight=2.0, min_separation=100.0)
    np.testing.assert_allclose(loss(cells, hard), wanted, rtol=1e-4)
    np.testing.assert_allclose(loss(cells, hard, jnp.asarray(means)), wanted, rtol=1e-4)
    # beyond the margin there is nothing to gain
    loss = ClusteringCompactnessLoss(min_separation=0.01)
    np.testing.assert_allclose(loss(cells, hard), inertia, rtol=1e-4)


def test_compactness_gradients():
    cells, hard = blobs(1.0, n=12)
    soft = 0.8 * hard + 0.2 / 3
    with jax.enable_x64(True):
        args = [jnp.asarray(a, jnp.float64) for a in (cells, soft)]
        loss = ClusteringCompactnessLoss(min_separation=20.0)
        check_grads(jax.jit(loss), args, order=1, modes=["rev"], rtol=1e-5)
    # an empty cluster, equal centroids, one cluster
    empty = jnp.zeros_like(hard).at[:, 0].set(1)
    for arguments in ((cells, empty), (cells * 0, hard), (cells, empty[:, :1])):
        value, grad = jax.jit(jax.value_and_grad(ClusteringCompactnessLoss()))(*arguments)
        assert jnp.isfinite(value)
        assert jnp.isfinite(grad).all()


def neighbour_entropy(x, batch, k, n_batches):
    """By definition, with a dense distance matrix."""
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(d, np.inf)
    near = np.argsort(d, axis=1)[:, :k]
    shares = np.stack([(batch[near] == b).mean(1) for b in range(n_batches)])
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(0).mean() / np.log(n_batches)


def cells_in_batches(n=90, shift=0.0, seed=0, n_batches=3, width=5):
    rng = np.random.default_rng(seed)
    batch = np.arange(n) % n_batches
    cells = rng.normal(size=(n, width)) + shift * rng.normal(size=(n_batches, width))[batch]
    return cells.astype(np.float32), batch.astype(np.int32)


@pytest.mark.parametrize("k", [5, 15, 60])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_cold_limit_is_the_entropy_of_the_k_nearest(k, shift):
    cells, batch = cells_in_batches(shift=shift)
    got = BatchMixingLoss(n_neighbors=k, temperature=1e-4)(jnp.asarray(cells), jnp.asarray(batch))
    # float32 places a few of the neighbours on the other side of the edge
    np.testing.assert_allclose(-got, neighbour_entropy(cells, batch, k, 3), atol=2e-3)


def test_mixed_is_lower_than_separated_and_bounded():
    loss = BatchMixingLoss()
    mixed, shifted, apart = (
        float(loss(*map(jnp.asarray, cells_in_batches(shift=s, n=300)))) for s in (0, 1, 100)
    )
    assert -1 <= mixed < -0.9
    assert mixed < shifted < apart
    assert -0.05 < apart <= 0


def test_every_setting_is_live():
    data = tuple(map(jnp.asarray, cells_in_batches(shift=1.0)))
    values = [
        float(BatchMixingLoss(**kw)(*data))
        for kw in ({}, {"n_neighbors": 5}, {"n_neighbors": 40}, {"n_batches": 4}, {"temperature": 0.3})
    ]
    assert len({round(v, 4) for v in values}) == len(values)


def test_blocks_do_not_change_the_result(monkeypatch):
    data = tuple(map(jnp.asarray, cells_in_batches(shift=1.0)))
    whole = jax.jit(jax.value_and_grad(BatchMixingLoss()))(*data)
    monkeypatch.setattr(clustering, "PAIRS_PER_BLOCK", 7 * 90)
    blocks = jax.jit(jax.value_and_grad(BatchMixingLoss()))(*data)
    np.testing.assert_allclose(blocks[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(blocks[1], whole[1], rtol=1e-3, atol=1e-6)


def test_mixing_gradient_equals_finite_differences():
    cells, batch = cells_in_batches(n=24, shift=1.0)
    with jax.enable_x64(True):
        cells, batch = jnp.asarray(cells, jnp.float64), jnp.asarray(batch)
        loss = BatchMixingLoss(n_neighbors=5)
        check_grads(jax.jit(lambda x: loss(x, batch)), (cells,), order=1, modes=["rev"], rtol=1e-4)


def test_descending_it_brings_batches_together_that_share_no_neighbour():
    """The plain neighbour entropy is flat there: all neighbours of a cell are of its own batch."""
    cells, batch = map(jnp.asarray, cells_in_batches(n=60, shift=5.0, n_batches=2))
    plain = neighbour_entropy(np.asarray(cells), np.asarray(batch), 15, 2)
    assert plain < 0.1
    loss, optimizer = BatchMixingLoss(n_batches=2), optax.adam(0.2)

    @jax.jit
    def train(offset):
        def step(carry, _):
            offset, state = carry
            grads = jax.grad(lambda o: loss(cells + jnp.where(batch[:, None] == 1, o, 0), batch))(offset)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(offset, updates), state), None

        return jax.lax.scan(step, (offset, optimizer.init(offset)), length=100)[0][0]

    offset = train(jnp.zeros(cells.shape[1]))
    moved = cells + jnp.where(batch[:, None] == 1, offset, 0)
    assert neighbour_entropy(np.asarray(moved), np.asarray(batch), 15, 2) > 0.8


@pytest.mark.parametrize("degenerate", ["zeros", "two cells", "one batch"])
def test_degenerate_cells_are_finite(degenerate):
    cells, batch = map(jnp.asarray, cells_in_batches(n=30))
    if degenerate == "zeros":
        cells = cells * 0
    if degenerate == "two cells":
        cells, batch = cells[:2], batch[:2]
    if degenerate == "one batch":
        batch = batch * 0
    value, grad = jax.jit(jax.value_and_grad(BatchMixingLoss()))(cells, batch)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_refuses_bad_settings_and_labels():
    with pytest.raises(ConfigError, match="n_neighbors must be >= 1, got 0"):
        BatchMixingLoss(n_neighbors=0)
    with pytest.raises(ConfigError, match="n_batches must be >= 2, got 1"):
        BatchMixingLoss(n_batches=1)
    with pytest.raises(ConfigError, match="min_separation must be >= 0"):
        ClusteringCompactnessLoss(min_separation=-1.0)
    cells, batch = map(jnp.asarray, cells_in_batches(n=30))
    with pytest.raises(DataError, match="holds label 2, but n_batches is 2"):
        BatchMixingLoss(n_batches=2)(cells, batch)
    with pytest.raises(DataError, match="only 1 cell"):
        BatchMixingLoss()(cells[:1], batch[:1])
