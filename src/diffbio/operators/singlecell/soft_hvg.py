"""Highly variable genes as gates that have a gradient."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError, MissingKeyError
from ...math.soft import hard_rank, soft_rank, soft_top_k, stochastic_gate, straight_through, top_k_mask
from ...math.variance_trend import standardized_variance
from ..base import Config, Data, Operator, checked_counts, one_of, positive, setting

SMALLEST = 1e-6  # score below which genes are told apart no more
FEWEST = 3  # cells of a batch that votes
SPAN, SOFTNESS = 0.3, 0.1
SIGMA = 0.5  # noise of the stochastic gates, as in Yamada et al. 2020


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftHVGConfig(Config):
    """Settings of `SoftHVGSelector`.

    n_genes: width of the counts.
    n_top_genes: how many genes the top-k gates add up to, and stochastic ones start with; all where there are fewer.
    n_batches: of `batch_labels`.
    flavor: "seurat_v3" scores a gene by its variance over that which a loess expects of its mean; "dispersion" by
        variance over mean.
    span: fraction of the genes in each window of the loess of "seurat_v3".
    softness: width of the border between chosen and left out, relative to the score (with batches, to the rank); 0+
        is the hard choice. Stochastic gates have it only in the ranks of batches.
    hard: gates of exactly 0 and 1, with the gradient of the soft ones.
    gates: "top_k" gates follow from the scores; "stochastic" are weights of their own with noise in training.
    sigma: sd of the noise of stochastic gates in training.
    """

    n_genes: int = positive(2000)
    n_top_genes: int = positive(2000)
    n_batches: int = positive(1)
    flavor: str = one_of("seurat_v3", "dispersion")
    span: float = setting(SPAN, "in (0, 1]", lambda v: 0 < v <= 1)
    softness: float = positive(SOFTNESS)
    hard: bool = False
    gates: str = one_of("top_k", "stochastic")
    sigma: float = positive(SIGMA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gates == "top_k" and self.sigma != SIGMA:
            msg = f"SoftHVGConfig.sigma is for gates='stochastic'; it is {self.sigma} with gates='top_k'."
            raise ConfigError(msg)
        if self.gates == "stochastic" and self.hard:
            msg = "SoftHVGConfig.hard is for gates='top_k'; stochastic gates reach 0 and 1 by training."
            raise ConfigError(msg)
        if self.gates == "stochastic" and self.softness != SOFTNESS and self.n_batches == 1:
            msg = f"SoftHVGConfig.softness is for gates='top_k' or batches; it is {self.softness} with stochastic "
            msg += "gates of one batch."
            raise ConfigError(msg)
        if self.flavor == "dispersion" and self.span != SPAN:
            msg = f"SoftHVGConfig.span is for flavor='seurat_v3'; it is {self.span} with flavor='dispersion'."
            raise ConfigError(msg)


class VariableGenes(TypedDict):
    """What `SoftHVGSelector` adds."""

    hvg_weights: Float[Array, " genes"]  # gate of each gene, in [0, 1]; top-k gates sum to n_top_genes
    # standardised variance, or variance over mean for "dispersion"; mean over batches that vote, times gene_weights
    hvg_scores: Float[Array, " genes"]


class SoftHVGSelector(Operator):
    """Gates the most variable genes, n_top_genes in sum; Seurat v3's choice as softness -> 0.

    Scores are the standardised variances of Stuart et al. 2019 (`math.variance_trend`) or dispersions (see `flavor`),
    and gates sigmoid((log score_i - t) / softness) with t such that they sum to n_top_genes. With batches, a gene is
    placed by the median of its ranks over the batches in which it is among the top ones, then by the number of those,
    as in Seurat and scanpy; ranks are smooth (`math.soft.soft_rank`). Batches of fewer than 3 cells do not vote.
    `hard=True` picks the genes of `scanpy.pp.highly_variable_genes(flavor="seurat_v3")`; equal genes, which scanpy's
    sort leaves in no order, are taken from the left.

    With gates="stochastic" each gene has a weight mu; its gate is clip(mu + sigma noise, 0, 1) in training and
    clip(mu, 0, 1) otherwise (STG, Yamada et al. 2020), so that a task can decide about the genes. `objective` is the
    price of the expected number of open gates at the score of the last gene that belongs to the top ones: its
    optimum opens those. These gates do not sum to anything given.
    """

    config: SoftHVGConfig
    fit_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 4096, "learning_rate": 0.02, "max_epochs": 50}
    init_cells: ClassVar[int | None] = 50_000

    def __init__(self, config: SoftHVGConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.mu: nnx.Param[Array] | None = nnx.data(None)
        self.noise: Any = nnx.data(None)
        if config.gates == "stochastic":
            self.mu = nnx.Param(jnp.full(config.n_genes, 0.5))
            self.noise = rngs.fork()
            self.fitted = False

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        batch_labels: Int[Array, " cells"] | None = None,
        gene_weights: Float[Array, " genes"] | None = None,
    ) -> VariableGenes:
        """gene_weights: factors of the scores before genes are ranked: above 1 favours a gene; None is 1.

        Raises:
            DataError: counts or weights that are negative or not finite, labels out of range, or fewer than 3 cells in
                every batch; under jit, where values are not known, they pass.
            MissingKeyError: n_batches > 1 without batch_labels.
        """
        scores, place = self._scores_and_places(counts, batch_labels, gene_weights)
        return {"hvg_weights": self._gates(place), "hvg_scores": scores}

    def init_from(self, data: Data) -> None:
        """Opens the stochastic gates of the genes chosen on `data`, closes the others."""
        if self.mu is None:
            return
        inputs = {key: jnp.asarray(value) for key, value in self._inputs(data).items()}
        _, place = self._scores_and_places(**inputs)
        self.mu[...] = top_k_mask(place, self._n_top()).astype(self.mu[...].dtype)

    @property
    def objective(self) -> Callable[..., tuple[Array, dict[str, Array]]]:
        """Of stochastic gates, see the class; top-k gates have nothing to train."""
        if self.mu is None:
            msg = "SoftHVGSelector: gates='top_k' has nothing to train."
            raise AttributeError(msg)
        return self._objective

    def _objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Mean over the n_top_genes places of P(open) (log score at the border - log score)."""
        assert self.mu is not None
        _, place = self._scores_and_places(**self._inputs(data))
        top = self._n_top()
        ordered = jnp.sort(place)[::-1]
        border = (ordered[top - 1] + ordered[min(top, len(ordered) - 1)]) / 2
        _, is_open = stochastic_gate(self.mu[...].astype(place.dtype), self.config.sigma)
        return (is_open * (border - place)).sum() / top, {"open_gates": is_open.sum()}

    def _gates(self, place: Float[Array, " genes"]) -> Float[Array, " genes"]:
        if self.mu is not None:
            key = self.noise.noise() if self.training else None
            return stochastic_gate(self.mu[...].astype(place.dtype), self.config.sigma, key)[0]
        soft = soft_top_k(place, self._n_top(), self.config.softness)
        return straight_through(top_k_mask(place, self._n_top()), soft) if self.config.hard else soft

    def _scores_and_places(
        self, counts: Array, batch_labels: Array | None = None, gene_weights: Array | None = None
    ) -> tuple[Array, Array]:
        """Scores, and a number per gene by which they are ordered, on the scale of `softness`."""
        if counts.shape[0] < FEWEST:
            msg = f"SoftHVGSelector: data['counts'] has {counts.shape[0]} cells; variable genes need {FEWEST}."
            raise DataError(msg)
        counts = checked_counts("SoftHVGSelector", counts)
        if gene_weights is not None:
            checked_counts("SoftHVGSelector", gene_weights, key="gene_weights", fix="pass 0 to leave a gene out")
        factor = jnp.ones(counts.shape[1], counts.dtype) if gene_weights is None else gene_weights
        self._check_labels(batch_labels)
        if batch_labels is None or self.config.n_batches == 1:
            scores = self._scores(counts, None) * factor
            return scores, _log(scores)
        members = [(batch_labels == b).astype(counts.dtype) for b in range(self.config.n_batches)]
        votes = jnp.stack([m.sum() >= FEWEST for m in members]).astype(counts.dtype)
        scores = jnp.stack([self._scores(counts, m) * factor for m in members])
        places = self._places(_log(scores), votes)
        mean = (votes[:, None] * scores).sum(axis=0) / jnp.maximum(votes.sum(), 1.0)
        return mean, places

    def _places(self, logs: Float[Array, "batches genes"], votes: Float[Array, " batches"]) -> Float[Array, " genes"]:
        """-log(1 + median rank over the batches in which the gene is among the top ones)."""
        if self.config.hard:
            ranks = jax.vmap(hard_rank)(logs).astype(logs.dtype)
            soft = jax.vmap(soft_rank, (0, None))(logs, self.config.softness)
            ranks = straight_through(ranks, soft)
        else:
            ranks = jax.vmap(soft_rank, (0, None))(logs, self.config.softness)
        n_genes = logs.shape[1]
        top = (jax.lax.stop_gradient(ranks) < self._n_top()) & (votes[:, None] > 0)
        n_top = top.sum(axis=0)
        ordered = jnp.sort(jnp.where(top, ranks, 2.0 * n_genes), axis=0)
        middle = jnp.stack([jnp.maximum(n_top - 1, 0) // 2, n_top // 2])
        middle = jnp.minimum(middle, logs.shape[0] - 1)
        median = jnp.take_along_axis(ordered, middle, axis=0).mean(axis=0)
        best = jnp.where(votes[:, None] > 0, ranks, n_genes).min(axis=0)
        median = jnp.where(n_top > 0, median, n_genes + best)
        # ranks of medians are 1/2 apart: where they are equal, the number of batches decides
        return -jnp.log1p(jnp.maximum(median + 0.25 * (1 - n_top / logs.shape[0]), 0.0))

    def _scores(self, counts: Array, member: Array | None) -> Array:
        if self.config.flavor == "seurat_v3":
            return standardized_variance(counts, weight=member, span=self.config.span)
        weight = jnp.ones(counts.shape[0], counts.dtype) if member is None else member
        n = jnp.maximum(weight.sum(), 2.0)
        mean = (weight[:, None] * counts).sum(axis=0) / n
        variance = (weight[:, None] * (counts - mean) ** 2).sum(axis=0) / (n - 1)
        return jnp.where(mean > 0, variance / jnp.where(mean > 0, mean, 1.0), 0.0)

    def _check_labels(self, batch_labels: Array | None) -> None:
        n_batches = self.config.n_batches
        if batch_labels is None:
            if n_batches > 1:
                msg = f"SoftHVGSelector needs data['batch_labels'], since n_batches is {n_batches}."
                raise MissingKeyError(msg)
        elif not isinstance(batch_labels, jax.core.Tracer):
            labels = np.asarray(batch_labels)
            highest, lowest = int(labels.max()), int(labels.min())
            if highest >= n_batches or lowest < 0:
                wrong = highest if highest >= n_batches else lowest
                msg = f"SoftHVGSelector: data['batch_labels'] holds {wrong}, but n_batches is {n_batches}; number the "
                msg += f"batches from 0 and pass n_batches={max(highest, 0) + 1}."
                raise DataError(msg)
            sizes = np.bincount(labels, minlength=n_batches)
            if sizes.max() < FEWEST:
                msg = f"SoftHVGSelector: {len(labels)} cells in {np.count_nonzero(sizes)} batches: none has "
                msg += f"the {FEWEST} cells needed to find variable genes; merge batches."
                raise DataError(msg)

    def _n_top(self) -> int:
        return min(self.config.n_top_genes, self.config.n_genes)

    @classmethod
    def examples(cls) -> dict[str, tuple["SoftHVGSelector", Data]]:
        """One batch; two batches with weights of the genes; stochastic gates."""
        rng = np.random.default_rng(0)
        mean = rng.lognormal(0.5, 1, 14)
        # not whole: where two genes have equal means their order, and with it the partition, is not smooth
        counts = jnp.asarray(rng.poisson(mean * rng.gamma(2, 0.5, (20, 14))) * rng.uniform(0.8, 1.2, 14), jnp.float32)
        labels = jnp.arange(20) % 2

        def op(**settings: Any) -> SoftHVGSelector:
            return cls(SoftHVGConfig(n_genes=14, n_top_genes=5, span=0.7, **settings), rngs=nnx.Rngs(0))

        weights = jnp.linspace(0.8, 1.2, 14)
        return {
            "top_k": (op(), {"counts": counts}),
            "batches": (op(n_batches=2), {"counts": counts, "batch_labels": labels, "gene_weights": weights}),
            "stochastic": (op(gates="stochastic"), {"counts": counts}),
        }


def _log(scores: Array) -> Array:
    return jnp.log(jnp.maximum(scores, SMALLEST))
