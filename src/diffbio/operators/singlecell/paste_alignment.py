"""PASTE: which spot of one slice of a tissue lies where which spot of the next one does."""

import dataclasses
import warnings
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import DataError, DataWarning
from ...math.gromov import FusedSettings, fused_objective, fused_plan, fused_problem
from ...math.ot import MOST_DENSE
from ...math.slices import (
    distances_within,
    euclidean_dissimilarity,
    inverse_motion,
    kl_dissimilarity,
    moved,
    rigid_motion,
    scaled_distances,
)
from ..base import Config, Data, Operator, checked_counts, one_of, positive, setting

WHO = "DifferentiablePASTEAlignment"
LEAST_SPOTS = 3  # that fix a rigid motion in the plane
CONVERGED = 1e-2  # mass that had to be moved onto the marginals; above, a warning
SETTLED = 1e-2  # mass that the last round moved; above, a warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class PASTEAlignmentConfig(Config):
    """Settings of `DifferentiablePASTEAlignment`; alpha, dissimilarity and pseudocount are those of paste-bio 1.4.

    alpha: weight of space against expression: 0 matches expression only, 1 the distances within the slices only. What
        it amounts to depends on `distance_scaling`.
    sinkhorn_epsilon: strength of the entropy, in units of the objective of the plan that couples everything alike; 0+
        is unregularised transport. 0.005 is within half a percent of its objective on Visium-like slices.
    sinkhorn_iters: transport problems solved in turn while epsilon falls from 1 to its value; more follow at that
        value until the plan stands.
    dissimilarity: "kl", of spots' shares of counts, or "euclidean", between log-normalised counts.
    pseudocount: added to every count before shares are taken ("kl" only).
    distance_scaling: unit of distances within a slice: "spacing", the distance of neighbouring spots (median; one unit
        for both slices), at which PASTE's alpha of 0.1 was found; "max", each slice's largest distance, at which alpha
        must be larger, such as 0.9; "none", as given, which is PASTE's.
    overlap: share of each slice's mass that has a counterpart in the other one; below 1 the problem is PASTE2's.
    allow_reflection: whether slice 2 may be turned over to lie on slice 1.
    """

    alpha: float = setting(0.1, "in [0, 1]", lambda v: 0 <= v <= 1)
    sinkhorn_epsilon: float = positive(0.005)
    sinkhorn_iters: int = positive(20)
    dissimilarity: str = one_of("kl", "euclidean")
    pseudocount: float = setting(0.01, "> 0", lambda v: v > 0)
    distance_scaling: str = one_of("spacing", "max", "none")
    overlap: float = setting(1.0, "in (0, 1]", lambda v: 0 < v <= 1)
    allow_reflection: bool = False


class PASTEAlignmentOutput(TypedDict):
    """What `DifferentiablePASTEAlignment` adds."""

    transport_plan: Float[Array, "cells other_cells"]  # sums to `overlap`
    aligned_coords: Float[Array, "other_cells dims"]  # slice 2 in the frame of slice 1
    slice1_in_slice2_coords: Float[Array, "cells dims"]  # slice 1 in the frame of slice 2
    objective: Float[Array, ""]  # fused Gromov-Wasserstein, without the entropy
    rotation: Float[Array, "dims dims"]  # aligned = rotation slice 2 + translation
    translation: Float[Array, " dims"]
    marginal_error: Float[Array, ""]  # mass of the plan off its marginals


