"""Wasserstein-2, MMD² and their permutations against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from diffbio.math.ranking import benjamini_hochberg
from diffbio.math.two_sample_weights import overlap_weights, zeros_ratio
from diffbio.math.two_samples import least_share, mmd, null_mmd, null_wasserstein, permutation_share, wasserstein

RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1], [9, 14])
VALUES = RNG.normal(size=(23, 2)) + LABELS[:, None] * [1.0, 0.0]


def ordered(values, labels):
    order = np.argsort(values, axis=0)
    second = labels.astype(float)
    return np.take_along_axis(values, order, 0), (1 - second)[order], second[order]


def wasserstein_by_quantiles(x, y):
    """Every value as often as makes the samples equally large."""
    return ((np.sort(np.repeat(x, len(y))) - np.sort(np.repeat(y, len(x)))) ** 2).mean()


def mmd_by_pairs(x, y, width):
    def k(a, b):
        return np.exp(-((a[:, None] - b) ** 2) / width)

    n, m = len(x), len(y)
    own = (k(x, x).sum() - n) / (n * (n - 1)) + (k(y, y).sum() - m) / (m * (m - 1))
    return own - 2 * k(x, y).mean()


def test_distances_are_those_of_numpy_and_of_their_permutations():
    with jax.enable_x64(True):
        found = wasserstein(*map(jnp.asarray, ordered(VALUES, LABELS)))
        squares = mmd(*map(jnp.asarray, ordered(VALUES, LABELS)))
        for g, x in enumerate(VALUES.T):
            a, b = x[LABELS == 0], x[LABELS == 1]
            np.testing.assert_allclose(found.total[g], wasserstein_by_quantiles(a, b), rtol=1e-9)
            np.testing.assert_allclose(found.location[g], (a.mean() - b.mean()) ** 2, rtol=1e-9)
            np.testing.assert_allclose(found.size[g], (a.std() - b.std()) ** 2, rtol=1e-9)
            np.testing.assert_allclose(squares[g], mmd_by_pairs(a, b, x.var()), atol=1e-6)
        np.testing.assert_allclose(found.location + found.size + found.shape, found.total, atol=1e-12)
        assert (np.asarray(found.shape) > 0).all()
        orders = np.stack([RNG.permutation(23) for _ in range(3)])
        values = np.sort(VALUES, axis=0)
        given = map(jnp.asarray, (values, 1.0 - LABELS, 1.0 * LABELS, orders))
        null = null_wasserstein(*given)
        given = map(jnp.asarray, (values, 1.0 - LABELS, 1.0 * LABELS, orders))
        null_squares = null_mmd(*given)
        for order, row, squared in zip(orders, null, null_squares, strict=True):
            x, dealt = values[:, 1], LABELS[order]
            a, b = x[dealt == 0], x[dealt == 1]
            np.testing.assert_allclose(row[1], wasserstein_by_quantiles(a, b), rtol=1e-9)
            np.testing.assert_allclose(squared[1], mmd_by_pairs(a, b, x.var()), atol=1e-6)


def test_pvalues_count_and_have_a_tail():
    null = RNG.chisquare(2, (1000, 2))
    observed = np.array([np.quantile(null[:, 0], 0.9), 40.0])
    counted = permutation_share(jnp.asarray(observed), jnp.asarray(null), tail=False)
    np.testing.assert_allclose(counted, [101 / 1001, 1 / 1001], rtol=0.02)
    tailed = permutation_share(jnp.asarray(observed), jnp.asarray(null), tail=True)
    np.testing.assert_allclose(tailed[0], counted[0], rtol=1e-6)
    assert abs(np.log10(tailed[1] / stats.chi2.sf(40.0, 2))) < 3  # 25 null values stand for 5 decades
    p = RNG.random(20)
    np.testing.assert_allclose(benjamini_hochberg(jnp.asarray(p)), stats.false_discovery_control(p), rtol=1e-5)


def test_weights_balance_library_sizes_and_the_test_of_zeros_is_a_logistic_regression():
    labels = np.repeat([0.0, 1.0], 150)
    depth = RNG.normal(size=300) + 0.8 * labels
    a, b = overlap_weights(*map(jnp.asarray, (1 - labels, labels, depth)))
    for power in (1, 2):
        means = [(w * depth**power).sum() / w.sum() for w in (a, b)]
        np.testing.assert_allclose(*means, atol=5e-3)  # a ridge of 1e-3 keeps them apart a little
    seen = (RNG.random((300, 2)) < 0.5 + 0.3 * labels[:, None] * [0, 1]).astype(float)
    flat = jnp.zeros(300)
    found = zeros_ratio(jnp.asarray(seen), jnp.asarray(labels), flat)
    table = [[seen[labels == c, 1].sum(), (1 - seen[labels == c, 1]).sum()] for c in (0, 1)]
    np.testing.assert_allclose(
        found[1], stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")[0], rtol=1e-2
    )
    assert found[0] < 7


def test_few_cells_with_a_gene_set_a_floor_to_its_p_values():
    """Eight of 300 cells have the gene: whatever falls on one side by chance does so in 1 of 128 draws."""
    rng = np.random.default_rng(0)
    values = np.zeros((300, 40), np.float32)
    for gene in range(40):
        values[rng.choice(300, 8, replace=False), gene] = rng.uniform(1, 2, 8)
    np.testing.assert_allclose(least_share(jnp.asarray(values)), 2.0**-7)
    null = rng.exponential(size=(1000, 40)).astype(np.float32)
    observed = jnp.full(40, 30.0)
    floored = permutation_share(observed, jnp.asarray(null), tail=True, least=jnp.full(40, 1e-4))
    np.testing.assert_allclose(floored, 1e-4)
    free = permutation_share(observed, jnp.asarray(null), tail=True)
    assert (np.asarray(free) < 1e-8).all()
