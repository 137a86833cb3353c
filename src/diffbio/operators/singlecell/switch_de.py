"""switchDE: genes that switch on or off along pseudotime, when and how sharply."""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import DataError
from ...math.ranking import benjamini_hochberg
from ...math.switch import STRENGTH_UNIT, Limits, log_largest
from ...math.switch_fit import Fit, fit_normal, fit_zero_inflated
from ...math.switch_null import chi2_pvalues, levels_of, permutation_log_pvalues
from ..base import Config, Data, Operator, checked_counts, checked_finite, nonnegative, positive, setting

WHO = "DifferentiableSwitchDE"
FEWEST_CELLS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchDEConfig(Config):
    """Settings of `DifferentiableSwitchDE`.

    n_genes: columns of the expression.
    zero_inflated: whether zeros may be lost values, with probability exp(-lambda x^2).
    n_nodes: cells are summed at so many nodes along pseudotime, by cubic weights; fewer cells stay as they are.
    max_strength: largest |k|, in units of one over the range of pseudotime; a likelihood that rises towards a step
        ends there.
    margin: how far outside of the cells t0 may lie, in units of the range of pseudotime.
    n_permutations: of the cells, whose likelihood ratios are the reference of p-values; 0 is chi-squared with two
        degrees of freedom, as in switchde.
    """

    n_genes: int = positive(2000)
    zero_inflated: bool = False
    n_nodes: int = setting(512, ">= 8", lambda v: v >= 8)
    max_strength: float = positive(100.0)
    margin: float = nonnegative(0.5)
    n_permutations: int = nonnegative(20)


class Switches(TypedDict):
    """What `DifferentiableSwitchDE` adds."""

    switch_times: Float[Array, " genes"]  # t0, in the units of pseudotime
    switch_strengths: Float[Array, " genes"]  # k, in their inverse; above 0 switches on
    mu0: Float[Array, " genes"]  # half the level that is approached, mean expression at t0
    sigma: Float[Array, " genes"]  # standard deviation of the noise
    predicted_expression: Float[Array, "cells genes"]
    log_likelihood: Float[Array, " genes"]
    null_log_likelihood: Float[Array, " genes"]  # of constant expression
    p_values: Float[Array, " genes"]
    q_values: Float[Array, " genes"]  # Benjamini & Hochberg


