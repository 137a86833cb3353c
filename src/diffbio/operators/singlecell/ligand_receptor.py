"""Ligand-receptor scores between groups of cells, as CellPhoneDB, CellChat and LIANA have them."""

import dataclasses
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError
from ...math.ligand_receptor import (
    Score,
    Side,
    analytic_pvalues,
    between,
    consensus,
    drawn_permutations,
    gene_statistics,
    observed_scores,
    permutation_pvalues,
    score_of,
    side_of,
)
from ..base import Config, Data, Operator, checked_finite, nonnegative, one_of, positive
from .pair_checks import check_normalized, check_pairs, with_subunits

WHO = "DifferentiableLigandReceptor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRScoringConfig(Config):
    """Settings of `DifferentiableLigandReceptor`; expr_prop, n_permutations and min_cells as CellPhoneDB and LIANA.

    temperature: of everything that is a choice, 0 is the published hard choice: the lowest subunit of a complex (in
        units of the log-normalised values), the gate of expr_prop (in units of expr_prop), whether a value is above 0
        (in those of the values), ranks of the consensus (in standard deviations of each score).
    metric: "mean" (L + R) / 2, CellPhoneDB's; "product" L R, NATMI's; "geometric" sqrt(L R); "hill" (L R)^n / (kh^n +
        (L R)^n), CellChat's; "consensus" -log10 of lr_magnitude_rank.
    kh: of "hill" only: the L R at which the score is 1/2.
    hill_n: of "hill" only: its exponent.
    expr_prop: a gene is expressed in a group where at least this share of the cells has it; 0 takes all.
    n_permutations: of the cells' groups, for lr_pvalues; 0 puts the analytic ones there too.
    min_cells: a group of fewer is refused (of soft groups, memberships that sum to less).
    product_twice: the consensus ranks NATMI's product a second time by its own ranks, as LIANA 1.10 does, which turns
        that list around; False ranks it once.
    """

    temperature: float = nonnegative(0.0)
    metric: str = one_of("mean", "product", "geometric", "hill", "consensus")
    kh: float = positive(0.5)
    hill_n: float = positive(1.0)
    expr_prop: float = dataclasses.field(
        default=0.1, metadata={"check": lambda v: 0 <= v <= 1, "wanted": "in [0, 1]"}
    )
    n_permutations: int = nonnegative(1000)
    min_cells: int = positive(5)
    product_twice: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("kh", 0.5), ("hill_n", 1.0)):
            if getattr(self, name) != usual and self.metric != "hill":
                msg = f"LRScoringConfig.{name} is for metric 'hill', and does nothing for {self.metric!r}; "
                msg += f"leave it {usual!r}."
                raise ConfigError(msg)


class LigandReceptorScores(TypedDict):
    """What `DifferentiableLigandReceptor` adds: every pair, from every source group to every target group."""

    lr_scores: Float[Array, "pairs groups groups"]  # by the metric, times lr_expressed
    lr_expressed: Float[Array, "pairs groups groups"]  # 1: ligand in source and receptor in target pass expr_prop
    lr_specificity: Float[Array, "pairs groups groups"]  # L's share of its groups' sum times R's (NATMI's), 0-1
    lr_pvalues: Float[Array, "pairs groups groups"]  # by permutation
    lr_analytic_pvalues: Float[Array, "pairs groups groups"]  # by the permutations' mean and variance
    lr_magnitude_rank: Float[Array, "pairs groups groups"]  # consensus of magnitudes; 0-1, small is high
    lr_specificity_rank: Float[Array, "pairs groups groups"]  # consensus of specificities


