"""Ratios of unspliced to spliced RNA against numpy, in scVelo's words, and in the limit of a sharp tail."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.math.steady_state import steady_state, stochastic, upper_tail
from diffbio.math.velocity_moments import moments, neighborhood, size_normalized

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def cells():
    """Moments of 60 cells and 5 genes around lines through the origin; the last gene has no counts."""
    s = RNG.gamma(2.0, 3.0, (60, 6)).astype(np.float32)
    u = (s * np.array([0.2, 0.5, 1.0, 2.0, 0.1, 0.0]) * RNG.uniform(0.6, 1.4, s.shape)).astype(np.float32)
    s[:, 5] = 0
    return s, u


def weights_of(s, u):
    score = s / np.clip(s.max(axis=0), 1e-3, None)
    score = score if u is None else score + u / np.clip(u.max(axis=0), 1e-3, None)
    return score >= np.percentile(score, 95, axis=0)


def test_gamma_is_scvelos_line_through_the_upper_tail(cells):
    s, u = cells
    w = weights_of(s, u)
    with np.errstate(invalid="ignore"):
        gamma = np.nan_to_num((w * u * s).sum(axis=0) / (w * s**2).sum(axis=0))
        r2 = 1 - ((u - gamma * s) ** 2).sum(axis=0) / ((u - u.mean(axis=0)) ** 2).sum(axis=0)
    found = steady_state(jnp.asarray(s), jnp.asarray(u))
    np.testing.assert_allclose(found.gamma, gamma, rtol=1e-5)
    np.testing.assert_allclose(found.r2[:5], r2[:5], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.velocity_genes, np.nan_to_num(r2) > 0.01)


def test_stochastic_gamma_is_generalised_least_squares(cells):
    s, u = cells
    s, u = s[:, :5], u[:, :5]
    ss, us = s**2 * 1.3 + 0.1, s * u * 1.1
    w = weights_of(s, u) | weights_of(s, None)
    first = steady_state(jnp.asarray(s), jnp.asarray(u))
    variance, covariance = 2 * ss - s, 2 * us + u
    line = (variance * covariance).sum(axis=0) / (variance**2).sum(axis=0)
    one, two = (u - np.asarray(first.gamma) * s).std(axis=0), (covariance - line * variance).std(axis=0)
    read = np.flatnonzero(first.velocity_genes)
    x = np.vstack([w * s / one, variance / two])[:, read]
    y = np.vstack([w * u / one, covariance / two])[:, read]
    wanted = np.asarray(first.gamma).copy()
    wanted[read] = (x * y).sum(axis=0) / (x**2).sum(axis=0)
    found = stochastic(*(jnp.asarray(a) for a in (s, u, ss, us)))
    np.testing.assert_allclose(found.gamma, wanted, rtol=1e-4)


def test_a_warm_tail_becomes_the_sharp_one(cells):
    s, u = (jnp.asarray(a) for a in cells)
    hard = upper_tail(s, u)
    errors = [float(jnp.abs(upper_tail(s, u, temperature=t) - hard).mean()) for t in (1e-1, 1e-2, 1e-3)]
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_allclose(steady_state(s, u, temperature=1e-5).gamma, steady_state(s, u).gamma, rtol=2e-2)


def test_moments_are_means_over_the_union_of_neighbours():
    indices = np.array([[1, 2], [0, 2], [3, 1], [0, 2], [3, 0]])
    linked = np.eye(5, dtype=bool)
    for i, row in enumerate(indices):
        linked[i, row] = linked[row, i] = True
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    around = neighborhood(jnp.asarray(indices), jnp.float32)
    wanted = linked @ x / linked.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(moments(around, jnp.asarray(x)), wanted, rtol=1e-5)


def test_counts_are_scaled_to_the_median_total():
    counts = jnp.asarray([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0], [10.0, 30.0]])
    totals = np.asarray(size_normalized(counts).sum(axis=1))
    np.testing.assert_allclose(totals, [6.0, 6.0, 0.0, 6.0], rtol=1e-6)


def test_tied_largest_values_keep_their_derivative():
    """A cell and its double have the largest value; compiled or not, the gradient is that of finite differences."""
    s, u = (RNG.uniform(1, 2, (12, 2)) for _ in range(2))
    s[1] = s[0] = 3.0

    def first_gamma(x):
        moved = jnp.asarray(s).at[:2].add(x)
        return steady_state(moved * 1.1, jnp.asarray(u), temperature=0.1, share=0.3).gamma.sum()

    with jax.enable_x64(True):
        step = 1e-5
        numeric = (first_gamma(jnp.float64(step)) - first_gamma(jnp.float64(-step))) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(first_gamma))(jnp.float64(0)), numeric, rtol=1e-5)


def test_pancreas_gamma_equals_scvelos():
    data = Path(os.environ.get("DIFFBIO_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path, kept = data / "pancreas_velocity.h5ad", data.parent / "peers" / "ref" / "velocity_pancreas.npz"
    if not path.exists() or not kept.exists():
        pytest.skip("needs pancreas_velocity.h5ad and the stored reference")
    import anndata

    from diffbio.math.linalg import pca
    from diffbio.math.neighbors import knn

    stored, adata = np.load(kept), anndata.read_h5ad(path)
    layers = {name: np.asarray(adata.layers[name].todense(), np.float32) for name in ("spliced", "unspliced")}
    both = (layers["spliced"] > 0) & (layers["unspliced"] > 0)
    shared = ((layers["spliced"] + layers["unspliced"]) * both).sum(axis=0)
    genes = shared >= 20
    assert list(adata.var_names[genes]) == list(stored["genes"])
    s, u = (np.asarray(size_normalized(jnp.asarray(x)))[:, genes] for x in layers.values())
    near = knn(pca(np.log1p(s), 30).scores, 29).indices
    around = neighborhood(jnp.asarray(near), jnp.float32)
    found = steady_state(moments(around, jnp.asarray(s)), moments(around, jnp.asarray(u)))
    known = stored["gamma"] > 0
    off = np.abs(np.asarray(found.gamma)[known] / stored["gamma"][known] - 1)
    assert np.median(off) < 1e-5  # a few cells' neighbours tie within rounding of the components
    assert np.mean(off < 1e-4) > 0.99
    assert np.mean(np.asarray(found.velocity_genes) == stored["vg"]) > 0.999
