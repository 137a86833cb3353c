"""Differential distributions (scDD, waddR): whether and how a gene's values differ between two conditions."""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import DataError, MissingKeyError
from ...math.distribution_patterns import evidence_and_patterns
from ...math.ranking import benjamini_hochberg
from ...math.two_sample_weights import overlap_weights, zeros_ratio
from ...math.two_samples import least_share, mmd, null_mmd, null_wasserstein, permutation_share, wasserstein
from ..base import Config, Data, Operator, checked_finite, one_of, positive, setting

WHO = "DifferentiableDifferentialDistribution"
FEWEST = 5  # cells of a condition
ZERO = 1e-4  # log expression up to here, on both sides of 0, is a zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialDistributionConfig(Config):
    """Settings of `DifferentiableDifferentialDistribution`.

    n_genes: columns of the expression.
    statistic: "wasserstein" (squared Wasserstein-2 distance) or "mmd" (unbiased MMD² with a Gaussian kernel).
    n_permutations: of the cells' conditions.
    tail: whether p-values below a fortieth go on exponentially, beyond 1 / (n_permutations + 1).
    n_pattern_classes: the first so many of DE, DP, DM, DB (these are scDD's), DV (spread), DZ (zeros).
    """

    n_genes: int = positive(2000)
    statistic: str = one_of("wasserstein", "mmd")
    n_permutations: int = setting(1000, ">= 19", lambda v: v >= 19)
    tail: bool = True
    n_pattern_classes: int = setting(6, "from 4 to 6", lambda v: 4 <= v <= 6)


class Distributions(TypedDict):
    """What `DifferentiableDifferentialDistribution` adds."""

    statistics: Float[Array, " genes"]
    location: Float[Array, " genes"]  # part of the squared Wasserstein distance: squared difference of means
    size: Float[Array, " genes"]  # of standard deviations
    shape: Float[Array, " genes"]  # the rest
    mean_differences: Float[Array, " genes"]  # second condition less first
    zero_statistics: Float[Array, " genes"]  # twice the log likelihood ratio of other shares of zeros
    p_values: Float[Array, " genes"]
    q_values: Float[Array, " genes"]  # Benjamini & Hochberg
    zero_p_values: Float[Array, " genes"]  # of the shares of zeros alone
    pattern_logits: Float[Array, "genes pattern_classes"]  # log evidence over no difference
    pattern_labels: Int[Array, " genes"]  # numbers of the largest


