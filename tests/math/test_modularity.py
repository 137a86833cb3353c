"""Soft modularity, its mirror ascent, and the lists of neighbours that both read."""

import igraph
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from diffbio.math.graph import fuzzy_simplicial_set
from diffbio.math.modularity import (
    ascended,
    find_communities,
    fuzzy_lists,
    links,
    listed_edges,
    modularity,
    neighbor_lists,
    soft_modularity,
)
from diffbio.math.neighbors import knn


@pytest.fixture(scope="module")
def karate():
    """Lists, and igraph's graph."""
    graph = igraph.Graph.Famous("Zachary")
    edges = np.asarray(graph.get_edgelist()).T
    return neighbor_lists(*edges, np.ones(len(edges[0])), 34), graph


def test_one_hot_rows_have_igraphs_modularity(karate):
    (indices, weights), graph = karate
    labels = np.random.default_rng(1).integers(4, size=34)
    with jax.enable_x64(True):
        network = links(jnp.asarray(indices), jnp.asarray(weights, jnp.float64))
        for resolution in (0.5, 1.0, 2.0):
            found = soft_modularity(network, jax.nn.one_hot(labels, 4), resolution=resolution)
            assert float(found) == pytest.approx(graph.modularity(labels, resolution=resolution), abs=1e-12)
    network = links(jnp.asarray(indices), jnp.asarray(weights))
    found = soft_modularity(network, jax.nn.one_hot(labels, 4))
    assert float(found) == pytest.approx(graph.modularity(labels), abs=1e-6)


def test_soft_rows_have_the_expected_modularity_of_draws(karate):
    """Q is linear in every cell: with the self-term apart, the mean over independent draws of labels."""
    (indices, weights), _ = karate
    network = links(jnp.asarray(indices), jnp.asarray(weights))
    rows = jax.random.dirichlet(jax.random.key(0), jnp.ones(3), (34,))
    draws = jax.random.categorical(jax.random.key(1), jnp.log(rows), axis=1, shape=(4000, 34))
    drawn = jax.vmap(lambda labels: soft_modularity(network, jax.nn.one_hot(labels, 3)))(draws).mean()
    own = (network.degree**2 * ((rows**2).sum(axis=1) - 1.0)).sum() / network.total**2
    assert float(soft_modularity(network, rows)) == pytest.approx(float(drawn - own), abs=3e-3)


def test_ascent_raises_modularity_and_entropy(karate):
    (indices, weights), _ = karate
    network = links(jnp.asarray(indices), jnp.asarray(weights))
    labels = jnp.asarray(find_communities(*listed_edges(indices, weights), 34))
    temperature = 0.1

    def height(s):
        own = (network.degree**2 * (s**2).sum(axis=1)).sum() / network.total**2
        share = network.degree / network.total
        entropy = (share * jax.scipy.special.entr(s).sum(axis=1)).sum()
        return float(soft_modularity(network, s) + own + 2 * temperature * entropy)

    heights = [
        height(ascended(network, labels, n_communities=4, temperature=temperature, n_iterations=k))
        for k in (0, 1, 2, 5)
    ]
    assert heights[-1] > heights[0]
    assert min(np.diff(heights)) > -1e-6
    at_rest = ascended(network, labels, n_communities=4, temperature=temperature, n_iterations=200)
    again = ascended(network, labels, n_communities=4, temperature=temperature, n_iterations=201)
    np.testing.assert_allclose(at_rest, again, atol=1e-6)


def test_cold_ascent_keeps_a_partition_that_no_move_makes_better(karate):
    (indices, weights), _ = karate
    labels = find_communities(*listed_edges(indices, weights), 34)
    network = links(jnp.asarray(indices), jnp.asarray(weights))
    found = ascended(network, jnp.asarray(labels), n_communities=6, temperature=1e-4)
    np.testing.assert_allclose(found, np.eye(6)[labels], atol=1e-3)


def test_lists_hold_the_graph_once_and_short():
    rng = np.random.default_rng(0)
    dense = np.triu(rng.random((40, 40)) * (rng.random((40, 40)) < 0.1), 1)
    dense[0, 1:] = 0.5  # a hub
    both = sparse.coo_array(dense + dense.T)
    indices, weights = neighbor_lists(both.row, both.col, both.data, 40)
    assert indices.shape[1] < 10
    rows, columns, values = listed_edges(indices, weights)
    again = np.zeros((40, 40))
    np.add.at(again, (rows, columns), values)
    np.testing.assert_allclose(again + again.T, 2 * (dense + dense.T), atol=1e-6)


def test_fuzzy_lists_are_umaps_graph():
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    indices, distances = knn(x, 7)
    rows, columns, weights = fuzzy_simplicial_set(indices, distances)
    wanted = sparse.coo_array((np.asarray(weights), (rows, columns)), shape=(60, 60)).toarray()
    again = np.zeros((60, 60))
    lists = fuzzy_lists(indices, distances)
    np.add.at(again, listed_edges(*lists)[:2], listed_edges(*lists)[2])
    np.testing.assert_allclose(again + again.T, wanted, atol=1e-6)
    labels = np.arange(60) % 3
    mine = modularity(*listed_edges(*lists), labels)
    assert mine == pytest.approx(modularity(rows, columns, weights, labels), abs=1e-6)
    slope = jax.grad(lambda d: (fuzzy_lists(indices, d).weights ** 2).sum())(jnp.asarray(distances))
    assert jnp.isfinite(slope).all()
    assert (jnp.abs(slope) > 0).any(axis=1).all()
