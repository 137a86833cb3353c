"""Kernels beside CellRank's stored chains and loops over cells."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import sparse

from diffbio.errors import ConfigError, DataError
from diffbio.math.graph import Edges
from diffbio.math.kernels import (
    combined_kernel,
    connectivity_kernel,
    cosine_lists_of,
    pseudotime_kernel,
    velocity_kernel,
)
from diffbio.math.transitions import connectivities, from_scipy, to_scipy

ORACLE = Path(__file__).parents[1] / "oracles" / "cellrank.npz"


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(ORACLE))


@pytest.fixture(scope="module")
def graph(stored):
    return connectivities(jnp.asarray(stored["points"]), 15)


@pytest.mark.parametrize("kernel", ["connectivity", "hard", "soft"])
def test_cellranks_chain_from_points(stored, graph, kernel):
    when = jnp.asarray(stored["pseudotime"], jnp.float32)
    chain = (
        connectivity_kernel(graph, 120) if kernel == "connectivity" else pseudotime_kernel(graph, when, scheme=kernel)
    )
    parts = stored[f"{kernel}_rows"].astype(int), stored[f"{kernel}_columns"].astype(int)
    theirs = sparse.csr_array((stored[f"{kernel}_weights"], parts), shape=(120, 120))
    np.testing.assert_allclose(to_scipy(chain, 120).toarray(), theirs.toarray(), atol=1e-5)


def small(seed=0):
    """A symmetric graph of 12 cells, every pair listed twice with half its weight."""
    rng = np.random.default_rng(seed)
    dense = np.triu(rng.uniform(0.1, 1.0, (12, 12)) * (rng.random((12, 12)) < 0.6), 1)
    dense = dense + dense.T
    once = from_scipy(dense / 2)
    return Edges(*(jnp.concatenate([part, part]) for part in once)), dense, rng.uniform(0, 1, 12)


def test_hard_scheme_by_a_loop():
    edges, dense, when = small()
    found = to_scipy(pseudotime_kernel(edges, jnp.asarray(when), frac_to_keep=0.4), 12).toarray()
    for i in range(12):
        near = np.flatnonzero(dense[i])
        closest = near[np.argsort(-dense[i, near])][: int(np.floor(0.4 * len(near)))]
        kept = np.array([dense[i, j] if j in closest or when[j] >= when[i] else 0.0 for j in range(12)])
        np.testing.assert_allclose(found[i], kept / kept.sum() if kept.sum() else kept, atol=1e-6)
    jitted = jax.jit(lambda t: pseudotime_kernel(edges, t, frac_to_keep=0.4).weights)(jnp.asarray(when))
    np.testing.assert_allclose(to_scipy(edges._replace(weights=jitted), 12).toarray(), found, atol=1e-6)


def test_soft_scheme_its_limit_and_gradient():
    edges, dense, when = small()
    back = when[:, None] - when
    factor = np.where(back > 0, 2 / (1 + np.exp(10 * back)) ** 2, 1.0)
    wanted = dense * factor / (dense * factor).sum(axis=1, keepdims=True)
    found = to_scipy(pseudotime_kernel(edges, jnp.asarray(when), scheme="soft"), 12).toarray()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    kept = dense * (back <= 0)
    cold = to_scipy(pseudotime_kernel(edges, jnp.asarray(when), scheme="soft", b=1e4), 12).toarray()
    ahead = kept.sum(axis=1) > 0  # the last cell has only a past, all of it equally far gone
    np.testing.assert_allclose(
        cold[ahead], (kept / np.maximum(kept.sum(axis=1, keepdims=True), 1e-9))[ahead], atol=1e-6
    )
    with jax.enable_x64(True):
        exact = edges._replace(weights=edges.weights.astype(jnp.float64))
        goal = np.random.default_rng(1).normal(size=len(edges.weights))
        check_grads(
            jax.jit(lambda t: (pseudotime_kernel(exact, t, scheme="soft").weights * goal).sum()),
            (jnp.asarray(when),),
            order=1,
            modes=["rev"],
            rtol=1e-5,
        )
    late = jnp.asarray(when).at[3].set(jnp.inf).at[4].set(jnp.inf)
    for scheme in ("hard", "soft"):
        assert jnp.isfinite(pseudotime_kernel(edges, late, scheme=scheme).weights).all()


def test_density_normalisation_and_cells_without_edges():
    edges, dense, _ = small()
    degree = dense.sum(axis=1)
    wanted = dense / np.outer(degree, degree)
    found = to_scipy(connectivity_kernel(edges, 13), 13).toarray()
    np.testing.assert_allclose(found[:12, :12], wanted / wanted.sum(axis=1, keepdims=True), atol=1e-6)
    assert not found[12].any()
    plain = to_scipy(connectivity_kernel(edges, 12, density_normalize=False), 12).toarray()
    np.testing.assert_allclose(plain, dense / degree[:, None], atol=1e-6)


def test_velocity_kernel():
    rng = np.random.default_rng(0)
    cosines = sparse.random_array((12, 12), density=0.4, rng=rng, data_sampler=lambda size: rng.uniform(-1, 1, size))
    cosines = sparse.csr_array(cosines)
    cosines.setdiag(0)
    cosines.eliminate_zeros()
    for scale in (None, 4.0):
        steep = 1 / np.median(np.abs(cosines.data)) if scale is None else scale
        dense = np.where(cosines.toarray() != 0, np.exp(steep * cosines.toarray()), 0.0)
        found = to_scipy(velocity_kernel(cosine_lists_of(cosines), scale=scale), 12).toarray()
        np.testing.assert_allclose(found, dense / dense.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match="no entries"):
        cosine_lists_of(sparse.csr_array((4, 4)))


def test_sums_of_kernels():
    edges, _, when = small()
    walk, ahead = connectivity_kernel(edges, 12), pseudotime_kernel(edges, jnp.asarray(when))
    mixed = to_scipy(combined_kernel([(4.0, walk), (1.0, ahead)], 12), 12).toarray()
    np.testing.assert_allclose(
        mixed, 0.8 * to_scipy(walk, 12).toarray() + 0.2 * to_scipy(ahead, 12).toarray(), atol=1e-6
    )
    for parts in ([], [(0.0, walk)]):
        with pytest.raises(ConfigError, match="above 0"):
            combined_kernel(parts, 12)
    with pytest.raises(ConfigError, match="scheme"):
        pseudotime_kernel(edges, jnp.asarray(when), scheme="none")