class DifferentiableDifferentialDistribution(Operator):
    """Tests whether each gene's distribution differs between two conditions, and names the way it differs.

    The test is by permutation of the conditions, with the squared Wasserstein-2 distance (Schefzik et al. 2021,
    Bioinformatics 37:3204, waddR) or MMD² (Gretton et al. 2012). Values are sorted once; a permutation of cells is one
    of ranks, whose transport plan serves all genes, so all genes have the same permutations. Zeros are tested apart,
    by logistic regression, as in scDD (Korthauer et al. 2016, Genome Biology 17:222). For patterns see
    `math.distribution_patterns`: where scDD compares numbers and means of components that are fitted to each condition
    alone, models of both conditions are compared here.

    With `library_size`, cells are weighted so that both conditions have the same library sizes
    (`math.two_sample_weights.overlap_weights`), and the test of zeros has it as covariate: what follows from sequencing
    deeper is no difference. Where conditions hardly overlap in library size, little power is left, which is honest.

    Conditions may be soft: a cell counts in each by its weight, and weights of 0 and 1 give the tests of labels.
    Gradients flow to expression and to soft conditions; which values are zeros, their order, and the components'
    order are decided outside of them. Where values tie, the gradient is that of one order. There are no weights.
    """

    config: DifferentialDistributionConfig
    rough_out = {  # noqa: RUF012
        "p_values": "a share of permutations is a count; `statistics` has the gradient",
        "q_values": "ranks of p-values",
        "zero_p_values": "its slope is infinite where there is no difference; `zero_statistics` has the gradient",
    }

    def __init__(self, config: DifferentialDistributionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # one draw per operator: the same data get the same p-values
        self.seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        condition_labels: Int[Array, " cells"] | None = None,
        condition_weights: Float[Array, "cells conditions"] | None = None,
        library_size: Float[Array, " cells"] | None = None,
    ) -> Distributions:
        """counts: log expression, as log(1 + x) of counts of equal totals.

        condition_labels: 0 and 1.
        condition_weights: in their place, soft: two columns, at least 0; a cell's weights need not sum to 1.
        library_size: total counts, above 0; see above.

        Raises:
            MissingKeyError: neither labels nor weights.
            DataError: both; conditions that are not two; and where values are known (not under jit): fewer than 5
                cells in a condition, or values that are missing or out of range.
        """
        config = self.config
        checked_finite(WHO, counts, key="counts")
        first, second = memberships(counts, condition_labels, condition_weights)
        if library_size is None:
            covariate = jnp.zeros_like(first)
            a, b = first, second
        else:
            checked_finite(WHO, library_size, key="library_size", lowest=1e-9, fix="leave out empty cells")
            covariate = jnp.log(jnp.maximum(library_size, 1e-9))
            a, b = overlap_weights(first, second, covariate)
        order = jnp.argsort(jax.lax.stop_gradient(counts), axis=0)
        values = jnp.take_along_axis(counts, order, axis=0)
        parts = wasserstein(values, a[order], b[order])
        statistics = parts.total if config.statistic == "wasserstein" else mmd(values, a[order], b[order])
        varies = jax.lax.stop_gradient(values[-1] > values[0])
        p_values = jnp.where(varies, self._pvalues(values, statistics, a, b), 1.0)
        seen = (jnp.abs(jax.lax.stop_gradient(counts)) > ZERO).astype(counts.dtype)
        share = second / jnp.maximum(first + second, 1e-12)
        zeros = zeros_ratio(seen, share, covariate)
        logits = self._patterns(counts, seen, a, b, zeros)
        return {
            "statistics": statistics,
            "location": parts.location,
            "size": parts.size,
            "shape": parts.shape,
            "mean_differences": weighted_mean(counts, b) - weighted_mean(counts, a),
            "zero_statistics": zeros,
            "p_values": p_values,
            "q_values": benjamini_hochberg(p_values),
            "zero_p_values": jax.scipy.special.erfc(jnp.sqrt(jax.lax.stop_gradient(zeros) / 2)),
            "pattern_logits": logits,
            "pattern_labels": jnp.argmax(logits, axis=1).astype(jnp.int32),
        }

    def _pvalues(self, values: Array, statistics: Array, first: Array, second: Array) -> Array:
        config, n = self.config, len(values)
        values, statistics, first, second = jax.lax.stop_gradient((values, statistics, first, second))
        # from one order of the weights, so that the order of the cells does not show
        dealt = jnp.lexsort((first, second))
        keys = jax.random.split(jax.random.key(self.seed[...]), config.n_permutations)
        orders = jax.vmap(lambda key: jax.random.permutation(key, n))(keys)
        null = null_wasserstein if config.statistic == "wasserstein" else null_mmd
        found = null(values, first[dealt], second[dealt], orders)
        return permutation_share(statistics, found, tail=config.tail, least=least_share(values))

    def _patterns(self, counts: Array, seen: Array, first: Array, second: Array, zeros: Array) -> Array:
        n_cells = first.sum() + second.sum()
        gains = 0.5 * zeros - 0.5 * jnp.log(n_cells)
        weights = jnp.stack([first[:, None] * seen, second[:, None] * seen], axis=1)
        found = evidence_and_patterns(counts.T, weights.T, gains)
        return found[:, : self.config.n_pattern_classes]

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableDifferentialDistribution", Data]]:
        """Genes that differ in mean, in spread and by a second component: labels, and soft conditions."""
        keys = jax.random.split(jax.random.key(2), 3)
        labels = jnp.arange(40) % 2
        noise = jax.random.normal(keys[0], (40, 3))
        far = (jax.random.uniform(keys[1], (40,)) < 0.5) * labels
        counts = noise * jnp.stack([jnp.ones(40), 1.0 + 2.0 * labels, jnp.full(40, 0.7)], axis=1)
        counts = counts + 4.0 + jnp.stack([1.5 * labels, jnp.zeros(40), 4.0 * far], axis=1)
        share = jnp.clip(labels + 0.2 * jax.random.normal(keys[2], (40,)), 0.1, 0.9)

        def op(**settings: Any) -> DifferentiableDifferentialDistribution:
            config = DifferentialDistributionConfig(n_genes=3, n_permutations=50, **settings)
            return cls(config, rngs=nnx.Rngs(0))

        soft = {"counts": counts, "condition_weights": jnp.stack([1 - share, share], axis=1)}
        soft |= {"library_size": 1000.0 + 100.0 * share + 200.0 * (jnp.arange(40) % 7)}
        return {
            "labels": (op(), {"counts": counts, "condition_labels": labels}),
            "soft": (op(statistic="mmd", n_pattern_classes=5), soft),
        }


def memberships(counts: Array, labels: Array | None, weights: Array | None) -> tuple[Array, Array]:
    """How much each cell counts in the first and in the second condition.

    Raises:
        MissingKeyError, DataError: see `DifferentiableDifferentialDistribution`.
    """
    if labels is None and weights is None:
        msg = f"{WHO} needs data['condition_labels'], 0 or 1 for each cell, or data['condition_weights']."
        raise MissingKeyError(msg)
    if labels is not None and weights is not None:
        msg = f"{WHO}: data holds 'condition_labels' and 'condition_weights'; pass one of them."
        raise DataError(msg)
    if weights is None:
        assert labels is not None
        if not isinstance(labels, jax.core.Tracer) and labels.size:
            odd = np.setdiff1d(np.asarray(labels), [0, 1])
            if odd.size:
                msg = f"{WHO}: data['condition_labels'] must be 0 or 1, but holds {int(odd[0])}; compare two at a time."
                raise DataError(msg)
        weights = jnp.stack([labels == 0, labels == 1], axis=1).astype(counts.dtype)
    key = "condition_weights" if labels is None else "condition_labels"
    if weights.shape[1] != 2:
        msg = f"{WHO}: data['condition_weights'] has {weights.shape[1]} columns; two conditions are compared at a time."
        raise DataError(msg)
    checked_finite(WHO, weights, key=key, lowest=0.0)
    if not isinstance(weights, jax.core.Tracer):
        size = np.asarray(weights).sum(axis=0)
        if (size < FEWEST - 1e-3).any():
            few = int(size.argmin())
            msg = f"{WHO}: data[{key!r}] gives condition {few} {size[few]:.3g} cells; {FEWEST} at least are needed."
            raise DataError(msg)
    return weights[:, 0], weights[:, 1]


def weighted_mean(counts: Array, weights: Array) -> Array:
    """Mean of every gene."""
    return (weights[:, None] * counts).sum(axis=0) / jnp.maximum(weights.sum(), 1e-12)
