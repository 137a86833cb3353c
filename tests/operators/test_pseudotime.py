from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import spearmanr

import diffbio
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError
from diffbio.math.diffusion_maps import diffusion_distances, symmetric_transitions
from diffbio.math.spectrum import spectrum
from diffbio.math.transitions import Edges, to_scipy
from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

ORACLE = Path(__file__).parents[1] / "oracles" / "pseudotime.npz"  # by benchmarks/peers/make_pseudotime_oracle.py


# one shape of cells and graph for all tests: programs are compiled once
CELLS, FEATURES = 120, 6
GRAPH = {"n_neighbors": 12, "n_diffusion_components": 8}


def make(**settings):
    return DifferentiablePseudotime(PseudotimeConfig(**settings), rngs=nnx.Rngs(0))


def applied(x, root, **settings):
    data = {"embeddings": jnp.asarray(x, jnp.float32), "root_cell_index": jnp.array(root)}
    return {key: np.asarray(value) for key, value in make(**GRAPH, **settings).apply(data)[0].items()}


@pytest.fixture(scope="module")
def tree():
    return dict(np.load(ORACLE))


def arc(n=CELLS):
    rng = np.random.default_rng(0)
    t = (np.arange(n) + rng.uniform(0, 0.8, n)) / n
    x = np.zeros((n, FEATURES))
    x[:, 0], x[:, 1] = np.cos(np.pi * t), np.sin(np.pi * t)
    return x + 0.02 * rng.normal(size=x.shape), t


def test_dpt_is_scanpys(tree):
    found = applied(tree["x"], int(tree["root"]))
    np.testing.assert_allclose(found["pseudotime"], tree["dpt"], atol=2e-5)
    np.testing.assert_allclose(found["eigenvalues"], tree["eigenvalues"], atol=1e-6)
    cosines = (found["diffusion_components"] * tree["diffmap"]).sum(axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)


def test_palantir_is_palantirs_where_all_cells_are_waypoints(tree):
    found = applied(tree["x"], int(tree["root"]), method="palantir", n_waypoints=3000)
    np.testing.assert_allclose(found["pseudotime"], tree["palantir"], atol=1e-4)  # its eigenvectors: tolerance 1e-4
    np.testing.assert_allclose(found["eigenvalues"], tree["palantir_eigenvalues"], atol=1e-5)


@pytest.mark.parametrize("method", ["dpt", "palantir"])
def test_time_is_found_on_an_arc_and_on_a_tree(method, tree):
    x, t = arc()
    found = applied(x, 0, method=method)["pseudotime"]
    assert spearmanr(found, t)[0] >= 0.95
    assert found[0] == pytest.approx(0, abs=1e-3)
    assert found.max() == pytest.approx(1)
    found = applied(tree["x"], int(tree["root"]), method=method)["pseudotime"]
    for branch in range(2):
        own = (tree["branch"] == branch) | (tree["t"] < 0.4)
        assert spearmanr(found[own], tree["t"][own])[0] >= 0.9


def test_transitions_are_a_chain_with_the_components_as_eigenvectors(tree):
    for method in ("dpt", "palantir"):
        found = applied(tree["x"], 0, method=method)
        n = len(tree["x"])
        edges = Edges(*(found[f"transition_{part}"] for part in ("rows", "columns", "weights")))
        chain = to_scipy(edges, n)
        np.testing.assert_allclose(chain.sum(axis=1), 1, atol=1e-5)
        assert (chain.data >= 0).all()
        if method == "palantir":  # of dpt the components are those of the symmetric matrix, as scanpy's
            psi = found["diffusion_components"]
            np.testing.assert_allclose(chain @ psi, psi * found["eigenvalues"], atol=1e-4)


def test_branches_of_a_tree(tree):
    found = applied(tree["x"], int(tree["root"]), n_branchings=1)["branches"]
    assert found[int(tree["root"])] == 0
    late = tree["t"] > 0.6
    ends = [np.bincount(found[late & (tree["branch"] == k)]).argmax() for k in range(2)]
    assert len({0, *ends}) == 3
    for k in range(2):
        assert (found[late & (tree["branch"] == k)] == ends[k]).mean() > 0.9


def test_parts_that_are_not_connected_are_infinite_and_said_so():
    x = arc()[0] + 50.0 * (np.arange(CELLS) >= 70)[:, None]
    with pytest.warns(DataWarning, match="2 parts of 70, 50 cells"):
        found = applied(x, 0, n_branchings=1)
    assert np.isfinite(found["pseudotime"][:70]).all()
    assert np.isinf(found["pseudotime"][70:]).all()
    assert found["pseudotime"][:70].max() == pytest.approx(1)
    assert (found["branches"][70:] == -1).all()
    op = make(**GRAPH, root_cell_index=0)

    def finite_sum(x):
        time = op.apply({"embeddings": x})[0]["pseudotime"]
        return jnp.where(jnp.isfinite(time), time, 0.0).sum()

    assert np.isfinite(jax.jit(jax.grad(finite_sum))(jnp.asarray(x, jnp.float32))).all()


