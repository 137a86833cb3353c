"""Macrostates: blocks that are there are found, as crisp as pygpcca and crisper, and what cannot be is refused."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from diffbio.errors import ConfigError, DataError
from diffbio.math.macrostates import core_cells, eigengap, macrostates, spectrum, terminal_states
from diffbio.math.simplex_rotation import inner_simplex

ORACLE = Path(__file__).parents[1] / "oracles" / "cellrank.npz"  # written by benchmarks.quality.fate --oracle


def blocks(sizes=(30, 20, 10), leak=0.01, seed=0):
    """Dense blocks, joined by a little weight everywhere."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    weights = rng.uniform(0.5, 1.0, (len(group), len(group))) * np.where(group[:, None] == group, 1.0, leak)
    weights = weights + weights.T
    return sparse.csr_array(weights / weights.sum(axis=1, keepdims=True)), group


def test_blocks_are_found():
    chain, group = blocks()
    found = macrostates(chain, 3)
    assert (found.memberships.argmax(axis=1) == group).all(), "largest first"
    np.testing.assert_allclose(found.memberships.sum(axis=1), 1.0)
    assert found.memberships.min() >= 0
    assert found.crispness > 0.95
    np.testing.assert_allclose(found.coarse.sum(axis=1), 1.0, atol=1e-9)
    np.testing.assert_allclose(found.stationary @ found.coarse, found.stationary, atol=1e-9)
    assert (np.diff(found.stability) < 0).all(), "a small block is left sooner"
    # the cells in another order
    order = np.random.default_rng(1).permutation(60)
    again = macrostates(sparse.csr_array(chain[order][:, order]), 3)
    np.testing.assert_allclose(again.memberships, found.memberships[order], atol=1e-6)


def test_blocks_without_a_way_between_them():
    chain, group = blocks(leak=0.0)
    found = macrostates(chain, 3)
    np.testing.assert_allclose(found.memberships, np.eye(3)[group], atol=1e-9)
    assert found.crispness == pytest.approx(1.0)
    one = macrostates(chain, 1)
    np.testing.assert_array_equal(one.memberships, 1.0)


def test_arpack_finds_what_the_dense_solver_finds():
    chain, _ = blocks((250, 150, 50), leak=0.002)
    values = spectrum(chain, 3).values
    np.testing.assert_allclose(values.real, np.sort(np.linalg.eigvals(chain.toarray()).real)[::-1][:3], atol=1e-9)


@pytest.mark.parametrize("kernel", ["connectivity", "hard", "soft"])
def test_beside_cellrank(kernel):
    stored = np.load(ORACLE)
    shape = (len(stored["terminal"]),) * 2
    parts = stored[f"{kernel}_rows"].astype(int), stored[f"{kernel}_columns"].astype(int)
    chain = sparse.csr_array((stored[f"{kernel}_weights"].astype(float), parts), shape=shape)
    found = macrostates(sparse.csr_array(sparse.diags_array(1 / chain.sum(axis=1)) @ chain), 4)
    assert found.crispness >= stored[f"{kernel}_crispness"] - 1e-4
    if found.crispness <= stored[f"{kernel}_crispness"] + 1e-3:  # the same optimum, then: the same chain
        np.testing.assert_allclose(np.sort(found.stability), np.sort(np.diag(stored[f"{kernel}_coarse"])), atol=5e-3)


def test_a_conjugate_pair_is_not_parted():
    """A walk around three blocks: the second eigenvalue has a conjugate."""
    chain, group = blocks((10, 10, 10), leak=0.0)
    around = 0.95 * chain.toarray() + 0.05 * (group[:, None] == (group - 1) % 3) / 10
    with pytest.raises(ConfigError, match=r"conjugate pair.* 1 or 3 macrostates"):
        macrostates(sparse.csr_array(around), 2)
    assert macrostates(sparse.csr_array(around), 3).crispness > 0.9


def test_eigengap():
    assert eigengap(np.array([1.0, 0.99, 0.98, 0.7, 0.65])) == 3
    assert eigengap(np.array([1.0, 0.5 + 0.1j, 0.5 - 0.1j, 0.4])) == 1


def test_terminal_states_and_their_cells():
    found = macrostates(blocks()[0], 3)
    np.testing.assert_array_equal(terminal_states(found, n_terminal=2), [0, 1])
    threshold = float(found.stability[1])
    np.testing.assert_array_equal(terminal_states(found, stability_threshold=threshold), [0, 1])
    with pytest.raises(DataError, match=r"none is as stable as 0\.999"):
        terminal_states(found, stability_threshold=0.9999)
    with pytest.raises(ConfigError, match="there are 3 macrostates"):
        terminal_states(found, n_terminal=4)
    memberships = np.array([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.2, 0.3]])
    np.testing.assert_array_equal(core_cells(memberships, 2), [0, 0, 1, -1])
    with pytest.raises(DataError, match="macrostate 1 all belong rather to others"):
        core_cells(np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), 3)
    with pytest.raises(ConfigError, match="from 1 to the number of cells"):
        macrostates(blocks()[0], 61)


def test_inner_simplex_takes_the_corners():
    rng = np.random.default_rng(0)
    corners = np.array([[3.0, 0], [0, 3], [-2, -2]])
    points = np.vstack([rng.dirichlet(np.ones(3), 50) @ corners * 0.9, corners])
    assert set(inner_simplex(points)) == {50, 51, 52}