class DifferentiablePASTEAlignment(Operator):
    """Couples the spots of two slices by fused Gromov-Wasserstein transport and lays one slice on the other.

    Zeira et al. 2022, Nature Methods 19:567 (PASTE); with `overlap` below 1 Liu et al. 2023, Genome Research 33:1124
    (PASTE2). The plan P, of equal masses 1/n and 1/m, minimises

        (1 - alpha) sum_ij M_ij P_ij + alpha sum_ijkl (C1_ik - C2_jl)² P_ij P_kl,

    with M the Kullback-Leibler divergence of the spots' expression and C1, C2 the distances within each slice.
    Slice 2 is then laid on slice 1 by the rigid motion of least squares over P. Three differences from PASTE: an
    entropy of strength `sinkhorn_epsilon`, which makes the plan differentiable, falls from a large value, which finds
    equal or better minima; distances come in units of the spots' spacing (`distance_scaling`); and the motion is no
    reflection unless that is allowed. "euclidean" compares log-normalised counts, PASTE's compares raw ones.

    The gradient is exact with respect to counts and coordinates: through the plan by the implicit function theorem (see
    `math.gromov`), so that for the objective with its entropy it is that of the envelope theorem, and through the
    motion by the derivative of the polar factor. It is that of the minimum found: which of several that is, a spot's
    nearest neighbour in "spacing", and the largest distance in "max" are choices outside of it. As epsilon goes to 0
    the plan becomes piecewise constant: its gradient is then 0 nearly everywhere, and the system that gives it is
    badly conditioned below 0.05 (errors to some 1e-2 there).

    The plan is dense: at most 25 million pairs of spots, with a time of n m (n + m) a round. For more,
    `tl.align_slices` works through landmarks (see `math.slice_coupling`). There are no weights.
    """

    config: PASTEAlignmentConfig
    rough_out = {"marginal_error": "what rounding and the stopping rule leave"}  # noqa: RUF012

    def __init__(self, config: PASTEAlignmentConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        del rngs  # nothing is drawn at random

    def __call__(
        self,
        slice1_counts: Float[Array, "cells genes"],
        slice1_coords: Float[Array, "cells dims"],
        slice2_counts: Float[Array, "other_cells genes"],
        slice2_coords: Float[Array, "other_cells dims"],
    ) -> PASTEAlignmentOutput:
        """Counts of the same genes in both slices; coordinates of 2 or 3 dimensions, in one unit of length.

        Raises:
            DataError: fewer than 3 spots, other than 2 or 3 dimensions, more pairs than fit; or, where values are known
                (not under jit): coordinates that are not finite or all the same, counts below 0, a spot without counts,
                or no gene with counts in both slices.
        """
        config = self.config
        for key, values in (("slice1_counts", slice1_counts), ("slice2_counts", slice2_counts)):
            checked_counts(WHO, values, key=key)
        check_slices(WHO, (slice1_counts, slice2_counts), (slice1_coords, slice2_coords))
        n, m = len(slice1_counts), len(slice2_counts)
        if n * m > MOST_DENSE:
            msg = f"{WHO}: a plan of {n} x {m} spots is too large to be dense (at most {MOST_DENSE:,} pairs); use "
            msg += "tl.align_slices, which works through landmarks."
            raise DataError(msg)
        if config.dissimilarity == "kl":
            dissimilarity = kl_dissimilarity(slice1_counts, slice2_counts, config.pseudocount)
        else:
            dissimilarity = euclidean_dissimilarity(slice1_counts, slice2_counts)
        left, right = (distances_within(coords) for coords in (slice1_coords, slice2_coords))
        left, right = scaled_distances(left, right, config.distance_scaling)
        problem, scale = fused_problem(dissimilarity, left, right, config.alpha)
        overlap = None if config.overlap == 1 else config.overlap
        found = fused_plan(problem, FusedSettings(config.sinkhorn_epsilon, config.sinkhorn_iters, overlap))
        check_converged(WHO, found.error, found.moved)
        motion = rigid_motion(slice1_coords, slice2_coords, found.plan, reflection=config.allow_reflection)
        return {
            "transport_plan": found.plan,
            "aligned_coords": moved(slice2_coords, motion),
            "slice1_in_slice2_coords": moved(slice1_coords, inverse_motion(motion)),
            "objective": scale * fused_objective(problem, found.plan),
            "rotation": motion.rotation,
            "translation": motion.translation,
            "marginal_error": off_marginals(found.plan, config.overlap),
        }

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiablePASTEAlignment", Data]]:
        """A slice and one that lies turned over beside it; and a part of a slice in three dimensions."""
        keys = jax.random.split(jax.random.key(0), 4)

        def slices(n: int, m: int, dims: int) -> Data:
            place = 3 * jax.random.uniform(keys[0], (n, dims))
            rates = jnp.exp(jnp.sin(place @ jax.random.normal(keys[1], (dims, 6))) + 1.5)
            turned = place[:m].at[:, 0].multiply(-1.0) @ jnp.linalg.qr(jax.random.normal(keys[2], (dims, dims)))[0]
            early, late = jax.random.split(keys[3])
            return {
                "slice1_counts": jax.random.poisson(early, rates).astype(jnp.float32) + 1,
                "slice1_coords": place,
                "slice2_counts": jax.random.poisson(late, rates[:m]).astype(jnp.float32) + 1,
                "slice2_coords": turned + 1.0,
            }

        def op(**settings: Any) -> DifferentiablePASTEAlignment:
            return cls(PASTEAlignmentConfig(sinkhorn_iters=5, **settings), rngs=nnx.Rngs(0))

        return {
            "turned": (op(sinkhorn_epsilon=0.1), slices(8, 7, 2)),
            "partial": (
                op(sinkhorn_epsilon=0.2, overlap=0.7, dissimilarity="euclidean", distance_scaling="max", alpha=0.5),
                slices(9, 6, 3),
            ),
        }


def check_slices(who: str, counts: Any, coords: Any, *, names: Any = None) -> None:
    """Refuses slices that cannot be aligned; under jit, where values are not known, only by their shapes.

    Args:
        who: the caller, for the message.
        counts: of each slice, dense or sparse.
        coords: of each slice.
        names: of the slices, for the message; None numbers them as the operator's keys do.

    Raises:
        DataError: naming the slice and its fault.
    """
    names = names or [f"slice {k + 1}" for k in range(len(counts))]
    for name, place, values in zip(names, coords, counts, strict=True):
        if values.shape[0] < LEAST_SPOTS:
            msg = f"{who}: {name} has {values.shape[0]} spots; an alignment needs at least {LEAST_SPOTS}."
            raise DataError(msg)
        if place.shape[1] not in (2, 3):
            msg = f"{who}: coordinates must have 2 or 3 columns, those of {name} have {place.shape[1]}."
            raise DataError(msg)
        if isinstance(place, jax.core.Tracer):
            continue
        host = np.asarray(place)
        if not np.isfinite(host).all():
            row = int(np.flatnonzero(~np.isfinite(host).all(axis=1))[0])
            msg = f"{who}: coordinates must be finite, but row {row} of {name} holds {host[row]}; leave such spots out."
            raise DataError(msg)
        if (np.ptp(host, axis=0) == 0).all():
            msg = f"{who}: all spots of {name} lie in one place; give each its own coordinates."
            raise DataError(msg)
    if any(isinstance(values, jax.core.Tracer) for values in counts):
        return
    there = []
    for name, values in zip(names, counts, strict=True):
        host = values if hasattr(values, "tocsr") else np.asarray(values)
        empty = np.flatnonzero(np.asarray(host.sum(axis=1)).ravel() == 0)
        if len(empty):
            msg = f"{who}: {len(empty)} spots of {name} have no counts of the genes in use, first row {empty[0]}; "
            msg += "leave them out."
            raise DataError(msg)
        there.append(np.asarray(host.sum(axis=0)).ravel() > 0)
    if not np.logical_and.reduce(there).any():
        msg = f"{who}: the slices share no genes: none has counts in all; look whether columns are the same genes."
        raise DataError(msg)


def off_marginals(plan: Float[Array, "cells other_cells"], overlap: float) -> Float[Array, ""]:
    """Mass of rows and columns above their share of 1, and what the total misses of the overlap."""
    n, m = plan.shape
    above = jnp.maximum(plan.sum(axis=1) - 1 / n, 0).sum() + jnp.maximum(plan.sum(axis=0) - 1 / m, 0).sum()
    return above + jnp.abs(plan.sum() - overlap)


def check_converged(who: str, error: Any, moving: Any) -> None:
    """Warns of a plan that misses its marginals or still moves; under jit, where values are not known, it passes."""
    if isinstance(error, jax.core.Tracer) or isinstance(moving, jax.core.Tracer):
        return
    if not (float(error) <= CONVERGED and float(moving) <= SETTLED):
        msg = f"{who}: the plan did not converge: {float(error):.1e} of its mass missed the marginals, the last round "
        msg += f"moved {float(moving):.1e}; a larger sinkhorn_epsilon converges faster."
        warnings.warn(msg, DataWarning, stacklevel=3)
