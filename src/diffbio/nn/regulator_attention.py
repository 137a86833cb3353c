"""GATv2 attention of genes over the regulators that may explain them, on the bipartite graph, in blocks of genes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .graph_attention import GraphAttention, segment_softmax

EDGES_AT_ONCE = 200_000  # times heads times hidden: what is held of them at a time
EVIDENCE, OF_REGULATOR, OF_GENE = 4, 2, 2  # features


class RegulatorAttention(nnx.Module):
    """Attention of every gene over its regulators and a background, which says that none of them explains it.

    One `GraphAttention` layer with an edge from every regulator and from the background to every gene. Edges carry
    evidence. The background starts as one node among all: if it began with a large share, the price of attention would
    move the rest there before the layer has learned to read the evidence.
    """

    def __init__(self, hidden_dim: int, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.layer = GraphAttention(
            OF_REGULATOR, hidden_dim, num_heads, n_receiver_features=OF_GENE, n_edge_features=EVIDENCE + 1, rngs=rngs
        )

    def __call__(
        self,
        of_regulators: Float[Array, "tfs regulator_features"],
        of_genes: Float[Array, "genes gene_features"],
        evidence: Float[Array, "tfs genes evidence"],
        offset: Float[Array, "heads tfs genes"],
        possible: Bool[Array, "tfs genes"],
        temperature: float,
    ) -> Float[Array, "heads tfs genes"]:
        """Attention on the regulators; over a gene's regulators it sums to at most 1, the rest is on the background.

        Args:
            of_regulators: features of the nodes that send.
            of_genes: of those that receive.
            evidence: features of the edges.
            offset: added to the scores of the edges.
            possible: False takes an edge out.
            temperature: of the softmax; as it goes to 0 each head has one regulator, or the background, of each gene.
        """
        n_genes = len(of_genes)
        size = max(1, min(n_genes, EDGES_AT_ONCE // (len(of_regulators) + 1)))
        count = -(-n_genes // size)
        arguments = (of_genes, jnp.moveaxis(evidence, 1, 0), jnp.moveaxis(offset, 2, 0), possible.T)
        if count == 1:
            found = self._block(of_regulators, temperature, *arguments)
        else:
            spare = count * size - n_genes
            blocks = [
                jnp.concatenate([x, jnp.zeros((spare, *x.shape[1:]), x.dtype)]).reshape(count, size, *x.shape[1:])
                for x in arguments
            ]
            graph, state = nnx.split(self)

            @jax.checkpoint
            def block(state: Any, of_regulators: Array, arrays: list[Array]) -> Array:
                return nnx.merge(graph, state)._block(of_regulators, temperature, *arrays)

            found = jax.lax.map(lambda arrays: block(state, of_regulators, arrays), blocks)
            found = found.reshape(count * size, *found.shape[2:])[:n_genes]
        return jnp.transpose(found, (2, 1, 0))

    def _block(
        self, of_regulators: Array, temperature: float, of_genes: Array, evidence: Array, offset: Array, possible: Array
    ) -> Float[Array, "genes tfs heads"]:
        n_genes, n_tfs = possible.shape
        nodes = n_tfs + 1  # the last one is the background
        sending = jnp.concatenate([of_regulators, jnp.zeros((1, of_regulators.shape[1]), of_regulators.dtype)])
        features = jnp.zeros((n_genes, nodes, EVIDENCE + 1), evidence.dtype)
        features = features.at[:, :n_tfs, :EVIDENCE].set(evidence).at[:, n_tfs, EVIDENCE].set(1.0)
        more = jnp.concatenate(
            [jnp.swapaxes(offset, 1, 2), jnp.zeros((n_genes, 1, self.num_heads), offset.dtype)], axis=1
        )
        valid = jnp.concatenate([possible, jnp.ones((n_genes, 1), bool)], axis=1).ravel()
        senders = jnp.tile(jnp.arange(nodes), n_genes)
        receivers = jnp.repeat(jnp.arange(n_genes), nodes)
        _, attention = self.layer(
            senders, receivers, sending, of_genes, edge_features=features.reshape(-1, EVIDENCE + 1), valid=valid,
            ordered=True,
        )  # fmt: skip
        there = attention > 0
        scores = jnp.log(jnp.where(there, attention, 1.0)) + more.reshape(-1, self.num_heads)
        scores = jnp.where(there, scores / temperature, -jnp.inf)
        final = segment_softmax(scores, receivers, n_genes, ordered=True)
        return final.reshape(n_genes, nodes, self.num_heads)[:, :n_tfs]
