"""A transformer over genes: a few latent tokens read the genes of a cell, and every gene reads them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

SMALL = nnx.initializers.normal(0.02)
FIRST_SLOPE = 3.0  # a gene with one count starts with eight times the attention of one with none
WRITE_SCALE = 0.3  # of the first answers: the start is near the profile that genes have without context
HIDDEN = -1e9  # score of a gene that is not to be read


class GeneTables(NamedTuple):
    """All of the network that has a row per gene and no row per cell; computed once for many cells."""

    score: Float[Array, "heads latents genes"]  # of a gene without counts, for the latent tokens that read
    slope: Float[Array, "heads latents genes"]  # by which log(1 + counts) moves it
    content: Float[Array, "heads genes width"]  # what is read of a gene without counts
    moved: Float[Array, "heads genes width"]  # and how log(1 + counts) moves that
    query: Float[Array, "heads genes width"]  # with which genes read the latent tokens
    answer: Float[Array, "heads genes width"]  # what of the latent tokens' content a gene's log rate takes


class GeneTransformer(nnx.Module):
    """How the genes that can be seen in a cell move the log rate of every gene.

    The token of gene g with count x is e_g + log(1 + x) u_g: the gene's embedding and, along a direction u_g that is
    linear in e_g, its value. Three steps, as in a Perceiver (Jaegle et al. 2021; inducing points: Lee et al. 2019):
    n_latents tokens read the visible genes by multi-head attention, attend to each other in n_layers transformer
    blocks, and are read by a query of each gene. So a cell costs genes x latents, not genes x genes; and since tokens
    are linear in log(1 + x), keys and contents of (cells, genes, dim) are never laid out: attention over them equals
    products with tables of (genes, width). Nothing in it depends on the order of the genes.

    dim: width of tokens, a multiple of n_heads.
    n_heads: of every attention. n_layers: self-attention blocks of the latent tokens.
    n_latents: number of latent tokens.
    """

    def __init__(
        self, n_genes: int, dim: int, *, n_heads: int, n_layers: int, n_latents: int, rngs: nnx.Rngs
    ) -> None:
        self.n_heads, self.n_latents, self.width = n_heads, n_latents, dim // n_heads

        def normal(*shape: int) -> nnx.Param[jax.Array]:
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        def linear(*, use_bias: bool = False) -> nnx.Linear:
            return nnx.Linear(dim, dim, use_bias=use_bias, rngs=rngs)

        self.embedding = normal(n_genes, dim)
        self.direction = linear(use_bias=True)
        self.read_query = normal(n_heads, n_latents, self.width)
        self.read_key, self.read_content = linear(), linear()
        self.read_slope = nnx.Param(jnp.full((n_heads, n_latents), FIRST_SLOPE))
        self.read_nothing = nnx.Param(jnp.zeros((n_heads, n_latents)))  # score of a token that stands for no gene
        self.read_center = nnx.Param(jnp.zeros((n_latents, dim)))
        self.read_scale = nnx.Param(jnp.ones((n_latents, dim)))
        self.latents = normal(n_latents, dim)
        self.blocks = nnx.List([LatentBlock(dim, n_heads, rngs=rngs) for _ in range(n_layers)])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.write_query, self.write_key = linear(), linear()
        self.write_content, self.write_answer = linear(), linear()
        self.write_scale = nnx.Param(jnp.asarray(WRITE_SCALE))

    def tables(self) -> GeneTables:
        """What `__call__` needs of all genes."""
        e = self.embedding[...]
        u = e + self.direction(e)
        query = self.read_query[...] / math.sqrt(self.width)
        score = jnp.einsum("hlw,hgw->hlg", query, self._heads(self.read_key(e)))
        slope = jnp.einsum("hlw,hgw->hlg", query, self._heads(self.read_key(u))) + self.read_slope[...][..., None]
        answer = self._heads(self.write_answer(e)) * (self.write_scale[...] / math.sqrt(e.shape[-1]))
        return GeneTables(
            score=score,
            slope=slope,
            content=self._heads(self.read_content(e)),
            moved=self._heads(self.read_content(u)),
            query=self._heads(self.write_query(e)) / math.sqrt(self.width),
            answer=answer,
        )

    def __call__(
        self, tables: GeneTables, counts: Float[Array, "cells genes"], visible: Bool[Array, "cells genes"]
    ) -> Float[Array, "cells genes"]:
        """What the context adds to the log rates. Counts that are not visible are not looked at."""
        z = self._start(tables, counts, visible)
        for block in self.blocks:
            z = block(z)
        score, answer = self._asked(tables, z)
        return (jax.nn.softmax(score, axis=2) * answer).sum((0, 2))

    def read(
        self, tables: GeneTables, counts: Float[Array, "cells genes"], visible: Bool[Array, "cells genes"]
    ) -> Float[Array, "cells latents dim"]:
        """What each latent token reads of the genes, before it is centered."""
        level = jnp.log1p(jnp.where(visible, counts, 0.0))
        seen, unseen = self._looks(tables, level, visible)
        rows = (self.n_heads, counts.shape[0] * self.n_latents, counts.shape[1])
        weighted = (seen * level[None, :, None]).reshape(rows) @ tables.moved
        content = seen.reshape(rows) @ tables.content + weighted
        content = content.reshape(*seen.shape[:3], self.width) / (seen.sum(-1, keepdims=True) + unseen)
        return jnp.transpose(content, (1, 2, 0, 3)).reshape(counts.shape[0], self.n_latents, -1)

    def gene_attention(
        self, tables: GeneTables, counts: Float[Array, "cells genes"], visible: Bool[Array, "cells genes"]
    ) -> Float[Array, "cells readers genes"]:
        """How much each gene (row) looks at each visible gene (column), through all layers; rows sum to 1.

        The product of the attention matrices, means over heads, where a block with its residual path counts as half
        attention and half identity (attention rollout: Abnar & Zuidema 2020). Of a cell without visible genes it is 0.
        """
        seen, _ = self._looks(tables, jnp.log1p(jnp.where(visible, counts, 0.0)), visible)
        total = seen.sum(-1, keepdims=True)
        path = (seen / jnp.where(total > 0, total, 1.0)).mean(0)  # (cells, latents, genes)
        z = self._start(tables, counts, visible)
        for block in self.blocks:
            path = 0.5 * path + 0.5 * block.attention(z).mean(1) @ path
            z = block(z)
        score, _ = self._asked(tables, z)
        return jnp.swapaxes(jax.nn.softmax(score, axis=2).mean(0), 1, 2) @ path

    def _start(self, tables: GeneTables, counts: jax.Array, visible: jax.Array) -> jax.Array:
        content = self.read(tables, counts, visible)
        return self.latents[...] + (content - self.read_center[...]) * self.read_scale[...]

    def _looks(self, tables: GeneTables, level: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Attention before it is divided by its sum: on genes (heads, cells, latents, genes), on none of them."""
        score = tables.score[:, None] + level[None, :, None] * tables.slope[:, None]
        score = score + jnp.where(visible, 0.0, HIDDEN).astype(level.dtype)[None, :, None]
        nothing = self.read_nothing[...][:, None, :, None]
        top = jax.lax.stop_gradient(jnp.maximum(score.max(-1, keepdims=True), nothing))
        return jnp.exp(score - top), jnp.exp(nothing - top)

    def _asked(self, tables: GeneTables, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores of latent tokens for every gene, and what each would answer: (heads, cells, latents, genes)."""
        flat = self.norm(z).reshape(-1, z.shape[-1])
        shape = (self.n_heads, *z.shape[:2], -1)
        score = self._heads(self.write_key(flat)) @ jnp.swapaxes(tables.query, 1, 2)
        answer = self._heads(self.write_content(flat)) @ jnp.swapaxes(tables.answer, 1, 2)
        return score.reshape(shape), answer.reshape(shape)

    def _heads(self, x: jax.Array) -> jax.Array:
        """(rows, dim) -> (heads, rows, width)."""
        return jnp.moveaxis(x.reshape(x.shape[0], self.n_heads, self.width), 1, 0)


class LatentBlock(nnx.Module):
    """z + attention(norm(z)), then z + mlp(norm(z)): a transformer block of the latent tokens."""

    def __init__(self, dim: int, n_heads: int, *, rngs: nnx.Rngs) -> None:
        self.n_heads = n_heads
        self.attention_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.query_key = nnx.Linear(dim, 2 * dim, use_bias=False, rngs=rngs)
        self.content = nnx.Linear(dim, dim, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(dim, dim, kernel_init=SMALL, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.down = nnx.Linear(2 * dim, dim, kernel_init=SMALL, rngs=rngs)

    def __call__(self, z: Float[Array, "cells latents dim"]) -> Float[Array, "cells latents dim"]:
        """One block, of every cell by itself."""
        content = self._heads(self.content(self.attention_norm(z)))
        z = z + self.out(jnp.einsum("chlm,cmhw->clhw", self.attention(z), content).reshape(z.shape))
        return z + self.down(jax.nn.gelu(self.up(self.mlp_norm(z))))

    def attention(self, z: Float[Array, "cells latents dim"]) -> Float[Array, "cells heads latents latents"]:
        """Rows sum to 1."""
        query, key = map(self._heads, jnp.split(self.query_key(self.attention_norm(z)), 2, axis=-1))
        return jax.nn.softmax(jnp.einsum("clhw,cmhw->chlm", query, key) / math.sqrt(query.shape[-1]), axis=-1)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.n_heads, -1)
