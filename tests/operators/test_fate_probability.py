"""Fate probabilities beside CellRank's stored ones, found ends of branches, training, and chains that are refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffbio.errors import ConfigError, DataError
from diffbio.math.graph import Edges
from diffbio.math.kernels import connectivity_kernel, pseudotime_kernel
from diffbio.math.transitions import connectivities
from diffbio.operators.singlecell import DifferentiableFateProbability, FateProbabilityConfig

ORACLE = Path(__file__).parents[1] / "oracles" / "cellrank.npz"  # written by benchmarks.quality.fate --oracle


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(ORACLE))


def operator(**settings):
    return DifferentiableFateProbability(FateProbabilityConfig(**settings), rngs=nnx.Rngs(0))


def as_data(edges, **more):
    rows, columns, weights = (jnp.asarray(part) for part in edges)
    return {"transition_rows": rows, "transition_columns": columns, "transition_weights": weights, **more}


def line(cells=6):
    """A walk that goes either way; the ends stay."""
    inner = np.arange(1, cells - 1)
    rows = np.concatenate([inner, inner, [0, cells - 1]])
    columns = np.concatenate([inner + 1, inner - 1, [0, cells - 1]])
    return as_data(Edges(rows, columns, np.append(np.full(2 * len(inner), 0.5), [1.0, 1.0]).astype(np.float32)))


@pytest.mark.parametrize("kernel", ["connectivity", "hard", "soft"])
def test_beside_cellrank(stored, kernel):
    """CellRank's own chain; the same from the points is in tests/math/test_kernels.py."""
    parts = (stored[f"{kernel}_{part}"] for part in ("rows", "columns", "weights"))
    rows, columns, weights = parts
    chain = as_data((rows.astype(np.int32), columns.astype(np.int32), weights))
    out = operator(n_macrostates=3).apply(chain | {"terminal_states": jnp.asarray(stored["terminal"])})[0]
    np.testing.assert_allclose(out["fate_probabilities"], stored[f"{kernel}_fates"], atol=1e-5)
    np.testing.assert_array_equal(out["macrostates"], stored["terminal"])


def test_the_ends_of_branches_are_found(stored):
    graph = connectivities(jnp.asarray(stored["points"]), 15)
    chain = connectivity_kernel(graph, 120)
    op = operator(n_macrostates=4, n_terminal=3, n_terminal_cells=5)
    # which are terminal: the root is a tip of this undirected tree too, so the chain is directed by pseudotime
    ahead = pseudotime_kernel(graph, jnp.asarray(stored["pseudotime"], jnp.float32), scheme="soft")
    for edges in (chain, ahead):
        out = op.apply(as_data(edges, terminal_states=jnp.full(120, -1)))[0]
        np.testing.assert_allclose(out["fate_probabilities"].sum(axis=1), 1.0, atol=1e-6)
        assert (np.bincount(np.asarray(out["macrostates"]) + 1)[1:] == 5).all()
    fates, labels = np.asarray(out["fate_probabilities"]), np.asarray(out["macrostates"])
    terminal = np.flatnonzero(fates.any(axis=0))
    assert len(terminal) == 3
    assert stored["pseudotime"][np.isin(labels, terminal)].min() > 0.6
    given = stored["terminal"]
    toward = {b: fates[given == b].mean(axis=0).argmax() for b in range(3)}
    assert len(set(toward.values())) == 3, "each branch has an end of its own"
    for branch, column in toward.items():
        assert fates[given == branch, column].min() > 0.9


def test_how_many_cells_there_are():
    chain = line()
    op = operator(n_macrostates=2, n_terminal=2, n_terminal_cells=1)
    out = op.apply(chain)[0]
    np.testing.assert_allclose(
        out["fate_probabilities"][:, int(out["macrostates"][0])], 1 - np.arange(6) / 5, atol=1e-6
    )
    with pytest.raises(ConfigError, match=r"under jit .* config\.n_cells"):
        jax.jit(lambda data: op.apply(data)[0])(chain)
    sized = operator(n_macrostates=2, n_terminal=2, n_terminal_cells=1, n_cells=6)
    inside = jax.jit(lambda data: sized.apply(data)[0])(chain)
    np.testing.assert_allclose(inside["fate_probabilities"], out["fate_probabilities"], atol=1e-6)


def test_what_is_refused():
    chain, states = line(), jnp.array([0, -1, -1, -1, -1, 1])
    op = operator(n_macrostates=2)
    with pytest.raises(DataError, match=r"'terminal_states'\] holds 2, but numbers from -1 to 1"):
        op.apply(chain | {"terminal_states": states + 1})
    with pytest.raises(DataError, match=r"'transition_rows'\] holds 6"):
        op.apply(chain | {"terminal_states": states, "transition_rows": chain["transition_rows"] + 1})
    with pytest.raises(DataError, match=r"must sum to 1; 6 of 6 rows do not \(first: row 0, 0.5\)"):
        op.apply(chain | {"terminal_states": states, "transition_weights": chain["transition_weights"] / 2})
    with pytest.raises(DataError, match=r"transition_weights.*>= 0"):
        op.apply(chain | {"terminal_states": states, "transition_weights": -chain["transition_weights"]})
    with pytest.raises(DataError, match="from 1 of 6 cells no terminal cell"):
        op.apply(chain | {"terminal_states": states.at[5].set(-1)})
    with pytest.raises(jax.errors.JaxRuntimeError, match="from 1 of 6 cells no terminal cell"):
        jax.block_until_ready(
            jax.jit(lambda data: op.apply(data)[0])(chain | {"terminal_states": states.at[5].set(-1)})
        )
    with pytest.raises(ConfigError, match="n_terminal is 3, but there are 2"):
        operator(n_macrostates=2, n_terminal=3)


def test_a_fate_can_be_trained():
    """Steps of a walk learn to lead to the right, through the implicit solve."""
    chain, op = line(10), operator(n_macrostates=2)
    states = jnp.full(10, -1).at[0].set(0).at[9].set(1)

    def loss(pull):
        rows, columns = chain["transition_rows"], chain["transition_columns"]
        odds = jnp.where(columns > rows, jax.nn.sigmoid(pull[rows]), jax.nn.sigmoid(-pull[rows]))
        weights = jnp.where(columns == rows, 1.0, odds)
        out = op.apply(chain | {"terminal_states": states, "transition_weights": weights})[0]
        return -jnp.log(out["fate_probabilities"][1:9, 1]).mean()

    step = jax.jit(jax.value_and_grad(loss))
    pull = jnp.zeros(10)
    losses = []
    for _ in range(20):
        value, slope = step(pull)
        pull, losses = pull - 2 * slope, [*losses, float(value)]
    assert losses[-1] < 0.5 * losses[0]
    assert (pull[1:9] > 0).all()
