import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.test_util import check_grads

from diffbio.nn.graph_attention import GraphAttention, segment_softmax

SENDERS, RECEIVERS = np.array([0, 2, 1, 0, 1, 2]), np.array([0, 0, 1, 3, 3, 3])


def dense_oracle(layer: GraphAttention, sending: np.ndarray, receiving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brody et al.'s equation, edge by edge, in numpy."""
    values = np.einsum("nf,fho->nho", sending, layer.sender.kernel[...]) + layer.sender.bias[...]
    wanted = np.einsum("nf,fho->nho", receiving, layer.receiver.kernel[...]) + layer.receiver.bias[...]
    outputs, attention = np.zeros((len(receiving), *values.shape[1:])), np.zeros((len(SENDERS), values.shape[1]))
    for node in range(len(receiving)):
        mine = np.flatnonzero(node == RECEIVERS)
        if not len(mine):
            continue
        hidden = values[SENDERS[mine]] + wanted[node]
        scores = (np.where(hidden > 0, hidden, 0.2 * hidden) * np.asarray(layer.direction[...])).sum(-1)
        weights = np.exp(scores) / np.exp(scores).sum(0)
        attention[mine], outputs[node] = weights, (weights[:, :, None] * values[SENDERS[mine]]).sum(0)
    return outputs, attention


def bipartite() -> tuple[GraphAttention, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    sending, receiving = random.normal(size=(3, 5)), random.normal(size=(4, 2))
    return GraphAttention(5, 6, 2, n_receiver_features=2, rngs=nnx.Rngs(0)), sending, receiving


def test_outputs_and_attention_are_those_of_the_equation():
    layer, sending, receiving = bipartite()
    outputs, attention = layer(
        jnp.asarray(SENDERS), jnp.asarray(RECEIVERS), jnp.asarray(sending), jnp.asarray(receiving), ordered=True
    )
    expected = dense_oracle(layer, sending, receiving)
    np.testing.assert_allclose(outputs, expected[0], atol=1e-5)
    np.testing.assert_allclose(attention, expected[1], atol=1e-6)
    assert np.all(np.asarray(outputs)[2] == 0)  # nobody sends to it


def test_the_ranking_of_senders_depends_on_the_receiver():
    layer, sending, _ = bipartite()
    everyone = np.tile(np.arange(3), 50), np.repeat(np.arange(50), 3)
    many = np.random.default_rng(1).normal(size=(50, 2)) * 3
    _, attention = layer(*map(jnp.asarray, (*everyone, sending, many)))
    assert len(set(np.asarray(attention)[:, 0].reshape(50, 3).argmax(1))) > 1


def test_edges_taken_out_count_for_nothing():
    layer, sending, receiving = bipartite()
    nodes = jnp.asarray(sending), jnp.asarray(receiving)
    keep = np.array([True, False, True, True, True, True])
    outputs, attention = layer(jnp.asarray(SENDERS), jnp.asarray(RECEIVERS), *nodes, valid=jnp.asarray(keep))
    fewer = layer(jnp.asarray(SENDERS[keep]), jnp.asarray(RECEIVERS[keep]), *nodes)
    np.testing.assert_allclose(outputs, fewer[0], atol=1e-6)
    assert attention[1].max() == 0


def test_features_of_edges_move_the_attention():
    layer = GraphAttention(5, 6, 2, n_receiver_features=2, n_edge_features=1, rngs=nnx.Rngs(0))
    _, sending, receiving = bipartite()
    given = [layer(
        jnp.asarray(SENDERS), jnp.asarray(RECEIVERS), jnp.asarray(sending), jnp.asarray(receiving),
        edge_features=jnp.asarray(edges, jnp.float32)[:, None],
    )[1] for edges in (np.zeros(6), np.arange(6))]  # fmt: skip
    assert np.abs(given[0] - given[1]).max() > 1e-3


def test_softmax_of_segments_has_a_true_gradient_also_beside_an_empty_one():
    scores = np.random.default_rng(0).normal(size=(6, 2))
    scores[0], scores[1] = -np.inf, -np.inf  # receiver 0 hears nobody
    with jax.enable_x64(True):
        random = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)))
        finite = jnp.asarray(np.where(np.isfinite(scores), scores, 0.0))

        def summed(x: jax.Array) -> jax.Array:
            gone = jnp.where(jnp.isfinite(jnp.asarray(scores)), x, -jnp.inf)
            return (random * segment_softmax(gone, jnp.asarray(RECEIVERS), 4)).sum()

        check_grads(summed, (finite,), order=1, modes=["rev"], rtol=1e-6)
        assert np.isfinite(jax.grad(summed)(finite)).all()
