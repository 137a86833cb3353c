"""Gene regulatory networks: which transcription factors explain which genes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ...errors import DataError
from ...math.regulation import (
    SIGN_SCALE,
    balanced,
    correlations,
    not_itself,
    partial_effects,
    regulator_activity,
    standard_ranks,
    unexplained,
    varying,
)
from ...math.velocity_moments import size_normalized
from ...nn.regulator_attention import RegulatorAttention
from ..base import Config, Data, Operator, checked_counts, nonnegative, positive

FEWEST = 3  # cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRNInferenceConfig(Config):
    """Settings of `DifferentiableGRN`.

    n_tfs: number of regulators.
    n_genes: columns of `counts`, regulators among them.
    hidden_dim: width of the attention layer, per head.
    num_heads: attention heads; each reconstructs all genes alone, at its own price of an edge.
    sparsity_temperature: of the softmax over a gene's regulators; as it goes to 0 each head has one of them.
    sparsity_lambda: mean over the heads of the price of attention, in units of a gene's variance; head h of H pays
        2 h / (H + 1) times as much, so that their mean is one over a path of sparsity.
    ridge: of the partial effects, in units of a gene's variance.
    rank_width: values closer than this share their ranks smoothly, in standard deviations of the gene; as it goes to 0
        correlations are Spearman's.
    normalize: scales the counts of every cell to the median total. False for expression without differences in depth.
    targets_per_step: genes, drawn anew, that a step of training reconstructs where there are more.
    edge_offsets: each edge has a score of its own beside what the layer makes of the evidence. They are learned for
        these cells; a network without them can be carried over to other cells.
    """

    n_tfs: int = positive(100)
    n_genes: int = positive(2000)
    hidden_dim: int = positive(8)
    num_heads: int = positive(4)
    sparsity_temperature: float = positive(1.0)
    sparsity_lambda: float = nonnegative(0.25)
    ridge: float = positive(0.1)
    rank_width: float = positive(0.001)
    normalize: bool = True
    targets_per_step: int = positive(512)
    edge_offsets: bool = True


class Network(TypedDict):
    """What `DifferentiableGRN` adds."""

    grn_matrix: Float[Array, "tfs genes"]  # >= 0; 0 on the regulator itself and on genes that do not vary
    grn_attention: Float[Array, "tfs genes"]  # mean over the heads; a gene's regulators sum to 1 at most
    grn_sign: Float[Array, "tfs genes"]  # -1 represses to 1 activates
    explained_variance: Float[Array, " genes"]  # share of the ranks' variance, mean over the heads
    tf_activity: Float[Array, "cells tfs"]  # mean of the regulator's targets, weighted with sign
    varying_genes: Int[Array, " genes"]  # 0 for genes of one value, which have no edges


class Evidence(NamedTuple):
    """What the cells say, before the attention."""

    z: Float[Array, "cells genes"]  # of the regulators and the drawn genes where some were drawn
    among: Float[Array, "tfs tfs"]
    correlation: Float[Array, "tfs genes"]
    effect: Float[Array, "tfs genes"]
    possible: Bool[Array, "tfs genes"]


class DifferentiableGRN(Operator):
    """Attention of genes over transcription factors that explain them, trained to reconstruct expression.

    Every gene attends to the regulators and to a background by GATv2 (Brody et al. 2022) on the bipartite graph; a
    gene never attends to itself. Edges carry Spearman's correlation and the partial effect given all other
    regulators, with their sizes; nodes carry the means of these sizes. Each head reconstructs the standardised ranks of
    a gene by rho_h sum_i a_ig sign_ig z_i, and pays for attention that is not on the background, each head at its own
    price: as with the path of a lasso, their mean ranks edges by how dear they may become before they go. Expectations
    over cells are exact sums, not samples. `grn_matrix` is the attention over the root of the gene's total
    (`math.regulation.balanced`). Untrained, attention follows random weights; `diffbio.fit(op, data)` trains it.

    A prior network multiplies the odds of an edge; 0 takes it out. Gradients with respect to counts equal finite
    differences. Discrete, outside the gradient: which genes vary, which edges a prior excludes, and the order of the
    cells in each gene, within which the ranks are differentiable. Correlation does not say which of two regulators
    acts on the other: between regulators direction rests on how well each is explained by all others.
    """

    config: GRNInferenceConfig
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 200, "batch_size": 1024, "learning_rate": 2e-2, "validation": 0.0,
    }  # fmt: skip

    def __init__(self, config: GRNInferenceConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention = RegulatorAttention(config.hidden_dim, config.num_heads, rngs=rngs)
        self.log_gain = nnx.Param(jnp.zeros(config.num_heads))
        self.offsets = nnx.data(None)
        if config.edge_offsets:
            self.offsets = nnx.Param(jnp.zeros((config.num_heads, config.n_tfs, config.n_genes)))
        self.rngs = rngs.fork()
        self.fitted = False

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        tf_indices: Int[Array, " tfs"],
        prior_network: Float[Array, "tfs genes"] | None = None,
    ) -> Network:
        """counts: expression, >= 0.

        tf_indices: columns of `counts` that are the regulators.
        prior_network: odds of each edge against an edge of 1; 0 takes it out.

        Raises:
            DataError: where values are known (not under jit): counts that are negative or missing, columns out of
                range or named twice, regulators none of which varies.
        """
        found = self._evidence(counts, tf_indices, prior_network)
        heads = self._heads(found, prior_network)
        attention, sign = heads.mean(axis=0), jnp.tanh(SIGN_SCALE * found.effect)
        weights = balanced(attention)
        return {
            "grn_matrix": weights,
            "grn_attention": attention,
            "grn_sign": sign,
            "explained_variance": 1.0 - self._errors(heads, found).mean(axis=0),
            "tf_activity": regulator_activity(found.z, weights * sign),
            "varying_genes": varying(counts).astype(jnp.int32),
        }

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Mean over heads and genes of the share of variance left, and of the price of the attention.

        In train mode over `targets_per_step` genes drawn at random; what is expected is the same.
        """
        inputs = self._inputs(data)
        prior, drawn = inputs.get("prior_network"), None
        if self.training and self.config.targets_per_step < self.config.n_genes:
            drawn = jax.random.permutation(self.rngs.targets(), self.config.n_genes)[: self.config.targets_per_step]
        found = self._evidence(inputs["counts"], inputs["tf_indices"], prior, drawn)
        heads = self._heads(found, prior, drawn)
        error, spent = self._errors(heads, found).mean(), heads.sum(axis=1).mean(axis=1)
        n_heads = self.config.num_heads
        prices = self.config.sparsity_lambda * 2.0 * jnp.arange(1, n_heads + 1) / (n_heads + 1)
        metrics = {"unexplained": error, "attention_on_regulators": spent.mean()}
        return error + (prices * spent).mean(), metrics

    def _evidence(self, counts: Array, regulators: Array, prior: Array | None, drawn: Array | None = None) -> Evidence:
        """Ranks and what they say of all genes, or of those drawn."""
        who, n_tfs = type(self).__name__, len(regulators)
        checked_counts(who, counts, fix="pass counts or other expression that is not negative")
        self._check_regulators(counts, regulators)
        if prior is not None:
            checked_counts(who, prior, key="prior_network", fix="pass odds")
        expression = size_normalized(counts) if self.config.normalize else counts
        varies = varying(counts)
        possible = not_itself(regulators, counts.shape[1]) & varies & varies[regulators][:, None]
        if prior is not None:
            possible &= prior > 0
        places, picked = regulators, jnp.arange(counts.shape[1])
        if drawn is not None:  # ranks are needed of these and of the regulators only
            expression = expression[:, jnp.concatenate([regulators, drawn])]
            same = regulators[:, None] == drawn
            places = jnp.arange(n_tfs)
            # a regulator that was drawn stands twice: it is explained by the others, as in its first place
            picked = jnp.where(same.any(axis=0), same.argmax(axis=0), n_tfs + jnp.arange(len(drawn)))
            possible = possible[:, drawn]
        z = standard_ranks(expression, self.config.rank_width)
        correlation = correlations(z, places)
        effect = partial_effects(correlation, places, self.config.ridge)
        others = jnp.where(not_itself(places, correlation.shape[1]), correlation, 0.0)
        return Evidence(z, correlation[:, places], others[:, picked], effect[:, picked], possible)

    def _heads(
        self, found: Evidence, prior: Array | None, drawn: Array | None = None
    ) -> Float[Array, "heads tfs genes"]:
        """Attention of each head."""
        config = self.config
        signed = jnp.stack([found.correlation, found.effect], axis=-1)
        size = jnp.abs(signed)
        offset = jnp.zeros((config.num_heads, *found.possible.shape), signed.dtype)
        if self.offsets is not None:
            offset = offset + (self.offsets[...] if drawn is None else self.offsets[...][:, :, drawn])
        if prior is not None:
            odds = prior if drawn is None else prior[:, drawn]
            offset = offset + jnp.log(jnp.where(odds > 0, odds, 1.0))
        evidence = jnp.concatenate([signed, size], axis=-1)
        return self.attention(
            size.mean(axis=1), size.mean(axis=0), evidence, offset, found.possible, config.sparsity_temperature
        )

    def _errors(self, heads: Array, found: Evidence) -> Float[Array, "heads genes"]:
        sign = jnp.tanh(SIGN_SCALE * found.effect)
        gains = jnp.exp(self.log_gain[...])
        return jax.vmap(lambda gain, head: unexplained(gain * head * sign, found.correlation, found.among))(
            gains, heads
        )

    def _check_regulators(self, counts: Array, regulators: Array) -> None:
        if isinstance(regulators, jax.core.Tracer):
            return
        who, rows = type(self).__name__, np.asarray(regulators)
        odd = rows[(rows < 0) | (rows >= counts.shape[1])]
        if odd.size:
            msg = f"{who}: data['tf_indices'] holds {odd[0]}, but columns of counts go from 0 to {counts.shape[1] - 1}."
            raise DataError(msg)
        values, times = np.unique(rows, return_counts=True)
        if (times > 1).any():
            msg = f"{who}: data['tf_indices'] holds {values[times > 1][0]} more than once; name each regulator once."
            raise DataError(msg)
        if isinstance(counts, jax.core.Tracer):
            return
        own = np.asarray(counts)[:, rows]  # numpy: jit traces constants too
        if len(own) < FEWEST:
            msg = f"{who}: data['counts'] has {len(own)} cells; {FEWEST} at least are needed to see what goes together."
            raise DataError(msg)
        if not (own != own[:1]).any():
            msg = f"{who}: no regulator has two different values in data['counts'], so that none can explain a gene; "
            msg += "pass other regulators or more cells."
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableGRN", Data]]:
        """Two regulators of five genes, with a prior and without."""
        keys = jax.random.split(jax.random.key(1), 3)
        n_cells = 16
        drive = jnp.exp(0.6 * jax.random.normal(keys[0], (n_cells, 2)))
        first, second = drive.T
        genes = jnp.stack([first, second, 2 * first, 1 / second, first * second], axis=1)
        counts = 10.0 * genes + jax.random.uniform(keys[1], genes.shape)
        data: Data = {"counts": counts, "tf_indices": jnp.arange(2)}
        prior = 0.5 + jax.random.uniform(keys[2], (2, 5))

        def op(**settings: Any) -> DifferentiableGRN:
            config = GRNInferenceConfig(
                n_tfs=2, n_genes=5, hidden_dim=3, rank_width=0.5, targets_per_step=3, **settings
            )
            return cls(config, rngs=nnx.Rngs(0))

        return {
            "with a prior": (op(num_heads=2), data | {"prior_network": prior}),
            "carried over": (op(num_heads=1, edge_offsets=False, normalize=False, sparsity_temperature=0.5), data),
        }