@pytest.mark.parametrize("method", ["dpt", "palantir"])
def test_duplicates_have_finite_times_and_gradients(method):
    x = jnp.asarray(np.repeat(arc()[0][::2], 2, axis=0), jnp.float32)
    op = make(**GRAPH, method=method, root_cell_index=0)

    def total(x):
        time = op.apply({"embeddings": x})[0]["pseudotime"]
        return time.sum(), time

    (_, time), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    assert np.isfinite(time).all()
    assert np.isfinite(grad).all()
    assert np.abs(np.diff(time)[::2]).max() < 0.05, "duplicates are at one time, but for their shares of neighbours"


def test_gradient_of_distances_where_eigenvalues_are_equal():
    """A ring of equal weights has pairs of equal eigenvalues; there the DPT distance still has its derivative."""
    with jax.enable_x64(True):
        n, cells = 15, np.arange(15)
        start, end = (np.concatenate(p) for p in ((cells, (cells + 1) % n, cells), ((cells + 1) % n, cells, cells)))
        weight = jnp.asarray(np.random.default_rng(0).normal(size=n))

        def value(pairs):
            edges = Edges(jnp.asarray(start), jnp.asarray(end), jnp.concatenate([pairs, pairs, jnp.ones(n)]))
            found = spectrum(symmetric_transitions(edges, n)[0], n, 5)
            return (diffusion_distances(found.scaled, jnp.array(0)) * weight).sum(), found.gaps

        at, way = jnp.ones(n), jnp.asarray(np.random.default_rng(1).normal(size=n))
        (_, gaps), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(at)
        assert np.abs(np.diff(gaps)[1::2]).max() < 1e-12
        change = float(value(at + 1e-6 * way)[0] - value(at - 1e-6 * way)[0]) / 2e-6
        assert float((grad * way).sum()) == pytest.approx(change, rel=1e-6)


def test_a_learned_metric_finds_the_time_that_larger_features_hide():
    rng = np.random.default_rng(0)
    t = rng.uniform(size=CELLS)
    x = 0.1 * rng.normal(size=(CELLS, FEATURES))
    x[:, 0] += 3 * t
    x[:, 1:3] += 2 * rng.normal(size=(CELLS, 2))
    root, known = int(t.argmin()), np.arange(CELLS) % 2 == 0
    data = {"embeddings": x.astype(np.float32), "root_cell_index": np.array(root)}
    before = applied(x, root)["pseudotime"]
    op = make(**GRAPH, learn_metric="weights", n_features=FEATURES)
    assert not op.fitted
    time = np.where(known, t, np.nan).astype(np.float32)
    history = diffbio.fit(op, {**data, "time": time}, max_epochs=25, learning_rate=0.15, progress=False)
    assert op.fitted
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    found = np.asarray(op.apply(data)[0]["pseudotime"])
    assert spearmanr(found[~known], t[~known])[0] > max(0.85, spearmanr(before, t)[0] + 0.2)
    learned = np.asarray(op.learned[...])
    assert learned[0] > learned[1:3].max()


def test_a_linear_metric_may_lead_to_fewer_dimensions():
    op = make(learn_metric="linear", n_features=4, metric_rank=2, n_neighbors=4, n_diffusion_components=3)
    assert op.mapped(jnp.ones((6, 4))).shape == (6, 2)


def test_what_cannot_be_is_refused_by_name(tree):
    x = jnp.asarray(tree["x"])
    data = {"embeddings": x, "root_cell_index": jnp.array(0)}
    with pytest.raises(MissingKeyError, match="root_cell_index"):
        make().apply({"embeddings": x})
    with pytest.raises(DataError, match="has one too"):
        make(root_cell_index=3).apply(data)
    with pytest.raises(DataError, match=r"data\['root_cell_index'\] is 120, but row numbers of 120 cells are 0 to 119"):
        make().apply({**data, "root_cell_index": jnp.array(120)})
    with pytest.raises(DataError, match=r"config.root_cell_index is 200"):
        make(root_cell_index=200).apply({"embeddings": x})
    with pytest.raises(DataError, match=r"n_neighbors is 15.*only 1 cells"):
        make().apply({**data, "embeddings": x[:1]})
    with pytest.raises(DataError, match="n_diffusion_components is 10"):
        make(n_neighbors=5).apply({**data, "embeddings": x[:8]})
    with pytest.raises(DataError, match="alike"):
        make().apply({**data, "embeddings": jnp.ones((20, 3))})
    with pytest.raises(DataError, match="finite"):
        make().apply({**data, "embeddings": x.at[3, 1].set(jnp.nan)})
    with pytest.raises(ConfigError, match="n_waypoints does nothing for method 'dpt'"):
        PseudotimeConfig(n_waypoints=5)
    with pytest.raises(ConfigError, match="n_features must be given"):
        PseudotimeConfig(learn_metric="weights")
    with pytest.raises(ConfigError, match="metric_rank does nothing"):
        PseudotimeConfig(metric_rank=2)
    learning = make(learn_metric="weights", n_features=6)
    with pytest.raises(MissingKeyError, match="'time'"):
        learning.objective(data)
    with pytest.raises(DataError, match="two different known times"):
        learning.objective({**data, "time": jnp.full(120, -1.0)})
    with pytest.raises(DataError, match="two different known times"):  # infinite is not known
        learning.objective({**data, "time": jnp.full(120, jnp.inf).at[0].set(1.0)})
