"""MMD: equal to its definition, 0 on average without a difference, growing with one; random features agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.math import mmd

WIDTHS = (0.5, 2.0, 8.0)


def by_definition(x, labels, a, b, weights):
    """Weighted U-statistic, pair by pair in numpy."""

    def mean_kernel(i, j, w, v, *, same):
        d = ((x[i][:, None] - x[j][None]) ** 2).sum(-1)
        k = sum(np.exp(-d / s) for s in WIDTHS) / len(WIDTHS)
        products = np.outer(w, v)
        if same:
            np.fill_diagonal(products, 0)
        return (k * products).sum() / products.sum()

    i, j = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
    w, v = weights[i, b], weights[j, a]
    within = mean_kernel(i, i, w, w, same=True) + mean_kernel(j, j, v, v, same=True)
    return within - 2 * mean_kernel(i, j, w, v, same=False)


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_u_statistic_of_every_pair(weighted):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [9, 14, 7])
    x = rng.normal(size=(30, 4)) + labels[:, None]
    weights = rng.uniform(0.1, 1, (30, 3)) if weighted else np.ones((30, 3))
    with jax.enable_x64(True):
        given = jnp.asarray(weights) if weighted else None
        table = mmd.mmd2(jnp.asarray(x), jnp.eye(3)[labels], widths=jnp.asarray(WIDTHS), weights=given)
    for a in range(3):
        for b in range(3):
            wanted = by_definition(x, labels, a, b, weights) if a != b else 0.0
            np.testing.assert_allclose(table[a, b], wanted, atol=1e-6)


def two_samples(rng, n, shift):
    labels = np.arange(2 * n) % 2
    x = rng.normal(size=(2 * n, 5)) + shift * labels[:, None]
    return jnp.asarray(x, jnp.float32), jnp.eye(2)[labels]


def test_it_is_zero_on_average_without_a_difference_and_grows_with_one():
    rng = np.random.default_rng(1)
    value = jax.jit(lambda x, g: mmd.mmd2(x, g, widths=jnp.asarray(WIDTHS))[0, 1])
    same = np.array([float(value(*two_samples(rng, 40, 0.0))) for _ in range(60)])
    assert abs(same.mean()) < 3 * same.std() / np.sqrt(len(same))
    shifted = [float(value(*two_samples(np.random.default_rng(2), 200, s))) for s in (0, 0.3, 0.6, 1, 2, 4)]
    assert np.diff(shifted).min() > 0.003  # the first step is the smallest: MMD² grows with the square of the shift
    assert abs(shifted[0]) < 0.003


def test_random_features_agree_with_all_pairs(monkeypatch):
    rng = np.random.default_rng(3)
    x, groups = two_samples(rng, 150, 0.7)
    directions = jnp.asarray(rng.normal(size=(5, 6000)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.2, 1, (300, 2)), jnp.float32)
    widths = jnp.asarray(WIDTHS)
    for w in (None, weights):
        exact = mmd.mmd2(x, groups, widths=widths, weights=w)
        found = mmd.mmd2_random_features(x, groups, directions=directions, widths=widths, weights=w)
        np.testing.assert_allclose(found, exact, atol=0.01)  # 1 / sqrt(6000) is 0.013 for a single kernel
        with monkeypatch.context() as patch:
            patch.setattr(mmd, "ROWS_PER_BLOCK", 64)
            blocks = mmd.mmd2_random_features(x, groups, directions=directions, widths=widths, weights=w)
        np.testing.assert_allclose(blocks, found, atol=1e-5)


def test_groups_too_small_to_compare_are_left_out():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(9, 2)), jnp.float32)
    groups = jnp.eye(3)[np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])]
    table = mmd.mmd2(x, groups, widths=jnp.ones(1))
    assert (table[2] == 0).all()
    np.testing.assert_allclose(mmd.mean_over_pairs(table, groups), table[0, 1], rtol=1e-5)
    assert mmd.mean_over_pairs(table[:1, :1], groups[:, :1]) == 0
    same = jax.grad(lambda x: mmd.mmd2(x, groups, widths=jnp.ones(1)).sum())(jnp.zeros((9, 2)))
    assert jnp.isfinite(same).all()


def test_the_median_distance_is_a_constant_to_the_gradient():
    x = jnp.asarray([[0.0], [1.0], [3.0]])
    assert mmd.median_squared_distance(x) == 4.0
    assert mmd.median_squared_distance(jnp.zeros((5, 2))) == 1.0
    assert mmd.median_squared_distance(jnp.zeros((1, 2))) == 1.0
    assert (jax.grad(mmd.median_squared_distance)(x) == 0).all()


def test_a_kind_of_cell_that_the_other_group_lacks_counts_little():
    rng = np.random.default_rng(5)
    kind = np.repeat([0, 1, 0], 40)
    x = jnp.asarray(rng.normal(size=(120, 2)) + 8.0 * kind[:, None], jnp.float32)
    groups = jnp.eye(2)[np.repeat([0, 0, 1], 40)]
    weights = mmd.overlap_weights(x, groups, width=4.0, floor=0.1)
    assert (weights[:, 0][80:] > 0.2).all()
    assert weights[:40, 1].mean() > 0.8
    assert weights[40:80, 1].max() < 0.5
    assert weights[40:80, 1].mean() < 0.2
    np.testing.assert_allclose(weights[:80, 0], 1, rtol=1e-5)  # with its own group a row agrees
    flat = mmd.overlap_weights(x, groups, width=4.0, floor=1e6)
    np.testing.assert_allclose(flat, 1, atol=1e-4)
