"""Denoising and imputation of counts by a transformer over genes, trained to predict molecules that it does not see."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from scipy.sparse.linalg import svds

from ...errors import ConfigError
from ...losses.molecular_cv import split_molecules
from ...math.blocks import sum_in_blocks
from ...math.distributions import nb_log_prob, poisson_log_prob
from ...nn.count_vae import log_positive, moments
from ...nn.gene_transformer import GeneTables, GeneTransformer
from ..base import Config, Data, Operator, checked_counts, fraction, one_of, positive

BLOCK_CELLS = 8  # at a time: their (latents, genes) of every head stay in the cache
LARGEST_START = 8.0  # of an entry of a gene's embedding, in standard deviations over genes
FIRST_CELLS = 256  # enough for means over cells of what the latent tokens read


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerDenoiserConfig(Config):
    """Settings of `DifferentiableTransformerDenoiser`.

    n_genes: width of the counts.
    hidden_dim: width of the tokens; a multiple of num_heads.
    num_heads: of every attention.
    num_layers: transformer blocks of the latent tokens; 0 lets genes read what the latent tokens read.
    num_latents: latent tokens that stand between genes and genes; time and memory are linear in it.
    mask_ratio: chance of a gene of a cell to be hidden altogether in training.
    thinning: share of the molecules of the other genes that is held out in training; 0 is masking alone.
    likelihood: 'nb', where a gene's own count speaks beside its context, as much as its dispersion says; or
        'poisson', where rates are those of the context.
    """

    n_genes: int = positive(2000)
    hidden_dim: int = positive(64)
    num_heads: int = positive(4)
    num_layers: int = positive(2)
    num_latents: int = positive(8)
    mask_ratio: float = fraction(0.15)
    thinning: float = fraction(0.2)
    likelihood: str = one_of("nb", "poisson")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % self.num_heads:
            msg = (
                f"TransformerDenoiserConfig.hidden_dim must be a multiple of num_heads ({self.num_heads}), "
                f"got {self.hidden_dim}."
            )
            raise ConfigError(msg)
        if not (self.mask_ratio or self.thinning):
            msg = "TransformerDenoiserConfig.mask_ratio and thinning are both 0: nothing is held out to learn from."
            raise ConfigError(msg)


class Denoised(TypedDict):
    """What `DifferentiableTransformerDenoiser` adds."""

    imputed_counts: Float[Array, "cells genes"]


class DifferentiableTransformerDenoiser(Operator):
    """Expected counts of every gene from the other genes of the cell, by attention, and from its own count.

    A transformer over gene tokens (`nn.gene_transformer`) predicts how the cell's context moves each gene's share of
    molecules from its mean profile. With rate mu_g = depth * share_g and x_g seen molecules, the expected count is the
    posterior mean of a gamma-distributed rate of mean mu_g and inverse dispersion theta_g,

        mu_g (theta_g + x_g) / (theta_g + mu_g)

    so that genes which vary more than their context explains keep more of their own count; a Poisson likelihood is the
    limit theta -> infinity, mu_g. depth makes the seen molecules as many as expected.

    Training needs counts alone. Each pass hides some genes of each cell (`mask_ratio`, as masked language models do)
    and holds out some molecules of the others (`thinning`: Batson et al. 2019, Batson & Royer 2019); the loss is the
    negative log-likelihood of the held-out molecules given the seen ones, the gamma rate integrated out: a negative
    binomial, exact for both kinds. Drawn anew in train mode, from one fixed key in eval mode.

    `mask` (cells, genes): True, or 1, where a count is missing. Missing counts are replaced by mu_g from the genes that
    are there, whatever stands in their place, and all others are returned as they are. Without `mask` every count is
    replaced by its expectation. A cell in which nothing is seen is given one molecule of the mean profile.
    """

    config: TransformerDenoiserConfig
    init_cells: ClassVar[int | None] = 4096
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 40, "batch_size": 128, "learning_rate": 3e-3, "patience": 8,
    }

    def __init__(self, config: TransformerDenoiserConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.network = GeneTransformer(
            config.n_genes,
            config.hidden_dim,
            n_heads=config.num_heads,
            n_layers=config.num_layers,
            n_latents=config.num_latents,
            rngs=rngs,
        )
        self.log_profile = nnx.Param(jnp.zeros(config.n_genes))
        self.log_theta = nnx.data(nnx.Param(jnp.zeros(config.n_genes)) if config.likelihood == "nb" else None)
        self.held_out = rngs.noise.fork()

    def __call__(
        self, counts: Float[Array, "cells genes"], mask: Bool[Array, "cells genes"] | None = None
    ) -> Denoised:
        """Denoises all counts, or fills in those that `mask` says are missing.

        Raises:
            DataError: a count that is there is negative or missing, where values are known (not under jit).
        """
        if not isinstance(mask, jax.core.Tracer):
            present = counts if mask is None else jnp.where(mask, 0.0, counts)
            checked_counts("DifferentiableTransformerDenoiser", present, fix="say by `mask` which counts are missing")
        tables = self.network.tables()
        if mask is None:

            def denoised(x: jax.Array) -> jax.Array:
                return jnp.exp(self._expect(tables, x, jnp.ones_like(x)).log_rate)

            return {"imputed_counts": _by_blocks(denoised, counts)}

        def filled(x: jax.Array, mask: jax.Array) -> jax.Array:
            seen = jnp.where(mask, 0.0, x)
            context = self._expect(tables, seen, jnp.where(mask, 0.0, 1.0).astype(x.dtype))
            return jnp.where(mask, jnp.exp(context.log_rate), x)

        return {"imputed_counts": _by_blocks(filled, counts, mask)}

    def objective(self, data: Data) -> tuple[jax.Array, dict[str, jax.Array]]:
        """-log p(held-out molecules | seen molecules), summed over genes, mean over cells.

        `mask`, if the data has one, says which counts are missing: they are neither seen nor predicted.
        """
        inputs = self._inputs(data)
        counts, mask = inputs["counts"], inputs.get("mask")
        seen, held_out, visible = self._hold_out(counts, mask)
        parts: tuple[Any, ...] = nnx.split(self, nnx.Param, ...)
        graph, params, rest = parts

        def loss(shared: Any, block: Any) -> jax.Array:
            tables, params = shared
            seen, held_out, visible, predicted = block
            op = nnx.merge(graph, params, rest)
            rate = op._expect(tables, seen, visible)
            asked = predicted & (visible < 1.0)
            # of the molecules that the rate is about, those that are not visible
            log_mean = rate.log_rate + jnp.log(jnp.where(asked, 1.0 - visible, 1.0))
            if op.log_theta is None:
                log_prob = poisson_log_prob(held_out, log_mean)
            else:
                log_prob = nb_log_prob(held_out, log_mean, rate.log_theta)
            return -jnp.where(asked, log_prob, 0.0).sum()

        predicted = jnp.ones(counts.shape, bool) if mask is None else ~mask
        rows, shared = (seen, held_out, visible, predicted), (self.network.tables(), params)
        if counts.shape[0] <= BLOCK_CELLS:
            return loss(shared, rows) / counts.shape[0], {}
        return sum_in_blocks(loss, shared, tuple(_blocks(x) for x in rows)) / counts.shape[0], {}

    def init_from(self, data: Data) -> None:
        """Starts at the mean profile, at theta by moments and at gene embeddings that are principal components.

        Embeddings: loadings of the Pearson residuals of the gene shares, in half of the tokens' width.
        """
        counts = np.asarray(data["counts"], np.float32)
        mask = data.get("mask")
        if mask is not None:
            counts = np.where(np.asarray(mask, bool), 0.0, counts).astype(np.float32)
        profile, theta = moments(counts, counts.sum(-1))
        _set(self.log_profile, np.log(profile))
        if self.log_theta is not None:
            _set(self.log_theta, np.log(theta))
        embedding = np.array(self.network.embedding[...])
        loadings = _loadings(counts, profile, self.config.hidden_dim // 2)
        n = loadings.shape[1]
        embedding[:, :n] = np.clip(loadings, -LARGEST_START, LARGEST_START)
        embedding[:, n:] *= 0.3
        _set(self.network.embedding, embedding)
        first = jnp.asarray(counts[:: max(1, len(counts) // FIRST_CELLS)][:FIRST_CELLS])
        tables = self.network.tables()
        content = _by_blocks(lambda x: self.network.read(tables, x, jnp.ones(x.shape, bool)), first)
        spread = content.std(0)
        _set(self.network.read_center, content.mean(0))
        _set(self.network.read_scale, jnp.where(spread > 0, 1.0 / jnp.where(spread > 0, spread + 1e-4, 1.0), 1.0))

    def gene_attention(self, data: Data) -> Float[Array, "genes genes"]:
        """How much each gene (row) looks at each gene (column) through all layers, mean over cells; rows sum to 1."""
        inputs = self._inputs(data)
        counts, mask = inputs["counts"], inputs.get("mask")
        tables = self.network.tables()
        visible = jnp.ones(counts.shape, bool) if mask is None else ~mask

        def add(total: jax.Array, cell: Any) -> tuple[jax.Array, None]:
            x, visible = (part[None] for part in cell)
            return total + self.network.gene_attention(tables, x, visible)[0], None

        n_genes = self.config.n_genes
        total = jax.lax.scan(add, jnp.zeros((n_genes, n_genes), counts.dtype), (counts, visible))[0]
        return total / counts.shape[0]

    def _expect(self, tables: GeneTables, seen: jax.Array, visible: jax.Array) -> "Rate":
        """The rate of every gene given the seen molecules, of which `visible` is the share that could be seen."""
        context = self.log_profile[...] + self.network(tables, seen, visible > 0)
        log_share = jax.nn.log_softmax(context, axis=-1)
        could_be_seen = (visible * jnp.exp(log_share)).sum(-1)
        log_depth = log_positive(seen.sum(-1)) - log_positive(could_be_seen)
        log_mu = log_share + log_depth[:, None]
        if self.log_theta is None:
            return Rate(log_mu, None)
        theta = jnp.exp(self.log_theta[...])
        updated = jnp.log(theta + seen)
        return Rate(log_mu + updated - jnp.log(theta + visible * jnp.exp(log_mu)), updated)

    def _hold_out(self, counts: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Seen and held-out molecules, and the share of each gene's molecules that could be seen."""
        config = self.config
        # in eval mode the same molecules every time, so that losses compare
        key = self.held_out() if self.training else self.held_out.key[...]
        hide_key, thin_key = jax.random.split(key)
        hidden = jax.random.bernoulli(hide_key, config.mask_ratio, counts.shape)
        hidden = hidden if mask is None else hidden | mask
        visible = jnp.where(hidden, 0.0, 1.0 - config.thinning).astype(counts.dtype)
        kept = split_molecules(counts, 1.0 - config.thinning, thin_key)[0] if config.thinning else counts
        seen = jnp.where(hidden, 0.0, kept)
        return seen, counts - seen, visible

    def _inputs(self, data: Data) -> dict[str, jax.Array]:
        """A mask of zeros and ones is welcome."""
        mask = data.get("mask")
        if isinstance(mask, jax.Array | np.ndarray) and jnp.issubdtype(mask.dtype, jnp.number):
            data = {**data, "mask": jnp.asarray(mask) != 0}
        return super()._inputs(data)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableTransformerDenoiser", Data]]:
        """Denoising by either likelihood, and imputation of missing counts."""
        keys = jax.random.split(jax.random.key(0), 3)
        rates = jax.random.gamma(keys[0], 1.0, (8, 8)) * 3.0
        counts = jax.random.poisson(keys[1], rates).astype(jnp.float32)
        mask = jax.random.bernoulli(keys[2], 0.2, counts.shape)

        def op(**settings: Any) -> DifferentiableTransformerDenoiser:
            config = TransformerDenoiserConfig(
                n_genes=8, hidden_dim=8, num_heads=2, num_layers=1, num_latents=3, mask_ratio=0.5, **settings
            )
            return cls(config, rngs=nnx.Rngs(0))

        return {
            "negative binomial": (op(), {"counts": counts}),
            "missing counts, Poisson": (op(likelihood="poisson"), {"counts": counts, "mask": mask}),
        }


