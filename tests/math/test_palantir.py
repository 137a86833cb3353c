import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import dijkstra
from scipy.spatial.distance import cdist

from diffbio.math.palantir import Waypoints, multiscale_space, path_lengths, refined_pseudotime, waypoints


def points(n=25, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 2))


def test_path_lengths_are_those_of_dijkstra_on_the_neighbour_graph():
    x = points()
    apart = cdist(x, x)
    near = np.argsort(apart, axis=1)[:, 1:4]
    graph = np.zeros_like(apart)
    np.put_along_axis(graph, near, np.take_along_axis(apart, near, axis=1), axis=1)
    wanted = dijkstra(graph, directed=False, indices=[3, 0])
    assert np.isfinite(wanted).all()
    found = path_lengths(jnp.asarray(x, jnp.float32), jnp.array([3, 0]), 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_what_is_not_reached_is_joined_by_its_nearest_cell():
    x = jnp.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    found = path_lengths(x, jnp.array([0]), 3)
    np.testing.assert_allclose(found[0], [0, 1, 2, 10, 11, 12], rtol=1e-6)


def test_gradient_of_path_lengths_is_that_of_the_edges_they_go_along():
    with jax.enable_x64(True):
        x, sources = jnp.asarray(points()), jnp.array([3, 0, 7])
        rng = np.random.default_rng(1)
        factor, way = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 25), x.shape))

        def value(x):
            return (path_lengths(x, sources, 5) * factor).sum()

        slope = float((jax.jit(jax.grad(value))(x) * way).sum())
        change = float(value(x + 1e-6 * way) - value(x - 1e-6 * way)) / 2e-6
        assert slope == pytest.approx(change, rel=1e-6)


def test_waypoints_start_at_the_extreme_cell_nearest_the_root():
    x = jnp.linspace(0, 1, 21)[:, None] * jnp.array([1.0, 0.0])
    found = waypoints(x, jnp.array(2), 5)
    cells = np.asarray(found.cells)[np.asarray(found.real)]
    assert cells[0] == 0
    assert set(cells.tolist()) == {0, 20, 10, 5, 15}  # each farthest from those before
    assert (np.asarray(found.cells)[~np.asarray(found.real)] == 0).all()


def test_the_components_before_the_largest_gap_count():
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(10, 6)))
    space = np.asarray(multiscale_space(jnp.array([0.0, 0.1, 0.15, 0.2, 0.6, 0.65]), vectors))
    used = np.ptp(space, axis=0) > 0
    np.testing.assert_array_equal(used, [False, True, True, True, False, False])
    np.testing.assert_allclose(space[:, used].min(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(space[:, used].max(axis=0), 1, atol=1e-6)
    # the largest gap before the second: the next one counts
    space = np.asarray(multiscale_space(jnp.array([0.0, 0.5, 0.6, 0.61, 0.9, 0.91]), vectors))
    np.testing.assert_array_equal(np.ptp(space, axis=0) > 0, [False, True, True, True, False, False])


def test_on_a_line_time_is_the_place():
    place = jnp.linspace(0.0, 3.0, 13)
    chosen = Waypoints(jnp.array([0, 6, 12, 0]), jnp.array([True, True, True, False]))
    lengths = jnp.abs(place[None, :] - place[chosen.cells][:, None])
    time, weights = refined_pseudotime(lengths, chosen)
    np.testing.assert_allclose(time, place / 3, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[3], 0)