class DifferentiableLigandReceptor(Operator):
    """Scores f(L, R) of ligand L in a source group and receptor R in a target group, means of log-normalised values.

    Groups may be soft: a mean weighs the cells by their memberships. A complex is its lowest subunit. At temperature 0
    and hard groups `lr_scores` of "mean" are CellPhoneDB's means, `lr_pvalues` its p-values as LIANA 1.10 computes
    them (cells exchange their groups, a complex stays the subunit that is lowest in the groups), and
    `lr_specificity_rank` is LIANA's consensus by robust rank aggregation. Its magnitude rank is ours with
    product_twice=True: Connectome and NATMI share the product, LIANA 1.10 replaces it by its ranks for the one, ranks
    these for the other, and so counts the lowest products as the highest. By default the product is ranked once.

    Nothing is trained. Gradients with respect to counts and groups equal finite differences; the hard choices of
    temperature 0 have none of their own. `lr_analytic_pvalues` have one in place of `lr_pvalues`, which count.

    `counts` need only the genes of the pairs: cost is cells x genes x groups for each permutation.
    """

    config: LRScoringConfig
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"permutations"})
    rough_out: ClassVar[dict[str, str]] = {
        "lr_pvalues": "counts permutations: constant almost everywhere; lr_analytic_pvalues has a gradient"
    }

    def __init__(self, config: LRScoringConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # one draw per operator: the same permutations in every call
        self.permutation_seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        lr_pairs: Int[Array, "pairs 2 subunits"],
        cluster_assignments: Float[Array, "cells groups"],
        permutations: Int[Array, "permutations cells"] | None = None,
    ) -> LigandReceptorScores:
        """counts: log-normalised, log(1 + 10,000 x / total) as LIANA reads them.

        lr_pairs: columns of `counts` of ligand and receptor; of complexes all subunits, filled up with -1. `apply`
            takes (pairs, 2) too.
        cluster_assignments: memberships, rows sum to 1; hard groups are one-hot rows.
        permutations: n_permutations of the row numbers, cell i gets the groups of cell permutations[b, i]; None draws
            them, in a way that does not depend on the order of the cells.

        Raises:
            DataError: where values are known (not under jit): values that are no log-normalised counts, a pair of a
                column that is not there, rows that do not sum to 1, a group of fewer cells than min_cells.
        """
        config = self.config
        check_normalized(WHO, counts)
        check_pairs(WHO, lr_pairs, counts.shape[1])
        self._check_groups(cluster_assignments)
        if not counts.shape[1] or not lr_pairs.shape[0]:
            msg = f"{WHO}: data['lr_pairs'] has {lr_pairs.shape[0]} pairs of {counts.shape[1]} genes; nothing to score."
            raise DataError(msg)
        soft = config.temperature
        genes = gene_statistics(counts, cluster_assignments, temperature=soft)
        ligand, receptor = (
            side_of(genes, lr_pairs[:, k], expr_prop=config.expr_prop, temperature=soft) for k in (0, 1)
        )
        base = "mean" if config.metric == "consensus" else config.metric
        score = score_of(base, kh=config.kh, hill_n=config.hill_n)
        analytic = analytic_pvalues(counts, cluster_assignments, ligand, receptor, score)
        means = score_of("mean", kh=1.0, hill_n=1.0)
        pvalues, of_means = self._pvalues(
            counts, cluster_assignments, permutations, ligand, receptor, (score, means), analytic
        )
        ranks = consensus(
            ligand, receptor, of_means, temperature=soft, mean_value=counts.mean(), product_twice=config.product_twice
        )
        expressed = between(jnp.multiply, ligand.gate, receptor.gate)
        if config.metric == "consensus":
            scores = -jnp.log10(jnp.maximum(ranks.magnitude, jnp.finfo(counts.dtype).tiny))
        else:
            scores = expressed * observed_scores(score, ligand, receptor)
        return {
            "lr_scores": scores,
            "lr_expressed": expressed,
            "lr_specificity": between(jnp.multiply, ligand.share, receptor.share),
            "lr_pvalues": pvalues,
            "lr_analytic_pvalues": analytic,
            "lr_magnitude_rank": ranks.magnitude,
            "lr_specificity_rank": ranks.specificity,
        }

    def _pvalues(
        self,
        counts: Array,
        groups: Array,
        permutations: Array | None,
        ligand: Side,
        receptor: Side,
        scores: tuple[Score, Score],
        analytic: Array,
    ) -> tuple[Array, Array]:
        """Of the metric, and of the mean, which the consensus reads."""
        fixed = jax.lax.stop_gradient((counts, groups, ligand, receptor))
        values, memberships, left, right = fixed
        same = self.config.metric in ("mean", "consensus")
        if not self.config.n_permutations:
            usual = analytic if same else analytic_pvalues(counts, groups, ligand, receptor, scores[1])
            return analytic, usual
        orders = self._drawn(values, memberships) if permutations is None else permutations
        found = permutation_pvalues(values, memberships, orders, left, right, scores[0])
        if same:
            return found, found
        return found, permutation_pvalues(values, memberships, orders, left, right, scores[1])

    def _drawn(self, counts: Array, groups: Array) -> Array:
        key = jax.random.key(self.permutation_seed[...])
        return drawn_permutations(counts, groups, key, number=self.config.n_permutations)

    def _fixed_axes(self) -> dict[str, int]:
        return {"permutations": self.config.n_permutations}

    def _read(self, key: str, data: Data) -> Array:
        return super()._read(key, with_subunits(WHO, data) if key == "lr_pairs" else data)

    def _check_groups(self, groups: Array) -> None:
        checked_finite(WHO, groups, key="cluster_assignments", fix="pass memberships", lowest=0.0)
        if isinstance(groups, jax.core.Tracer):
            return
        rows = np.asarray(groups)
        sums = rows.sum(axis=1)
        if not np.allclose(sums, 1.0, atol=1e-3):
            row = int(np.abs(sums - 1.0).argmax())
            msg = f"{WHO}: rows of data['cluster_assignments'] must sum to 1, but row {row} sums to {sums[row]:.4g}; "
            msg += "leave out cells without a group."
            raise DataError(msg)
        sizes = rows.sum(axis=0)
        if (sizes < self.config.min_cells - 1e-3).any():
            group = int(sizes.argmin())
            msg = f"{WHO}: group {group} of data['cluster_assignments'] has {sizes[group]:.4g} cells, but "
            msg += f"config.min_cells is {self.config.min_cells}; leave such groups out, or lower it."
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableLigandReceptor", Data]]:
        """Soft groups and complexes with soft choices; the hard ones are their limit."""
        keys = jax.random.split(jax.random.key(2), 4)
        labels = jnp.arange(17) % 3
        level = jax.random.uniform(keys[0], (3, 7), minval=0.2, maxval=2.0)
        # no zeros: whether a value is above 0 has no slope that finite differences could find
        counts = level[labels] * jax.random.uniform(keys[1], (17, 7), minval=0.1, maxval=1.0)
        soft = jax.nn.softmax(3.0 * jax.nn.one_hot(labels, 3) + jax.random.normal(keys[2], (17, 3)))
        pairs = jnp.array([[[0, -1], [1, 2]], [[3, -1], [4, -1]], [[1, 5], [6, 0]], [[2, -1], [2, -1]]])

        def op(**settings: Any) -> DifferentiableLigandReceptor:
            return cls(LRScoringConfig(n_permutations=6, **settings), rngs=nnx.Rngs(0))

        data = {"counts": counts, "lr_pairs": pairs, "cluster_assignments": soft}
        hill: dict[str, Any] = {"metric": "hill", "temperature": 0.3, "expr_prop": 0.5, "kh": 0.4, "hill_n": 1.5}
        return {"soft": (op(**hill), data)}
