import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffbio.nn.gene_transformer import GeneTransformer

GENES, DIM, HEADS, LATENTS = 9, 8, 2, 3


@pytest.fixture(scope="module")
def network():
    return GeneTransformer(GENES, DIM, n_heads=HEADS, n_layers=2, n_latents=LATENTS, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def cells():
    keys = jax.random.split(jax.random.key(1), 2)
    counts = jax.random.poisson(keys[0], 2.0, (5, GENES)).astype(jnp.float32)
    return counts, jax.random.bernoulli(keys[1], 0.7, counts.shape)


def attend(query, key, content, *, seen):
    """The textbook's attention of one head, numpy, float64: softmax(q k / sqrt(width)) v over what is seen."""
    score = np.where(seen, query @ key.T / np.sqrt(query.shape[-1]), -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ content


def test_tables_equal_attention_over_tokens_that_are_laid_out(network, cells):
    counts, visible = cells
    network.read_slope[...] = jnp.zeros_like(network.read_slope[...])  # the textbook has no slope beside the tokens'
    network.read_nothing[...] = jnp.full_like(network.read_nothing[...], -1e9)  # and no token for no gene
    found = network.read(network.tables(), counts, visible)
    e = np.asarray(network.embedding[...], np.float64)
    direction = e + e @ np.asarray(network.direction.kernel[...]) + np.asarray(network.direction.bias[...])
    for c in range(len(counts)):
        tokens = e + np.log1p(np.asarray(counts[c], np.float64))[:, None] * direction
        keys = (tokens @ np.asarray(network.read_key.kernel[...])).reshape(GENES, HEADS, -1)
        contents = (tokens @ np.asarray(network.read_content.kernel[...])).reshape(GENES, HEADS, -1)
        for h in range(HEADS):
            query = np.asarray(network.read_query[...], np.float64)[h]
            expected = attend(query, keys[:, h], contents[:, h], seen=np.asarray(visible[c]))
            width = DIM // HEADS
            np.testing.assert_allclose(found[c, :, h * width : (h + 1) * width], expected, rtol=2e-4, atol=2e-5)


def test_genes_may_come_in_any_order(network, cells):
    counts, visible = cells
    expected = network(network.tables(), counts, visible)
    order = np.random.default_rng(0).permutation(GENES)
    graph, state = nnx.split(network)
    shuffled = nnx.merge(graph, state, copy=True)
    shuffled.embedding[...] = network.embedding[...][order]
    found = shuffled(shuffled.tables(), counts[:, order], visible[:, order])
    np.testing.assert_allclose(found, expected[:, order], rtol=1e-4, atol=1e-5)


def test_what_is_not_visible_is_not_looked_at(network, cells):
    counts, visible = cells
    tables = network.tables()
    other = jnp.where(visible, counts, 1e6)
    np.testing.assert_array_equal(network(tables, counts, visible), network(tables, other, visible))
    attention = network.gene_attention(tables, counts, visible)
    assert float(jnp.abs(jnp.where(visible[:, None], 0.0, attention)).max()) == 0.0


def test_attention_of_every_gene_sums_to_one(network, cells):
    attention = network.gene_attention(network.tables(), *cells)
    assert attention.shape == (5, GENES, GENES)
    assert float(attention.min()) >= 0.0
    np.testing.assert_allclose(attention.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(network.blocks[0].attention(jnp.ones((2, LATENTS, DIM))).sum(-1), 1.0, rtol=1e-5)


def test_a_cell_of_which_nothing_is_seen_is_finite_in_value_and_gradient(network, cells):
    counts, _ = cells
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def total(params, counts):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(model.tables(), counts, jnp.zeros(counts.shape, bool)).sum()

    value, (by_params, by_counts) = jax.value_and_grad(total, argnums=(0, 1))(params, counts)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(by_params))
    np.testing.assert_array_equal(by_counts, 0.0)
