"""Formulas of ligand-receptor scores against plain numpy, and against LIANA's stored table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffbio.math.communication import complex_levels, received
from diffbio.math.ligand_receptor import (
    analytic_pvalues,
    between,
    gene_statistics,
    observed_scores,
    permutation_pvalues,
    score_of,
    side_of,
)
from diffbio.math.rank_aggregation import robust_rank_aggregate, weighted_ranks

MEAN = score_of("mean", kh=0.5, hill_n=1.0)


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(1.0, (40, 6)) * rng.uniform(0.5, 2.0, (1, 6))).astype(np.float32)
    labels = rng.integers(0, 3, 40)
    values[labels == 1, 2] += 1.5
    pairs = np.array([[[0, -1], [1, 2]], [[2, -1], [3, -1]], [[2, 4], [5, 0]]])
    return values, labels, np.eye(3, dtype=np.float32)[labels], pairs


def sides(values, groups, pairs, *, expr_prop=0.3, temperature=0.0):
    genes = gene_statistics(jnp.asarray(values), jnp.asarray(groups), temperature=temperature)
    return tuple(
        side_of(genes, jnp.asarray(pairs[:, k]), expr_prop=expr_prop, temperature=temperature) for k in (0, 1)
    )


def test_statistics_complexes_and_gates_are_those_of_the_definitions(cells):
    values, labels, groups, pairs = cells
    mean = np.stack([values[labels == g].mean(0) for g in range(3)])
    share = np.stack([(values[labels == g] > 0).mean(0) for g in range(3)])
    scaled = (values - values.mean(0)) / values.std(0, ddof=1)
    linear = np.expm1(values)
    fold = [np.log2(linear[labels == g].mean(0) + 1) - np.log2(linear[labels != g].mean(0) + 1) for g in range(3)]
    ligand, receptor = sides(values, groups, pairs)
    for side, k in ((ligand, 0), (receptor, 1)):
        for p, pair in enumerate(pairs[:, k]):
            units = pair[pair >= 0]
            for g in range(3):
                low = units[np.argmin(mean[g, units])]
                assert side.mean[g, p] == pytest.approx(mean[g, low], rel=1e-5)
                assert side.gate[g, p] == (share[g, units] >= 0.3).all()
                assert side.zscore[g, p] == pytest.approx(scaled[labels == g, low].mean(), abs=1e-5)
                assert side.log_fold[g, p] == pytest.approx(fold[g][low], abs=1e-5)
                assert side.share[g, p] == pytest.approx(mean[g, low] / mean[:, low].sum(), rel=1e-5)


def test_soft_choices_become_the_hard_ones(cells):
    values, _, groups, pairs = cells
    hard = sides(values, groups, pairs)
    soft = sides(values, groups, pairs, temperature=1e-3)
    for a, b in zip(hard, soft, strict=True):
        np.testing.assert_allclose(a.mean, b.mean, atol=1e-5)
        np.testing.assert_allclose(a.gate, b.gate, atol=1e-5)


def test_scores_of_the_metrics():
    left, right = jnp.array([[2.0, 0.0]]), jnp.array([[0.5, 3.0]])
    product = left[0] * right[0]
    for metric, wanted in (
        ("mean", [1.25, 1.5]),
        ("product", product),
        ("geometric", jnp.sqrt(product)),
        ("hill", product**2 / (0.7**2 + product**2)),
    ):
        found = between(score_of(metric, kh=0.7, hill_n=2.0), left, right)
        np.testing.assert_allclose(found[:, 0, 0], wanted, rtol=1e-6, err_msg=metric)


def test_permutations_are_counted(cells):
    values, labels, groups, pairs = cells
    rng = np.random.default_rng(1)
    orders = np.stack([rng.permutation(40) for _ in range(50)]).astype(np.int32)
    ligand, receptor = sides(values, groups, pairs)
    found = permutation_pvalues(*map(jnp.asarray, (values, groups, orders)), ligand, receptor, MEAN)
    mean = np.stack([values[labels == g].mean(0) for g in range(3)])
    low = [[[u[u >= 0][np.argmin(mean[g, u[u >= 0]])] for u in pairs[:, k]] for g in range(3)] for k in (0, 1)]
    wanted = np.zeros((3, 3, 3))
    for order in orders:
        shuffled = np.stack([values[labels[order] == g].mean(0) for g in range(3)])
        for p in range(3):
            for s in range(3):
                for t in range(3):
                    a, b = low[0][s][p], low[1][t][p]
                    wanted[p, s, t] += shuffled[s, a] + shuffled[t, b] >= mean[s, a] + mean[t, b] - 1e-6
    np.testing.assert_allclose(found, wanted / 50, atol=1e-6)
    assert observed_scores(MEAN, ligand, receptor).shape == found.shape


def test_analytic_mean_and_variance_are_those_of_the_permutations(cells):
    values, _, _, pairs = cells
    rng = np.random.default_rng(2)
    soft = rng.dirichlet(np.full(3, 0.5), 40).astype(np.float32)
    ligand, receptor = sides(values, soft, pairs)
    p = analytic_pvalues(jnp.asarray(values), jnp.asarray(soft), ligand, receptor, MEAN)
    size = soft.sum(0)
    weights = [np.asarray(side.weights) for side in (ligand, receptor)]
    columns = [np.maximum(pairs[:, k], 0) for k in (0, 1)]

    def scores(order):
        mean = (soft[order].T @ values) / size[:, None]
        one, other = (np.einsum("gps,gps->gp", w, mean[:, c]) for w, c in zip(weights, columns, strict=True))
        return (one.T[:, :, None] + other.T[:, None, :]) / 2

    drawn = np.stack([scores(rng.permutation(40)) for _ in range(4000)])
    wanted = stats.norm.sf((scores(np.arange(40)) - drawn.mean(0)) / drawn.std(0))
    np.testing.assert_allclose(p, wanted, atol=0.03)  # 4000 draws: the spread is known to 1 %


def test_ranks_and_their_aggregate_are_kolde_s():
    rng = np.random.default_rng(3)
    scores = np.round(rng.normal(size=(30, 4)), 1).astype(np.float32)
    kept = np.arange(30) % 5 > 0
    ranks = np.stack([weighted_ranks(jnp.asarray(s), jnp.asarray(kept, jnp.float32), 0.0) for s in scores.T], 1)
    wanted = np.stack([stats.rankdata(-s[kept]) for s in scores.T], 1)
    np.testing.assert_allclose(ranks[kept], wanted, rtol=1e-6)
    found = robust_rank_aggregate(jnp.asarray(ranks), jnp.asarray(kept, jnp.float32))[kept]
    share = np.sort(wanted / wanted.max(0), 1)
    k = np.arange(4) + 1
    np.testing.assert_allclose(found, np.minimum(4 * stats.beta.cdf(share, k, 5 - k).min(1), 1), rtol=1e-4)
    soft = weighted_ranks(jnp.asarray(scores[:, 0]), jnp.ones(30), 1e-4)
    np.testing.assert_allclose(soft, stats.rankdata(-scores[:, 0]), atol=0.05)  # float32 sums over a width


def test_signals_are_sums_over_edges(monkeypatch):
    rng = np.random.default_rng(4)
    levels, weights = rng.uniform(size=(7, 5)).astype(np.float32), rng.uniform(size=12).astype(np.float32)
    senders, receivers = rng.integers(0, 7, (2, 12))
    wanted = np.zeros((7, 5))
    np.add.at(wanted, receivers, weights[:, None] * levels[senders])
    arguments = [jnp.asarray(x) for x in (weights, senders, receivers, levels)]
    np.testing.assert_allclose(received(*arguments), wanted, rtol=1e-5)
    monkeypatch.setattr("diffbio.math.communication.VALUES_AT_ONCE", 24)  # two pairs at once
    np.testing.assert_allclose(received(*arguments), wanted, rtol=1e-5)
    by_weight = jax.grad(lambda w: (received(w, *arguments[1:]) ** 2).sum())(arguments[0])
    np.testing.assert_allclose(by_weight, (2 * wanted[receivers] * levels[senders]).sum(1), rtol=1e-4)
    columns = jnp.array([[0, -1], [1, 2]])
    low = np.stack([levels[:, 0], levels[:, 1:3].min(1)], 1)
    np.testing.assert_array_equal(complex_levels(arguments[3], columns, 0.0), low)
    np.testing.assert_allclose(complex_levels(arguments[3], columns, 1e-4), low, atol=1e-4)
