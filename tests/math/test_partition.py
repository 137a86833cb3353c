"""The search for communities: known optima, invariances, graphs in pieces, limits on their number, bad input."""

import igraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from diffbio.errors import DataError
from diffbio.math import partition
from diffbio.math.partition import find_communities, modularity


@pytest.fixture(scope="module")
def karate():
    return np.asarray(igraph.Graph.Famous("Zachary").get_edgelist()).T


def planted(n_groups, size, inside, outside, seed=0):
    """Edges of a planted partition, each listed once, with weights; and the groups."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(n_groups), size)
    rows, columns = np.triu_indices(len(truth), 1)
    kept = rng.random(len(rows)) < np.where(truth[rows] == truth[columns], inside, outside)
    return rows[kept], columns[kept], rng.uniform(0.5, 1.5, kept.sum()), truth


def cliques(n_cliques, size):
    """Edges of a ring of cliques, neighbours joined by one edge."""
    pairs = [(size * c + a, size * c + b) for c in range(n_cliques) for a in range(size) for b in range(a)]
    pairs += [(size * c, (size * c + size + 1) % (n_cliques * size)) for c in range(n_cliques)]
    return np.asarray(pairs).T


def test_modularity_is_that_of_igraph(karate):
    weights = np.random.default_rng(0).uniform(0.1, 2, len(karate[0]))
    labels = np.random.default_rng(1).integers(5, size=34)
    graph = igraph.Graph(n=34, edges=karate.T)
    for resolution in (0.5, 1.0, 2.0):
        wanted = graph.modularity(labels, weights=weights, resolution=resolution)
        assert modularity(*karate, weights, labels, resolution=resolution) == pytest.approx(wanted, abs=1e-12)


def test_karate_club_reaches_its_optimum(karate):
    labels = find_communities(*karate, np.ones(78), 34)
    assert modularity(*karate, np.ones(78), labels) >= 0.4197  # the optimum is 0.41979, with 4 communities
    assert labels.max() == 3
    assert (np.diff(np.bincount(labels)) <= 0).all(), "numbered by size"


@pytest.mark.parametrize("at_once_above", [8_000, 30])
def test_planted_groups_are_found(monkeypatch, at_once_above):
    monkeypatch.setattr(partition, "AT_ONCE_ABOVE", at_once_above)
    rows, columns, weights, truth = planted(6, 40, 0.3, 0.02)
    labels = find_communities(rows, columns, weights, len(truth))
    assert adjusted_rand_score(truth, labels) == 1.0


def test_resolution_splits_and_joins():
    edges = cliques(30, 5)
    weights = np.ones(len(edges[0]))
    counts = [
        find_communities(*edges, weights, 150, resolution=resolution).max() + 1 for resolution in (0.05, 1.0, 3.0)
    ]
    # at 1, pairs of cliques are the optimum (the resolution limit of Fortunato & Barthélemy 2007)
    assert counts[0] < 8 < counts[1] < counts[2] == 30


def test_how_edges_are_listed_does_not_matter(karate):
    weights = np.random.default_rng(0).uniform(0.1, 2, 78)
    once = find_communities(*karate, weights, 34)
    twice = find_communities(*np.hstack([karate, karate[::-1], [[3], [3]]]), np.array([*weights, *weights, 9.0]), 34)
    np.testing.assert_array_equal(once, twice)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_cells_may_come_in_any_order(seed):
    rows, columns, weights, truth = planted(4, 12, 0.5, 0.1, seed)
    n = len(truth)
    labels = find_communities(rows, columns, weights, n)
    place = np.random.default_rng(seed).permutation(n)  # where each cell goes
    again = find_communities(place[rows], place[columns], weights, n)
    np.testing.assert_array_equal(again[place], labels)


def test_pieces_stay_apart_and_lonely_cells_are_their_own():
    rows, columns, weights, truth = planted(2, 10, 0.9, 0.0)
    n = len(truth) + 2
    labels = find_communities(rows, columns, weights, n)
    assert adjusted_rand_score(truth, labels[:-2]) == 1.0
    assert sorted(labels[-2:]) == [2, 3]
    few = find_communities(rows, columns, weights, n, most=3)
    assert few[-2] == few[-1]
    assert adjusted_rand_score(truth, few[:-2]) == 1.0


def test_the_cheapest_unions_come_first():
    edges = cliques(10, 6)
    weights = np.ones(len(edges[0]))
    free = find_communities(*edges, weights, 60)
    assert free.max() + 1 == 10
    for most in (9, 5, 2, 1):
        labels = find_communities(*edges, weights, 60, most=most)
        assert labels.max() + 1 == most
        assert len(set(zip(free, labels, strict=True))) == 10, "whole communities are joined"
    halves = find_communities(*edges, weights, 60, most=5)
    assert modularity(*edges, weights, halves) > 0.65  # neighbours on the ring are joined: 0.8 - 0.2 or nearly so


def test_no_single_move_gains():
    rows, columns, weights, truth = planted(5, 20, 0.4, 0.08, seed=3)
    labels = find_communities(rows, columns, weights, len(truth))
    best = modularity(rows, columns, weights, labels)
    rng = np.random.default_rng(0)
    for cell in rng.integers(len(truth), size=40):
        moved = labels.copy()
        moved[cell] = rng.integers(labels.max() + 2)
        assert modularity(rows, columns, weights, moved) <= best + 1e-12


def test_bad_graphs_are_refused():
    ends = np.array([0, 1]), np.array([1, 2])
    with pytest.raises(DataError, match="no edges"):
        find_communities(*ends, np.zeros(2), 3)
    with pytest.raises(DataError, match="edge 1 has -1"):
        find_communities(*ends, np.array([1.0, -1.0]), 3)
    with pytest.raises(DataError, match="edge 0 has nan"):
        find_communities(*ends, np.array([np.nan, 1.0]), 3)
    with pytest.raises(DataError, match=r"ends at cell 2.*0 to 1"):
        find_communities(*ends, np.ones(2), 2)
    assert modularity(*ends, np.zeros(2), np.zeros(3, int)) == 0.0
