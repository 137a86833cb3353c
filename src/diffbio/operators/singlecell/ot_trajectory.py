"""Waddington-OT: which cells of the next time point descend from which of this one."""

import dataclasses
import warnings
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import DataError, DataWarning
from ...math.ot import CONVERGED, MOST_DENSE, coupling, local_components, log_normalized, median_cost
from ..base import Config, Data, Operator, checked_counts, checked_finite, one_of, positive, setting

WHO = "DifferentiableOTTrajectory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OTTrajectoryConfig(Config):
    """Settings of `DifferentiableOTTrajectory`; epsilon, lambdas and components are those of wot 1.0.8.

    n_genes: width of both count matrices.
    sinkhorn_epsilon: strength of the entropy, in units of the median squared distance; 0+ is unregularised transport.
    lambda1: how strongly each early cell keeps to its expected growth; `inf` holds it to it.
    lambda2: how strongly the late cells keep to equal masses; `inf` holds them to it.
    growth_iterations: solves in all; each after the first takes its growth from the plan before it.
    interpolation_time: share of the interval, 0 to 1, at which `interpolated_counts` lies.
    n_components: principal components of the two time points together, between which costs are measured.
    transform: "log1p" of counts scaled to 10,000 a cell, or "none" for values that are normalised already.
    unit_variance: whether each gene counts the same: divided by its standard deviation over both time points, at most
        10 of them above the mean.
    """

    n_genes: int = positive(2000)
    sinkhorn_epsilon: float = positive(0.05)
    lambda1: float = positive(1.0)
    lambda2: float = positive(50.0)
    growth_iterations: int = positive(3)
    interpolation_time: float = setting(0.5, "in [0, 1]", lambda v: 0 <= v <= 1)
    n_components: int = positive(30)
    transform: str = one_of("log1p", "none")
    unit_variance: bool = True


class OTTrajectoryOutput(TypedDict):
    """What `DifferentiableOTTrajectory` adds."""

    transport_plan: Float[Array, "cells later_cells"]  # sums to the mean growth
    growth_rates: Float[Array, " cells"]  # descendants of each cell over the interval
    interpolated_counts: Float[Array, "cells genes"]


