import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.errors import ConfigError
from diffbio.math import spectrum as module
from diffbio.math.graph import Edges
from diffbio.math.spectrum import spectrum

N, K = 15, 5


def cloud():
    """A symmetric transition matrix with simple eigenvalues."""
    x = np.random.default_rng(0).normal(size=(N, 2))
    kernel = np.exp(-((x[:, None] - x) ** 2).sum(-1))
    return normalized(kernel)


def ring():
    """One whose eigenvalues but for the first come in exact pairs; five do not cut a pair."""
    kernel, cells = np.zeros((N, N)), np.arange(N)
    for step, weight in enumerate((1.0, 0.5, 0.3, 0.2)):
        kernel[cells, (cells + step) % N] = kernel[(cells + step) % N, cells] = weight
    return normalized(kernel)


def normalized(kernel):
    total = kernel.sum(axis=1)
    return kernel / np.sqrt(np.outer(total, total))


def edges(matrix):
    rows, columns = np.nonzero(matrix)
    return Edges(jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32), jnp.asarray(matrix[rows, columns]))


@pytest.fixture(params=[module.DENSE_UP_TO, 2], ids=["dense", "arpack"])
def solver(request, monkeypatch):
    monkeypatch.setattr(module, "DENSE_UP_TO", request.param)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def slope_and_change(value, graph, step=1e-6):
    """The directional derivative along a random symmetric change of the matrix, and its central difference."""
    way = np.random.default_rng(1).normal(size=(N, N))
    way = jnp.asarray((way + way.T)[graph.rows, graph.columns])
    slope = float((jax.jit(jax.grad(value))(graph.weights) * way).sum())
    change = float(value(graph.weights + step * way) - value(graph.weights - step * way)) / (2 * step)
    return slope, change


@pytest.mark.usefixtures("double", "solver")
def test_eigenpairs_are_those_of_the_dense_matrix():
    matrix = cloud()
    found = spectrum(edges(matrix), N, K)
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(1 - found.gaps, values[::-1][:K], atol=1e-12)
    np.testing.assert_allclose(np.abs(found.vectors), np.abs(vectors[:, ::-1][:, :K]), atol=1e-9)
    assert (np.asarray(found.vectors).max(axis=0) == np.abs(found.vectors).max(axis=0)).all(), "signs"
    g = np.where(values < module.STATIONARY, values / (1 - np.minimum(values, 0.9999)), 1.0)[::-1][:K]
    np.testing.assert_allclose(found.scaled, found.vectors * g, rtol=1e-9)


@pytest.mark.usefixtures("double", "solver")
@pytest.mark.parametrize("matrix", [cloud, ring])
def test_gradient_of_what_rotations_leave_is_exact_also_at_equal_eigenvalues(matrix):
    factor = jnp.asarray(np.random.default_rng(2).normal(size=(N, N)))
    graph = edges(matrix())

    def value(weights):
        found = spectrum(graph._replace(weights=weights), N, K)
        return (found.scaled @ found.scaled.T * factor).sum() + (found.gaps**2).sum()

    slope, change = slope_and_change(value, graph)
    assert slope == pytest.approx(change, rel=1e-6)


@pytest.mark.usefixtures("double", "solver")
def test_gradient_of_single_vectors_is_exact_where_eigenvalues_differ():
    factor = jnp.asarray(np.random.default_rng(2).normal(size=(N, K)))
    graph = edges(cloud())
    slope, change = slope_and_change(
        lambda weights: (spectrum(graph._replace(weights=weights), N, K).vectors * factor).sum(), graph
    )
    assert slope == pytest.approx(change, rel=1e-6)


@pytest.mark.usefixtures("double")
def test_gradient_of_single_vectors_is_bounded_where_they_are_arbitrary():
    factor = jnp.asarray(np.random.default_rng(2).normal(size=(N, K)))
    graph = edges(ring())
    grad = jax.grad(lambda weights: (spectrum(graph._replace(weights=weights), N, K).vectors * factor).sum())
    assert np.abs(grad(graph.weights)).max() < 1 / module.LEAST_GAP


def test_single_precision_keeps_small_gaps():
    graph = edges(cloud())
    found = spectrum(graph._replace(weights=graph.weights.astype(jnp.float32)), N, K)
    assert found.gaps.dtype == jnp.float32
    values = np.linalg.eigvalsh(cloud())[::-1][:K]
    np.testing.assert_allclose(found.gaps, 1 - values, rtol=1e-6, atol=1e-6)


def test_parts_of_the_graph_are_numbered():
    matrix = np.kron(np.eye(2), np.full((3, 3), 1 / 3))
    found = spectrum(edges(matrix), 6, 3)
    assert len(set(np.asarray(found.parts[:3]).tolist())) == 1
    assert len(set(np.asarray(found.parts).tolist())) == 2
    np.testing.assert_allclose(found.gaps[:2], 0, atol=1e-6)


def test_more_components_than_cells_are_refused():
    with pytest.raises(ConfigError, match="n_components must be from 1 to 6"):
        spectrum(edges(np.eye(6)), 6, 7)