class Rate(NamedTuple):
    """Of every gene in a cell: its expected rate, and the inverse dispersion of what is not known of it."""

    log_rate: jax.Array
    log_theta: jax.Array | None  # None: the rate is known


def _blocks(x: jax.Array) -> jax.Array:
    """(cells, ...) -> (blocks, BLOCK_CELLS, ...), filled up with rows of which nothing is asked."""
    missing = -x.shape[0] % BLOCK_CELLS
    fill = jnp.ones if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros
    return jnp.concatenate([x, fill((missing, *x.shape[1:]), x.dtype)]).reshape(-1, BLOCK_CELLS, *x.shape[1:])


def _by_blocks(function: Any, *rows: jax.Array) -> jax.Array:
    """`function` of all cells, a block at a time, so that its memory does not grow with their number."""
    if rows[0].shape[0] <= BLOCK_CELLS:
        return function(*rows)
    blocks = tuple(_blocks(x) for x in rows)
    # the backward pass computes a block anew instead of keeping it
    out = jax.lax.map(jax.checkpoint(lambda block: function(*block)), blocks)
    return out.reshape(-1, *out.shape[2:])[: rows[0].shape[0]]


def _loadings(counts: np.ndarray, profile: np.ndarray, n: int) -> np.ndarray:
    """Principal loadings of Pearson residuals, (genes, at most n), of variance 1 over genes; signs fixed."""
    library = np.maximum(counts.sum(1, keepdims=True), 1.0)
    residual = ((counts - library * profile) / np.sqrt(library * profile)).astype(np.float32)
    n = min(n, min(residual.shape) - 1)
    if n < 1 or not residual.any():
        return np.zeros((counts.shape[1], 0), np.float32)
    start = np.ones(min(residual.shape), np.float32)
    _, values, loadings = svds(residual, k=n, v0=start, random_state=0)
    loadings = loadings[np.argsort(-values)]
    largest = np.abs(loadings).argmax(1)
    signs = np.sign(np.take_along_axis(loadings, largest[:, None], axis=1))
    return (loadings * signs).T * np.sqrt(counts.shape[1])


def _set(param: nnx.Param[jax.Array], value: Any) -> None:
    param.set_value(jnp.asarray(value, param[...].dtype))