class DifferentiableOTTrajectory(Operator):
    """Couples cells of two time points by unbalanced entropic transport and reads growth and fate from the plan.

    Schiebinger et al. 2019, Cell 176:928 (Waddington-OT). The cost is the squared Euclidean distance between
    principal components of both time points together, over its median; the plan P minimises

        <C, P> + epsilon KL(P | 1/(n m)) + lambda1 KL(P 1 | growth / n) + lambda2 KL(P^T 1 | mean growth / m).

    Row i of P is where cell i goes: n sum_j P_ij, its growth, is the expected number of its descendants. As in wot,
    the growth of each solve after the first is that of the plan before it; wot's own default is one solve. Two
    differences: genes are divided by their standard deviation before the components (`unit_variance`), and the plan's
    total is the mean growth, wot's n times that.

    `interpolated_counts` is the expectation of wot's interpolation, (1 - t) x_i + t y_j over the descendants j of
    cell i; the population at time t is made of these cells in proportion to growth_rates ** t. At t = 0 it is
    `counts_t1`, at t = 1 the mean of the descendants.

    The gradient through the plan is exact, by the implicit function theorem (see `math.ot`), also through the refined
    growth, the median and the principal components. The plan is dense: at most 25 million pairs of cells. For more,
    `tl.ot_trajectory` works through landmarks: plans of low rank, never held as an array, by the functions of
    `math.couplings`. There are no weights.
    """

    config: OTTrajectoryConfig

    def __init__(self, config: OTTrajectoryConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        del rngs  # nothing is drawn at random

    def __call__(
        self,
        counts_t1: Float[Array, "cells genes"],
        counts_t2: Float[Array, "later_cells genes"],
        growth_rates: Float[Array, " cells"] | None = None,
    ) -> OTTrajectoryOutput:
        """counts_t1, counts_t2: of the earlier and the later time point, the same genes.

        growth_rates: expected descendants of each earlier cell over the whole interval, above 0; None is 1 for all.

        Raises:
            DataError: no cells at a time point, more pairs than fit, or values that are not finite, counts below 0
                or growth of 0 or less (where values are known, not under jit).
        """
        config, n, m = self.config, len(counts_t1), len(counts_t2)
        for key, values in (("counts_t1", counts_t1), ("counts_t2", counts_t2)):
            if len(values) == 0:
                msg = f"{WHO}: data[{key!r}] has no cells; each time point needs at least one."
                raise DataError(msg)
            if config.transform == "log1p":
                checked_counts(WHO, values, key=key, fix='pass raw counts, or transform="none" for other values')
            else:
                checked_finite(WHO, values, key=key)
        if n * m > MOST_DENSE:
            msg = f"{WHO}: a plan of {n} x {m} cells is too large to be dense (at most {MOST_DENSE:,} pairs); use "
            msg += "tl.ot_trajectory, which works through landmarks, or fewer cells."
            raise DataError(msg)
        growth = jnp.ones(n, counts_t1.dtype) if growth_rates is None else growth_rates
        check_growth(WHO, growth)
        x, y = (log_normalized(v) if config.transform == "log1p" else v for v in (counts_t1, counts_t2))
        x, y = local_components(x, y, config.n_components, unit_variance=config.unit_variance)
        found = coupling(
            median_cost(x, y), growth, epsilon=config.sinkhorn_epsilon, lambda1=config.lambda1,
            lambda2=config.lambda2, growth_iterations=config.growth_iterations,
        )  # fmt: skip
        check_converged(WHO, found.error)
        t, mass = config.interpolation_time, found.plan.sum(axis=1, keepdims=True)
        later = jnp.matmul(found.plan, counts_t2, precision="highest")
        # a cell whose mass underflows has no descendants to move towards
        descendants = jnp.where(mass > 0, later / jnp.where(mass > 0, mass, 1.0), counts_t1)
        return {
            "transport_plan": found.plan,
            "growth_rates": found.growth,
            "interpolated_counts": (1 - t) * counts_t1 + t * descendants,
        }

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableOTTrajectory", Data]]:
        """Two small time points: with a growth prior, and without on normalised values, nearly balanced."""
        keys = jax.random.split(jax.random.key(0), 3)
        means = jnp.exp(jax.random.normal(keys[0], (3, 7)) + 1.0)
        early, late = (means[jnp.arange(size) % 3] * jnp.exp(0.2 * jnp.arange(7) * later) for size, later in EXAMPLE)
        data = {
            "counts_t1": jax.random.poisson(keys[1], early).astype(jnp.float32),
            "counts_t2": jax.random.poisson(keys[2], late).astype(jnp.float32),
        }
        prior = {"growth_rates": 0.5 + jnp.arange(len(early)) / 4.0}

        def op(**settings: Any) -> DifferentiableOTTrajectory:
            return cls(OTTrajectoryConfig(n_genes=7, n_components=3, **settings), rngs=nnx.Rngs(0))

        values = {key: jnp.log1p(counts) for key, counts in data.items()}
        return {
            "prior": (op(growth_iterations=2), data | prior),
            "held": (op(transform="none", unit_variance=False, sinkhorn_epsilon=0.2, lambda2=float("inf")), values),
        }


EXAMPLE = ((6, 0), (8, 1))  # cells of the two time points


def check_growth(who: str, growth: Any) -> None:
    """Refuses growth that is not above 0; under jit, where values are not known, it passes.

    Raises:
        DataError: naming the first such cell.
    """
    checked_finite(who, growth, key="growth_rates", lowest=0.0, fix="growth is a number of descendants")
    if not isinstance(growth, jax.core.Tracer) and (np.asarray(growth) == 0).any():
        row = int(np.flatnonzero(np.asarray(growth) == 0)[0])
        msg = f"{who}: data['growth_rates'] must be above 0, but row {row} holds 0; leave out cells that only die."
        raise DataError(msg)


def check_converged(who: str, error: Any) -> None:
    """Warns of a plan that misses its marginal conditions; under jit, where values are not known, it passes."""
    if not isinstance(error, jax.core.Tracer) and not float(error) <= CONVERGED[str(error.dtype)]:
        msg = f"{who}: the transport plan did not converge, {float(error):.1e} of its mass misses the marginals; a "
        msg += "larger epsilon converges faster."
        warnings.warn(msg, DataWarning, stacklevel=3)
