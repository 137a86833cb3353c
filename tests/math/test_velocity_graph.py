"""Velocity graph: cosines, transitions, confidence and arrows against loops; times of a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.math.velocity_graph import (
    candidates,
    confidence,
    cosine_lists,
    distinct_candidates,
    potential,
    projected,
    transition_edges,
    unit_interval,
)

N, GENES, K = 25, 6, 4
RNG = np.random.default_rng(3)
X = RNG.normal(size=(N, GENES)).astype(np.float32)
V = RNG.normal(size=(N, GENES)).astype(np.float32)
NEAR = np.argsort(((X[:, None] - X) ** 2).sum(axis=2), axis=1)[:, 1 : K + 1].astype(np.int32)


def reachable(i):
    first = {i, *NEAR[i]}
    return sorted(first | {int(k) for j in first for k in NEAR[j]})


def matrix_of(*, rooted=False):
    """Cosines as scVelo computes them, cell by cell."""
    found = np.zeros((N, N))
    for i in range(N):
        v = np.sign(V[i]) * np.sqrt(np.abs(V[i])) if rooted else V[i]
        v = v - v.mean()
        for j in reachable(i):
            gap = X[j] - X[i]
            gap = np.sign(gap) * np.sqrt(np.abs(gap)) if rooted else gap
            gap = gap - gap.mean()
            if j != i:
                found[i, j] = gap @ v / (np.linalg.norm(gap) * np.linalg.norm(v))
    return found


def dense(rows, columns, values):
    found = np.zeros((N, N))
    np.add.at(found, (np.asarray(rows), np.asarray(columns)), np.asarray(values))
    return found


def lists_of(**settings):
    return cosine_lists(jnp.asarray(X), jnp.asarray(V), candidates(jnp.asarray(NEAR)), **settings)


@pytest.mark.parametrize("rooted", [False, True])
def test_cosines_of_neighbours_and_theirs(rooted):
    found = lists_of(variance_stabilized=rooted)
    rows = np.repeat(np.arange(N), found.columns.shape[1])
    np.testing.assert_allclose(
        dense(rows, found.columns.ravel(), found.cosines.ravel()), matrix_of(rooted=rooted), atol=1e-5
    )


def test_transitions_are_scvelos():
    cosines = matrix_of()
    best = np.maximum(cosines.max(axis=1), 0)
    doubt = np.clip(np.percentile(best, 98) - best, 0, 1)
    wanted = np.where(cosines != 0, np.exp(10 * cosines), 0)
    wanted[np.arange(N), np.arange(N)] = np.where(doubt > 0, np.exp(10 * doubt), 0)
    wanted /= wanted.sum(axis=1, keepdims=True)
    edges = transition_edges(lists_of())
    np.testing.assert_allclose(dense(*edges), wanted, atol=1e-5)
    without = dense(*transition_edges(lists_of(), self_transitions=False))
    assert np.diag(without).max() == 0
    np.testing.assert_allclose(without.sum(axis=1), 1, rtol=1e-5)


def test_a_cell_without_velocity_stays():
    still = jnp.asarray(V).at[3].set(0.0)
    found = cosine_lists(jnp.asarray(X), still, candidates(jnp.asarray(NEAR)))
    for stays in (True, False):
        chain = dense(*transition_edges(found, self_transitions=stays))
        assert chain[3, 3] == 1


def test_genes_that_are_left_out_do_not_count():
    kept = np.array([True, True, True, False, True, False])
    found = lists_of(genes=jnp.asarray(kept))
    alone = cosine_lists(jnp.asarray(X[:, kept]), jnp.asarray(V[:, kept]), candidates(jnp.asarray(NEAR)))
    np.testing.assert_allclose(found.cosines, alone.cosines, atol=1e-5)


def test_cells_at_one_place_have_no_direction_between_them():
    double = jnp.asarray(X).at[NEAR[0, 0]].set(X[0] * (1 + 1e-7))
    found = cosine_lists(double, jnp.asarray(V), candidates(jnp.asarray(NEAR)))
    assert not bool(found.listed[0][found.columns[0] == NEAR[0, 0]].any())


def test_confidence_is_the_mean_correlation_with_neighbours():
    wanted = [np.mean([np.corrcoef(V[i], V[j])[0, 1] for j in NEAR[i]]) for i in range(N)]
    np.testing.assert_allclose(confidence(jnp.asarray(V), jnp.asarray(NEAR)), wanted, atol=1e-5)


def test_arrows_on_a_map_are_scvelos():
    cosines, y = matrix_of(), RNG.normal(size=(N, 2)).astype(np.float32)
    best = np.maximum(cosines.max(axis=1), 0)
    doubt = np.clip(np.percentile(best, 98) - best, 0, 1)
    t = np.sign(cosines) * np.expm1(10 * np.abs(cosines))
    t /= (np.abs(t).sum(axis=1) + np.expm1(10 * doubt))[:, None]
    wanted = np.zeros((N, 2))
    for i in range(N):
        j = np.flatnonzero(cosines[i])
        way = (y[j] - y[i]) / np.linalg.norm(y[j] - y[i], axis=1, keepdims=True)
        wanted[i] = t[i, j] @ way - t[i, j].mean() * way.sum(axis=0)
    np.testing.assert_allclose(projected(lists_of(), jnp.asarray(y)), wanted, atol=1e-4)


def test_times_of_a_flow_along_a_line():
    """Cells on a line whose velocities all point along it: times follow the place, with no root given."""
    place = np.sort(RNG.uniform(0, 1, 60))
    near = jnp.asarray(np.argsort(np.abs(place[:, None] - place), axis=1)[:, 1:6])
    ahead = jnp.asarray(np.sign(place[np.asarray(near)] - place[:, None]), jnp.float32)
    times = np.asarray(unit_interval(potential(near, ahead)))
    assert (times[0], times[-1]) == (0, 1)
    assert np.corrcoef(times, place)[0, 1] > 0.97
    assert np.asarray(potential(near, jnp.zeros_like(ahead))).max() == 0
    assert np.asarray(unit_interval(jnp.ones(4))).max() == 0


def test_gradient_of_the_times():
    with jax.enable_x64(True):
        near, cosines = jnp.asarray(NEAR), jnp.asarray(RNG.normal(size=NEAR.shape))
        way, weight = jnp.asarray(RNG.normal(size=NEAR.shape)), jnp.asarray(RNG.normal(size=N))

        def f(c):
            return weight @ potential(near, c)

        numeric = f(cosines + way) - f(cosines)  # it is linear
        np.testing.assert_allclose((jax.grad(f)(cosines) * way).sum(), numeric, rtol=1e-8)


def test_short_lists_hold_the_same_cells():
    short = distinct_candidates(NEAR)
    assert all(sorted(set(map(int, row))) == reachable(i) for i, row in enumerate(short))
    assert short.shape[1] == max(len(reachable(i)) for i in range(N))
    found = cosine_lists(jnp.asarray(X), jnp.asarray(V), jnp.asarray(short))
    rows = np.repeat(np.arange(N), short.shape[1])
    np.testing.assert_allclose(dense(rows, found.columns.ravel(), found.cosines.ravel()), matrix_of(), atol=1e-5)