class DifferentiableSwitchDE(Operator):
    """Fits mu(t) = 2 mu0 / (1 + exp(-k (t - t0))) to every gene along pseudotime, and tests it.

    Campbell & Yau 2016, Bioinformatics 33:1241 (switchde). Noise is normal; with `zero_inflated`, a value x is lost
    with probability exp(-lambda x^2), and the likelihood of what is seen is maximised itself where switchde climbs it
    by EM. All genes at once: mu0 and sigma have closed forms, k and t0 come from Newton's method started at the best
    points of a grid, one rising and one falling. Gradients with respect to expression and pseudotime are those of the
    implicit function at the optimum; which of the two starts wins, and which parameters rest on a side of their box,
    is decided outside the gradient.

    Two differences from switchde: k and t0 are kept in a box (`max_strength`, `margin`), since the likelihood often
    has no maximum but a step or an exponential; and p-values have a reference of permuted cells. switchde's
    chi-squared is not the law of the ratio under a constant, where t0 means nothing: see `math.switch_null`. Neither
    knows that pseudotime was found from the same genes.

    Genes that do not vary get p = 1, and the middle of the box. There are no weights.
    """

    config: SwitchDEConfig
    rough_out = {  # noqa: RUF012
        "p_values": "their reference is a sample of permuted cells; the gradient of both log-likelihoods is exact",
        "q_values": "ranks of p-values",
    }

    def __init__(self, config: SwitchDEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # one draw per operator: the same data get the same p-values
        self.seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))

    def __call__(self, counts: Float[Array, "cells genes"], pseudotime: Float[Array, " cells"]) -> Switches:
        """counts: log expression, as log(1 + x) of counts of equal totals.

        pseudotime: in any units.

        Raises:
            DataError: fewer than 5 cells; and where values are known (not under jit): one pseudotime for all cells,
                values that are missing or infinite, or, if `zero_inflated`, below 0.
        """
        config = self.config
        if config.zero_inflated:
            checked_counts(WHO, counts, fix="pass log expression, or zero_inflated=False")
        else:
            checked_finite(WHO, counts, key="counts")
        check_times(WHO, pseudotime)
        low, high = pseudotime.min(), pseudotime.max()
        span = high - low
        times = (pseudotime - low) / span
        # p-values do not depend on the order of the cells: permutations start from that of pseudotime
        order = jnp.lexsort((jax.lax.stop_gradient(counts).sum(axis=1), jax.lax.stop_gradient(times)))
        counts_in_order, times = counts[order], times[order]
        fit = self._fit(counts_in_order, times)
        k, t0 = STRENGTH_UNIT * fit.theta[:, 0], fit.theta[:, 1]
        largest = jax.vmap(log_largest)(fit.theta)
        # not mu0 times a sigmoid: far from t0 one is large, the other small
        shape = jnp.exp(jax.nn.log_sigmoid(k * (((pseudotime - low) / span)[:, None] - t0)) - largest)
        p_values = self._pvalues(fit, jax.lax.stop_gradient(counts_in_order))
        return {
            "switch_times": low + span * t0,
            "switch_strengths": k / span,
            "mu0": 0.5 * fit.peak * jnp.exp(-largest),
            "sigma": root(fit.variance),
            "predicted_expression": fit.peak * shape,
            "log_likelihood": fit.log_likelihood,
            "null_log_likelihood": fit.null_log_likelihood,
            "p_values": p_values,
            "q_values": benjamini_hochberg(p_values),
        }

    def _fit(self, counts: Array, times: Array) -> Fit:
        config = self.config
        keys = jax.random.split(jax.random.key(self.seed[...]), config.n_permutations)
        cells = jnp.arange(len(times))
        permutations = jax.vmap(lambda key: jax.random.permutation(key, cells))(keys)
        limits = Limits(config.max_strength, config.margin)
        fit = fit_zero_inflated if config.zero_inflated else fit_normal
        return fit(counts, times, permutations, limits, config.n_nodes)

    def _pvalues(self, fit: Fit, counts: Array) -> Array:
        ratios = 2 * jax.lax.stop_gradient(fit.log_likelihood - fit.null_log_likelihood)
        n_permutations = self.config.n_permutations
        if n_permutations == 0:
            return chi2_pvalues(ratios)
        levels = levels_of(counts.mean(axis=0), counts.var(axis=0))
        null_levels = jnp.tile(levels, n_permutations)
        found = permutation_log_pvalues(ratios, levels, fit.null_ratios.ravel(), null_levels)
        return jnp.where(ratios > 0, jnp.exp(found), 1.0)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableSwitchDE", Data]]:
        """Cells along one course of four genes: summed at nodes, and with values that are lost."""
        keys = jax.random.split(jax.random.key(3), 3)
        pseudotime = jax.random.uniform(keys[0], (36,)) * 2.0 + 1.0
        strength, when = jnp.array([6.0, -5.0, 8.0, -7.0]), jnp.array([1.7, 2.1, 2.3, 1.8])
        level = 3.0 * jax.nn.sigmoid(strength * (pseudotime[:, None] - when)) + 0.3
        counts = level + 0.7 * jax.random.normal(keys[1], level.shape)
        lost = jax.random.uniform(keys[2], level.shape) < jnp.exp(-0.6 * counts**2)

        def op(**settings: Any) -> DifferentiableSwitchDE:
            return cls(SwitchDEConfig(n_genes=4, max_strength=14.0, **settings), rngs=nnx.Rngs(0))

        seen = jnp.where(lost, 0.0, jnp.maximum(counts, 0.1))
        return {
            "nodes": (op(n_nodes=16, n_permutations=2), {"counts": counts, "pseudotime": pseudotime}),
            "dropout": (op(zero_inflated=True, n_permutations=0), {"counts": seen, "pseudotime": pseudotime}),
        }


def check_times(who: str, pseudotime: Array) -> None:
    """Refuses too few cells, and times that are not finite or all the same.

    Raises:
        DataError: as said.
    """
    if len(pseudotime) < FEWEST_CELLS:
        msg = f"{who}: data['pseudotime'] has {len(pseudotime)} cells; {FEWEST_CELLS} at least are needed for a curve."
        raise DataError(msg)
    checked_finite(who, pseudotime, key="pseudotime")
    if not isinstance(pseudotime, jax.core.Tracer) and np.ptp(np.asarray(pseudotime)) == 0:
        value = float(np.asarray(pseudotime)[0])
        msg = f"{who}: data['pseudotime'] is {value:g} in every cell; there is no course to fit."
        raise DataError(msg)


def root(square: Array) -> Array:
    """Square root; 0, with no gradient, at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
