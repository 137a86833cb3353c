"""Projections onto the simplex and onto hulls, beside general solvers."""

import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from diffbio.math.simplex import furthest_sum, nearest_in_hull, project_simplex


def test_nearest_point_of_the_simplex():
    v = np.random.default_rng(0).normal(size=(50, 7)) * 2
    found = np.asarray(project_simplex(jnp.asarray(v)))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    ordered = np.sort(v, axis=1)[:, ::-1]
    level = (np.cumsum(ordered, axis=1) - 1) / np.arange(1, 8)
    last = (ordered > level).sum(axis=1) - 1  # the rule by sorting (Held, Wolfe & Crowder 1974)
    np.testing.assert_allclose(found, np.maximum(v - level[np.arange(50), last][:, None], 0), atol=1e-5)
    np.testing.assert_allclose(project_simplex(jnp.asarray(found)), found, atol=1e-6)


def test_nearest_point_of_a_hull():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 4))
    for target in (*(3 * rng.normal(size=(8, 4))), points.mean(axis=0), points[3]):
        start = np.zeros(60)
        start[rng.choice(60, 3, replace=False)] = 1 / 3
        weights = nearest_in_hull(target, points, start)
        assert weights.min() >= 0
        assert abs(weights.sum() - 1) < 1e-9
        # the sum as one more equation, of large weight
        solved = nnls(np.vstack([points.T, np.full(60, 1e4)]), np.append(target, 1e4))[0]
        wanted = np.linalg.norm(solved / solved.sum() @ points - target)
        assert np.linalg.norm(weights @ points - target) <= wanted + 1e-5


def test_repeated_points_do_no_harm():
    points = np.repeat(np.random.default_rng(0).normal(size=(5, 3)), 6, axis=0)
    start = np.zeros(30)
    start[:3] = 1 / 3
    weights = nearest_in_hull(np.array([5.0, 5.0, 5.0]), points, start)
    gaps = np.linalg.norm(points - 5.0, axis=1)
    assert np.linalg.norm(weights @ points - 5.0) <= gaps.min() + 1e-9


def test_cells_far_from_each_other_are_corners():
    corners = np.array([[0, 0], [10, 0], [0, 10.0]])
    points = np.vstack([np.random.default_rng(0).dirichlet(np.ones(3), 50) @ corners, corners])
    assert set(furthest_sum(points, 3, first=0)) == {50, 51, 52}
    assert len(set(furthest_sum(points, 1, first=4))) == 1
