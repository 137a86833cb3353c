"""Graph attention (GATv2) on lists of edges: cost is that of the edges, for any graph, also a bipartite one."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

NEGATIVE_SLOPE = 0.2  # as GAT and GATv2


def segment_softmax(
    scores: Float[Array, "edges *heads"], receivers: Int[Array, " edges"], n_receivers: int, *, ordered: bool = False
) -> Float[Array, "edges *heads"]:
    """Softmax over the edges of each receiver; a score of -inf gives weight 0.

    A receiver all of whose scores are -inf gets zeros, without NaN in the gradient.

    Args:
        scores: of each edge.
        receivers: the node whose incoming edges share a softmax.
        n_receivers: how many there are.
        ordered: receivers are sorted (faster).
    """
    fixed = jax.lax.stop_gradient(scores)
    highest = jax.ops.segment_max(fixed, receivers, n_receivers, indices_are_sorted=ordered)
    finite = jnp.isfinite(scores)
    shift = jnp.where(jnp.isfinite(highest), highest, 0.0)[receivers]
    exponential = jnp.where(finite, jnp.exp(jnp.where(finite, scores - shift, 0.0)), 0.0)
    total = jax.ops.segment_sum(exponential, receivers, n_receivers, indices_are_sorted=ordered)
    return exponential / jnp.where(total > 0, total, 1.0)[receivers]


class GraphAttention(nnx.Module):
    """One GATv2 layer: h_i = sum over j of alpha_ij V x_j, per head.

    alpha_ij = softmax over j of a . leaky_relu(W_s x_j + W_t x_i + W_e e_ij), with slope 0.2 (Brody, Alon and Yahav
    2022, equation 7). Unlike GAT's, the ranking of the senders depends on the receiver. W_s = V, as there.
    """

    def __init__(
        self,
        n_sender_features: int,
        n_features: int,
        num_heads: int,
        *,
        n_receiver_features: int | None = None,
        n_edge_features: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the weights.

        Args:
            n_sender_features: of a node that sends.
            n_features: of the output, of each head.
            num_heads: heads, each with its own attention.
            n_receiver_features: of a node that receives; None is as many as of one that sends.
            n_edge_features: of an edge; 0 is none.
            rngs: stream "params".
        """
        received = n_sender_features if n_receiver_features is None else n_receiver_features
        shape = num_heads, n_features
        self.sender = nnx.LinearGeneral(n_sender_features, shape, rngs=rngs)
        self.receiver = nnx.LinearGeneral(received, shape, rngs=rngs)
        self.edge = nnx.data(
            nnx.LinearGeneral(n_edge_features, shape, use_bias=False, rngs=rngs) if n_edge_features else None
        )
        self.direction = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), shape))

    def __call__(
        self,
        senders: Int[Array, " edges"],
        receivers: Int[Array, " edges"],
        sending: Float[Array, "sending_nodes features"],
        receiving: Float[Array, "receiving_nodes received"] | None = None,
        *,
        edge_features: Float[Array, "edges edge_features"] | None = None,
        valid: Bool[Array, " edges"] | None = None,
        ordered: bool = False,
    ) -> tuple[Float[Array, "receiving_nodes heads outputs"], Float[Array, "edges heads"]]:
        """Outputs of the receivers, and the attention on each edge; that of one receiver sums to 1 in every head.

        Args:
            senders: row of `sending` of each edge.
            receivers: row of `receiving` of each edge.
            sending: features of the nodes that send.
            receiving: of those that receive; None where they are the same nodes.
            edge_features: of each edge.
            valid: False takes an edge out (padding): its attention is 0.
            ordered: receivers are sorted (faster).
        """
        nodes = sending if receiving is None else receiving
        value = self.sender(sending)[senders]
        hidden = value + self.receiver(nodes)[receivers]
        if self.edge is not None and edge_features is not None:
            hidden = hidden + self.edge(edge_features)
        scores = jnp.einsum("ehf,hf->eh", jax.nn.leaky_relu(hidden, NEGATIVE_SLOPE), self.direction[...])
        if valid is not None:
            scores = jnp.where(valid[:, None], scores, -jnp.inf)
        attention = segment_softmax(scores, receivers, len(nodes), ordered=ordered)
        weighted = attention[:, :, None] * value
        return jax.ops.segment_sum(weighted, receivers, len(nodes), indices_are_sorted=ordered), attention
