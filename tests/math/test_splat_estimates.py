"""Estimates from counts of known parameters."""

import numpy as np
import pytest
from scipy import sparse

from diffbio.math.count_statistics import STATISTICS, count_statistics, statistics_ks
from diffbio.math.splat_estimates import estimate_kept, estimate_splat


def splat_counts(seed=0, n=300, g=800, bcv=0.2):
    rng = np.random.default_rng(seed)
    means = rng.gamma(0.8, 1 / 0.3, g)
    library = rng.lognormal(9.0, 0.3, n)
    mu = means / means.sum() * library[:, None]
    return rng.poisson(rng.gamma(1 / bcv**2, mu * bcv**2)).astype(np.float32)


def test_splatters_estimates():
    found = estimate_splat(splat_counts(), lib_norm=False)
    assert found["lib_loc"] == pytest.approx(9.0, abs=0.06)
    assert found["lib_scale"] == pytest.approx(0.3, abs=0.05)
    # 10 % of genes at either end are winsorised, which Splatter accepts
    assert found["mean_shape"] == pytest.approx(0.8, rel=0.25)
    assert found["bcv_common"] == pytest.approx(0.1 + 0.25 * 0.2**2, abs=0.005)
    assert found["dropout_shape"] < 0


def test_each_gene_and_group_is_found():
    """Two kinds of cells that differ in 20 genes: shares, factors and dispersions of the genes come back."""
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.ones(100) * 5)
    factor = np.r_[np.full(20, 4.0), np.ones(80)]
    kinds = np.stack([share, share * factor / (share * factor).sum()])
    labels = np.arange(600) % 2
    library = rng.lognormal(8.5, 0.2, 600)
    counts = rng.poisson(rng.gamma(4.0, kinds[labels] * library[:, None] / 4.0)).astype(np.float32)
    found = estimate_kept(counts, 2, 0)
    shares = np.exp(found["log_gene_means"] + found["log_group_factors"])
    shares /= shares.sum(axis=1, keepdims=True)
    order = np.argsort(shares[:, :20].sum(axis=1))
    np.testing.assert_allclose(shares[order], kinds, rtol=0.2)
    assert np.exp(np.median(found["log_dispersions"])) == pytest.approx(0.25, rel=0.1)


def test_statistics_tell_laws_apart():
    a, b, c = splat_counts(0), splat_counts(1), splat_counts(2, bcv=1.0)
    same, other = statistics_ks(a, b), statistics_ks(a, c)
    assert set(same) == set(STATISTICS)
    assert same["mean-variance"] < 0.2 < other["mean-variance"]
    found = count_statistics(a)
    np.testing.assert_allclose(10 ** found["library"], a.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["gene zeros"], (a == 0).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found["cell zeros"], (a == 0).mean(axis=1), atol=1e-12)
    assert statistics_ks(found, count_statistics(c, trend=found["trend"])) == other


def test_zeros_that_are_stored_are_zeros():
    counts = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 4.0], [1.0, 1.0, 1.0]])
    full = np.nonzero(np.ones_like(counts))
    stored = sparse.csr_matrix((counts.ravel(), full), shape=counts.shape)
    found = count_statistics(stored)
    np.testing.assert_allclose(found["gene zeros"], [1 / 3, 1 / 3, 0.0])
    np.testing.assert_allclose(found["cell zeros"], [1 / 3, 1 / 3, 0.0])
    assert stored.nnz == 9  # the caller's matrix stays as it was


def test_groups_without_cells_are_not_drawn():
    counts = np.repeat(np.random.default_rng(0).poisson(10.0, (3, 12)), 2, axis=0).astype(np.float32)
    found = estimate_kept(counts, 8, 1)
    weight = np.exp(found["group_logits"])
    assert (weight > 0.1).sum() == 3
    assert np.sort(weight)[:5].max() < 1e-9
    assert np.exp(found["log_libraries"]).min() >= counts.sum(axis=1).min() * 0.99
