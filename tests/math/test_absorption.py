"""Absorption probabilities: chains whose answer is known, the proven error, the gradient, chains without an answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from diffbio.errors import DataError
from diffbio.math import absorption
from diffbio.math.absorption import absorbed, absorption_probabilities, reaching
from diffbio.math.graph import Edges


def ruin(cells, up):
    """A gambler's capital 0 ... cells - 1; both ends are terminal."""
    inner = np.arange(1, cells - 1)
    rows = np.concatenate([inner, inner, [0, cells - 1]])
    columns = np.concatenate([inner + 1, inner - 1, [0, cells - 1]])
    weights = np.concatenate([np.full(cells - 2, up), np.full(cells - 2, 1 - up), [1.0, 1.0]])
    return Edges(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(weights))


def ends(cells):
    states = np.full(cells, -1)
    states[[0, -1]] = [0, 1]
    return jnp.asarray(states)


def random_chain(cells=30, edges=240, seed=0):
    """With self-loops, pairs listed twice, and rows that sum to 1."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.arange(cells), rng.integers(0, cells, edges)])
    columns = np.concatenate([(np.arange(cells) + 1) % cells, rng.integers(0, cells, edges)])
    weights = rng.uniform(0.1, 1.0, len(rows))
    weights /= np.bincount(rows, weights)[rows]
    states = np.full(cells, -1)
    states[[3, 4, 17, 25]] = [0, 0, 2, 1]
    return Edges(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(weights)), jnp.asarray(states)


def by_inversion(edges, states, n_states):
    """The definition, dense; differentiable."""
    n = len(states)
    chain = jnp.zeros((n, n)).at[edges.rows, edges.columns].add(edges.weights)
    chain = chain / chain.sum(axis=1, keepdims=True)
    held = states >= 0
    right = jax.nn.one_hot(states, n_states)
    return jnp.linalg.solve(jnp.eye(n) - jnp.where(held[:, None], 0.0, chain), right)


@pytest.mark.parametrize("up", [0.5, 0.6])
def test_gamblers_ruin(up):
    with jax.enable_x64(True):
        found = absorption_probabilities(ruin(21, up), ends(21), 2, tolerance=1e-12)
        capital, odds = np.arange(21), (1 - up) / up
        wins = capital / 20 if up == 0.5 else (1 - odds**capital) / (1 - odds**20)
        np.testing.assert_allclose(found, np.column_stack([1 - wins, wins]), atol=1e-12)


def test_inversion_and_its_gradient():
    with jax.enable_x64(True):
        edges, states = random_chain()
        found = absorption_probabilities(edges, states, 4, tolerance=1e-12)
        np.testing.assert_allclose(found, by_inversion(edges, states, 4), atol=1e-12)
        np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-15)
        assert (found[:, 3] == 0).all(), "no cell holds the last state"
        assert (found[3] == jnp.array([1.0, 0, 0, 0])).all(), "terminal cells have their own state"
        goal = jnp.asarray(np.random.default_rng(1).normal(size=found.shape))

        def loss(weights, f):
            return (f(edges._replace(weights=weights), states, 4) * goal).sum()

        exact = jax.grad(lambda w: loss(w, by_inversion))(edges.weights)
        np.testing.assert_allclose(
            jax.grad(lambda w: loss(w, lambda *a: absorption_probabilities(*a, tolerance=1e-12)))(edges.weights),
            exact,
            atol=1e-10,
        )


def test_jit_and_vmap_are_the_same():
    edges, states = random_chain()
    weights = jnp.stack([edges.weights, edges.weights**2]).astype(jnp.float32)

    def f(w):
        return absorption_probabilities(edges._replace(weights=w), states, 3)

    np.testing.assert_allclose(jax.jit(jax.vmap(f))(weights), jnp.stack([f(w) for w in weights]), atol=1e-6)


def test_one_state_takes_all_and_all_terminal_is_one_hot():
    edges, _ = random_chain()
    one = jnp.full(30, -1).at[7].set(0)
    np.testing.assert_allclose(absorption_probabilities(edges, one, 1), 1.0, atol=1e-7)
    every = jnp.arange(30) % 3
    np.testing.assert_array_equal(absorption_probabilities(edges, every, 3), jax.nn.one_hot(every, 3))


def test_the_error_is_below_the_tolerance():
    """Two rooms with a narrow door: 1e5 jumps before a walk ends; a residual alone would promise too much."""
    rng = np.random.default_rng(0)
    rows, columns = np.repeat(np.arange(60), 8), np.concatenate([rng.choice(30, 8) + 30 * (i >= 30) for i in range(60)])
    rows, columns = np.append(rows, [5, 40, 29, 59]), np.append(columns, [40, 5, 0, 30])
    weights = np.append(np.ones(480), [1e-4, 1e-4, 1, 1])
    matrix = sparse.csr_array((weights, (rows, columns)), shape=(60, 60))
    matrix = sparse.csr_array(matrix + matrix.T + 100 * sparse.eye_array(60))  # and cells that would rather stay
    chain = sparse.csr_array(sparse.diags_array(1 / matrix.sum(axis=1)) @ matrix)
    states = np.full(60, -1)
    states[[10, 50]] = [0, 1]
    dense = chain.toarray()
    dense[states >= 0] = 0
    exact = np.linalg.solve(np.eye(60) - dense, np.eye(2)[states] * (states >= 0)[:, None])
    for tolerance in (1e-2, 1e-5, 1e-9):
        found, jumps = absorbed(chain, states, 2, tolerance=tolerance)
        assert np.abs(found - exact).max() <= tolerance
    assert jumps > 30


def test_chains_without_an_answer(monkeypatch):
    edges, states = random_chain()
    with pytest.raises(DataError, match="no terminal cell"):
        absorption_probabilities(edges, jnp.full(30, -1), 2)
    apart = Edges(
        *(
            jnp.concatenate(pair)
            for pair in zip(edges, (edges.rows + 30, edges.columns + 30, edges.weights), strict=True)
        )
    )
    both = jnp.concatenate([states, jnp.full(30, -1)])
    with pytest.raises(DataError, match=r"from 30 of 60 cells .* \(first: cell 30\)"):
        absorption_probabilities(apart, both, 3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="from 30 of 60 cells"):
        jax.block_until_ready(
            jax.jit(lambda w: absorption_probabilities(apart._replace(weights=w), both, 3))(apart.weights)
        )
    # two cells that hand a walk to and fro 1e15 times: beyond double precision
    rows, columns = np.array([0, 1, 0, 1, 2, 3]), np.array([1, 0, 2, 3, 2, 3])
    matrix = sparse.csr_array((np.array([1.0, 1.0, 1e-15, 2e-15, 1.0, 1.0]), (rows, columns)), shape=(4, 4))
    with pytest.raises(DataError, match="did not converge"):
        absorbed(matrix, np.array([-1, -1, 0, 1]), 2, tolerance=1e-8)


def test_a_direct_solve_stands_in_where_iterations_stall(monkeypatch):
    monkeypatch.setattr(absorption, "MOST_ITERATIONS", 2)
    edges, states = random_chain()
    with jax.enable_x64(True):
        found = absorption_probabilities(edges._replace(weights=edges.weights.astype(float)), states, 3)
        np.testing.assert_allclose(found, by_inversion(edges, states, 3), atol=1e-6)
    monkeypatch.setattr(absorption, "DIRECT_UP_TO", 2)
    with pytest.raises(DataError, match="after 2 iterations"):
        absorption_probabilities(edges, states, 3)


def test_edges_of_weight_zero_lead_nowhere():
    chain = sparse.csr_array(np.array([[0.5, 0.5, 0], [0, 1.0, 0], [0, 0, 1.0]]))
    chain.data[1] = 0.0
    np.testing.assert_array_equal(reaching(chain, np.array([1])), [False, True, False])
