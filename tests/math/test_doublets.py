"""Doublets by simulation: the pieces against formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np

from diffbio.math.doublets import (
    bayesian_error,
    bayesian_score,
    content_order,
    doublet_positions,
    draw_pairs,
    minimum_between_modes,
    most_variable,
    share_near,
    simulated_share,
    v_scores,
)


def test_v_score_is_one_for_poisson_noise_and_larger_for_a_gene_that_varies():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(0, 1, 300), (800, 300)).astype(float)
    counts[:400, 7] += rng.poisson(20, 400)
    scores = v_scores(counts.mean(0), counts.var(0))
    assert abs(np.median(scores) - 1) < 0.15
    assert scores.argmax() == 7
    assert v_scores(np.zeros(3), np.zeros(3)).tolist() == [0, 0, 0]


def test_genes_of_too_few_cells_are_left_out():
    mean, variance = np.array([1.0, 2.0, 3.0, 0.0]), np.array([9.0, 8.0, 3.0, 0.0])
    assert most_variable(mean, variance, np.array([9, 2, 9, 0]), 0.0).tolist() == [True, False, True, False]


def test_the_order_is_that_of_the_content():
    counts = jax.random.poisson(jax.random.key(0), 2.0, (40, 6)).astype(float)
    moved = jax.random.permutation(jax.random.key(1), 40)
    same = counts[content_order(counts)] == counts[moved][content_order(counts[moved])]
    assert bool(same.all())
    slightly = counts + 1e-6  # finite differences must not reshuffle the cells
    assert (content_order(slightly) == content_order(counts)).all()


def test_pairs_are_of_two_different_cells():
    pairs = draw_pairs(jax.random.key(0), jnp.arange(30), 500)
    assert bool((pairs[:, 0] != pairs[:, 1]).all())
    assert set(np.unique(pairs)) == set(range(30))


def test_a_doublet_lies_where_its_summed_counts_do():
    keys = jax.random.split(jax.random.key(0), 2)
    counts = jax.random.poisson(keys[0], 5.0, (10, 8)).astype(float) + 1.0
    directions = jax.random.normal(keys[1], (8, 3))
    library = counts.sum(1)

    def project(x, total):
        return (100 * x / total[:, None] - 3.0) @ directions

    pairs = jnp.array([[0, 1], [2, 5], [9, 9]])
    summed = counts[pairs[:, 0]] + counts[pairs[:, 1]]
    found = doublet_positions(project(counts, library), library, pairs)
    np.testing.assert_allclose(found, project(summed, summed.sum(1)), rtol=2e-5, atol=1e-4)


def counted(points, is_simulated, k):
    """Share among the k nearest, written out."""
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distance, np.inf)
    return is_simulated[np.argsort(distance, axis=1)[:, :k]].mean(1)


def test_sharp_share_is_the_count_of_the_nearest():
    points = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    observed, simulated = jnp.asarray(points[:30]), jnp.asarray(points[30:])
    found = jnp.concatenate(simulated_share(observed, simulated, None, k=9, temperature=1e-7))
    np.testing.assert_allclose(found, counted(points, np.arange(90) >= 30, 9), atol=1e-6)


def test_cells_outside_the_reference_are_compared_with_it():
    points = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    observed, simulated = jnp.asarray(points[:30]), jnp.asarray(points[30:])
    reference = jnp.arange(0, 30, 2)
    cells, doublets = simulated_share(observed, simulated, reference, k=9, temperature=1e-7)
    kept = np.concatenate([points[:30:2], points[30:]])
    inside = counted(kept, np.arange(75) >= 15, 9)
    np.testing.assert_allclose(cells[::2], inside[:15], atol=1e-6)
    np.testing.assert_allclose(doublets, inside[15:], atol=1e-6)
    outside = np.concatenate([kept, points[1:2]])
    np.testing.assert_allclose(cells[1], counted(outside, np.arange(76) >= 15, 9)[-1], atol=1e-6)


def test_a_point_of_the_reference_does_not_count_itself():
    points = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    doublet = (np.arange(60) >= 20).astype(np.float32)
    found = share_near(jnp.asarray(points), jnp.asarray(points), jnp.asarray(doublet), k=9, temperature=1e-7)
    np.testing.assert_allclose(found, counted(points, doublet, 9), atol=0.06)  # a neighbour very near weighs less
    assert np.abs(np.asarray(found) - counted(points, doublet, 9)).mean() < 0.01


def test_score_is_bayes_rule():
    # doublets lie as dense as the simulated ones, q / r, singlets as the observed cells, 1 - q
    q, rho, r = jnp.linspace(0.05, 0.95, 7), 0.06, 2.0
    score = bayesian_score(q, ratio=r, expected_rate=rho)
    doublets, singlets = rho * q / r, (1 - rho) * (1 - q)
    np.testing.assert_allclose(score, doublets / (doublets + singlets), rtol=1e-5)
    assert bool((jnp.diff(score) > 0).all())
    np.testing.assert_allclose(bayesian_score(jnp.array([0.0, 1.0]), ratio=r, expected_rate=rho), [0.0, 1.0], atol=1e-6)
    higher = bayesian_score(q, ratio=r, expected_rate=0.2)
    assert bool((higher > score).all())


def test_error_propagates_those_of_share_and_rate():
    q, k, r, rho, sd = 0.4, 50, 2.0, 0.1, 0.02
    by_share = jax.grad(lambda q: bayesian_score(q[None], ratio=r, expected_rate=rho)[0])(jnp.asarray(q))
    step = 1e-3
    near = [bayesian_score(jnp.array([q]), ratio=r, expected_rate=rho + e)[0] for e in (-step, step)]
    by_rate = (near[1] - near[0]) / (2 * step)
    expected = np.hypot(by_share * np.sqrt(q * (1 - q) / (k + 3)), by_rate * sd)
    found = bayesian_error(jnp.array([q]), k=k, ratio=r, expected_rate=rho, rate_sd=sd)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3)


def test_threshold_lies_between_two_modes_and_says_when_there_is_one():
    keys = jax.random.split(jax.random.key(0), 2)
    low, high = 0.1 + 0.02 * jax.random.normal(keys[0], (800,)), 0.6 + 0.05 * jax.random.normal(keys[1], (400,))
    both = minimum_between_modes(jnp.concatenate([low, high]))
    assert bool(both.found)
    assert 0.2 < float(both.value) < 0.45
    assert not bool(minimum_between_modes(jnp.full(100, 0.3)).found)
