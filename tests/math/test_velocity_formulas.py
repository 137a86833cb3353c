"""Velocity's formulas against numpy: steady states, kinetics, cosines, arrows on a map."""

import jax.numpy as jnp
import numpy as np

from diffbio.math.splicing_kinetics import step_response
from diffbio.math.steady_state import steady_state
from diffbio.math.velocity_graph import candidates, cosine_lists, projected, transition_edges
from diffbio.math.velocity_moments import moments, neighborhood, size_normalized

RNG = np.random.default_rng(0)


def test_gamma_is_the_slope_through_the_upper_tail():
    s, u = RNG.gamma(2.0, 1.0, (200, 5)), RNG.gamma(1.0, 1.0, (200, 5))
    height = s / s.max(axis=0) + u / u.max(axis=0)
    tail = height >= np.percentile(height, 95, axis=0)
    wanted = (tail * u * s).sum(axis=0) / (tail * s**2).sum(axis=0)
    hard = steady_state(jnp.asarray(s, jnp.float32), jnp.asarray(u, jnp.float32)).gamma
    np.testing.assert_allclose(hard, wanted, rtol=1e-5)
    soft = steady_state(jnp.asarray(s, jnp.float32), jnp.asarray(u, jnp.float32), temperature=1e-5).gamma
    np.testing.assert_allclose(soft, wanted, rtol=1e-2)


def test_the_step_response_solves_the_kinetics():
    x, ratio, h = np.linspace(0.05, 6, 40), 0.7, 1e-3
    u, s = (np.asarray(v, float) for v in step_response(jnp.asarray(x), jnp.asarray(ratio)))
    _, later = (np.asarray(v, float) for v in step_response(jnp.asarray(x + h), jnp.asarray(ratio)))
    _, before = (np.asarray(v, float) for v in step_response(jnp.asarray(x - h), jnp.asarray(ratio)))
    np.testing.assert_allclose(u, 1 - np.exp(-x), atol=1e-6)
    np.testing.assert_allclose((later - before) / (2 * h), u - ratio * s, atol=1e-3)
    end = step_response(jnp.asarray(200.0), jnp.asarray(ratio))
    np.testing.assert_allclose([float(v) for v in end], [1.0, 1 / ratio], rtol=1e-5)


def test_moments_are_means_with_the_cell_itself():
    indices = jnp.asarray([[1, 2], [0, 2], [1, 0], [2, 1]])
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    found = np.asarray(moments(neighborhood(indices, jnp.dtype("float32")), jnp.asarray(x)))
    assert found.shape == x.shape
    assert (found <= x.max(axis=0) + 1e-6).all()
    constant = moments(neighborhood(indices, jnp.dtype("float32")), jnp.full((4, 3), 2.5))
    np.testing.assert_allclose(constant, 2.5, rtol=1e-6)


def test_sizes_become_the_median():
    counts = RNG.poisson(3.0, (6, 8)).astype(np.float32)
    found = np.asarray(size_normalized(jnp.asarray(counts)))
    np.testing.assert_allclose(found.sum(axis=1), np.median(counts.sum(axis=1)), rtol=1e-5)


def test_cosines_transitions_and_arrows():
    x, v = RNG.normal(size=(12, 5)), RNG.normal(size=(12, 5))
    near = np.argsort(((x[:, None] - x) ** 2).sum(-1), axis=1)[:, 1:4]
    columns = candidates(jnp.asarray(near), reach=1)
    found = cosine_lists(jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32), columns)
    for i in range(12):
        for j, cosine, listed in zip(columns[i], found.cosines[i], found.listed[i], strict=True):
            if int(j) == i:
                assert not listed
                continue
            np.testing.assert_allclose(cosine, np.corrcoef(x[int(j)] - x[i], v[i])[0, 1], atol=1e-5)
    edges = transition_edges(found, scale=10.0, self_transitions=False)
    chain = np.zeros((12, 12))
    np.add.at(chain, (np.asarray(edges.rows), np.asarray(edges.columns)), np.asarray(edges.weights))
    np.testing.assert_allclose(chain.sum(axis=1), 1.0, rtol=1e-5)
    cosine = np.array([[np.corrcoef(x[j] - x[0], v[0])[0, 1] for j in near[0]]])[0]
    np.testing.assert_allclose(chain[0, near[0]], np.exp(10 * cosine) / np.exp(10 * cosine).sum(), rtol=1e-3)


def test_arrows_on_a_line_point_along_it():
    along = np.arange(10.0)
    positions = np.stack([along, 2 * along, -along], axis=1)
    near = np.stack([np.clip(along + d, 0, 9) for d in (-1, 1)], axis=1).astype(int)
    lists = cosine_lists(
        jnp.asarray(positions, jnp.float32), jnp.ones((10, 3)) * jnp.asarray([1.0, 2.0, -1.0]),
        candidates(jnp.asarray(near), reach=1),
    )  # fmt: skip
    arrows = np.asarray(projected(lists, jnp.asarray(np.stack([along, 0 * along], axis=1), jnp.float32)))
    assert (arrows[1:-1, 0] > 0).all()
    np.testing.assert_allclose(arrows[:, 1], 0, atol=1e-6)
