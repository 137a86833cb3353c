"""Fused Gromov-Wasserstein transport with entropy between two sets of spots, with an exact gradient.

The plan P (spots, other_spots) minimises, over plans of the given masses,

    (1 - alpha) <M, P> + alpha sum_ijkl (C1_ik - C2_jl)² P_ij P_kl + epsilon S sum_ij P_ij log P_ij

with M the dissimilarity of spots, C1 and C2 the distances within each set and S the first two terms of the plan that
couples everything alike (Vayer et al. 2019; Peyre, Cuturi & Solomon 2016 for the entropy). Each round takes the
objective's linear part at the plan before it and solves that transport problem: Sinkhorn's iterations by ott-jax, then
Newton's method. Euclidean distances are conditionally negative definite, which makes the quadratic part concave
between plans of the same marginals, so that a full step never raises the objective. Epsilon falls from 1 on the way.

Partial transport (Chapel et al. 2020, as PASTE2 uses it) holds the plan's mass to the overlap and the marginals below
the masses, by one more row and column without cost that take what is not coupled.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .conjugate import conjugate_gradients
from .ot import PRECISION, ott, solve_marginals

START = 1.0  # epsilon of the first round
MOST_ROUNDS = 400
SETTLED = {"float64": 1e-13, "float32": 1e-6}  # mass that moves in a round (L1), below which the plan stands
PATIENCE = 10  # rounds without a new least of that mass: rounding is then all that moves it
ROUGH = 1e-3  # mass off its marginal, where Newton's method takes over
BALANCED = {"float64": 1e-14, "float32": 1e-6}  # mass off its marginal, below which Newton's method ends
NEWTON_STEPS = 12
MOST_ITERATIONS = 500  # of Sinkhorn in one round; the next one goes on from there
INNER = 10  # iterations between two looks at the error
DAMPING = 0.5  # of the partial problem, whose quadratic part is not concave: share of the cost before in the next one
FORBIDDEN = 50.0  # cost, in units of S, of leaving out what is left out already
MOST_GRADIENT_STEPS = 300


class FusedProblem(NamedTuple):
    """Costs with alpha and the scale S taken in: the objective of P is <linear, P> + sum (left - right)² P P."""

    linear: Float[Array, "spots other_spots"]
    left: Float[Array, "spots spots"]
    right: Float[Array, "other_spots other_spots"]


class Masses(NamedTuple):
    """Of the spots of both sides; each sums to 1."""

    a: Float[Array, " spots"]
    b: Float[Array, " other_spots"]


class FusedPlan(NamedTuple):
    """A plan and how well it stands."""

    plan: Float[Array, "spots other_spots"]
    error: Float[Array, ""]  # mass off its marginals, which rounding then brings onto them
    moved: Float[Array, ""]  # mass that the last round moved


class FusedSettings(NamedTuple):
    """Static settings of `fused_plan`."""

    epsilon: float  # in units of S
    rounds: int  # in which epsilon falls from 1 to its value
    overlap: float | None = None  # share of the mass to be coupled; None is all


def fused_problem(
    dissimilarity: Float[Array, "spots other_spots"],
    left: Float[Array, "spots spots"],
    right: Float[Array, "other_spots other_spots"],
    alpha: float,
    masses: Masses | None = None,
) -> tuple[FusedProblem, Float[Array, ""]]:
    """The problem with costs divided by S, and S, the objective where everything is coupled alike.

    Args:
        dissimilarity: of the spots of both sides.
        left: distances within the first side.
        right: within the second.
        alpha: weight of the distances, 0 to 1.
        masses: of the spots; None is equal ones.
    """
    masses = masses or equal_masses(dissimilarity)
    alike = masses.a[:, None] * masses.b
    raw = FusedProblem((1 - alpha) * dissimilarity, math.sqrt(alpha) * left, math.sqrt(alpha) * right)
    scale = fused_objective(raw, alike)
    scale = jnp.where(scale > 0, scale, 1.0)  # all spots alike and in one place
    root = jnp.sqrt(scale)
    return FusedProblem(raw.linear / scale, raw.left / root, raw.right / root), scale


def equal_masses(costs: Float[Array, "spots other_spots"]) -> Masses:
    """1/n for each spot of the first side, 1/m for each of the second."""
    n, m = costs.shape
    return Masses(jnp.full(n, 1 / n, costs.dtype), jnp.full(m, 1 / m, costs.dtype))


def fused_objective(problem: FusedProblem, plan: Float[Array, "spots other_spots"]) -> Float[Array, ""]:
    """<linear, P> + sum_ijkl (left_ik - right_jl)² P_ij P_kl."""
    rows, columns = plan.sum(axis=1), plan.sum(axis=0)
    fixed = rows @ (problem.left**2) @ rows + columns @ (problem.right**2) @ columns
    return (problem.linear * plan).sum() + fixed - 2 * (_between(problem, plan) * plan).sum()


def linearised(problem: FusedProblem, plan: Float[Array, "spots other_spots"]) -> Float[Array, "spots other_spots"]:
    """Gradient of `fused_objective` with respect to the plan (symmetric distances)."""
    rows = (problem.left**2) @ plan.sum(axis=1)
    columns = (problem.right**2) @ plan.sum(axis=0)
    return problem.linear + 2 * (rows[:, None] + columns) - 4 * _between(problem, plan)


@partial(jax.jit, static_argnums=1)
def fused_plan(problem: FusedProblem, settings: FusedSettings, masses: Masses | None = None) -> FusedPlan:
    """A local minimum of the objective with entropy; differentiable in the problem, not in the masses (None: equal).

    The gradient is that of the conditions of the minimum (implicit function theorem), by conjugate gradients on the
    Hessian between plans of the same marginals. It is exact where the minimum is strict and the rounds have converged
    (`moved`); which of several minima is found, is a choice outside of it. As epsilon goes to 0 the plan becomes a
    vertex, whose gradient is 0 almost everywhere.
    """
    return _fused_plan(problem, settings, masses or equal_masses(problem.linear))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused_plan(problem: FusedProblem, settings: FusedSettings, masses: Masses) -> FusedPlan:
    return _forward(problem, settings, masses)[0]


def _solved(problem: FusedProblem, settings: FusedSettings, masses: Masses) -> FusedPlan:
    """The plan with the row and column of what is not coupled, in the partial problem."""
    (n, m), kind = problem.linear.shape, problem.linear.dtype
    partly = settings.overlap is not None
    log_a, log_b = (_log_masses(mass, settings.overlap).astype(kind) for mass in masses)
    falling = (settings.epsilon / START) ** (1 / max(settings.rounds - 1, 1))

    def round_(state: tuple[Array, ...]) -> tuple[Array, ...]:
        k, plan, cost, f, g, before, _, _, least, stale = state
        epsilon = jnp.maximum(START * falling**k, settings.epsilon).astype(kind)
        wanted = _padded_cost(problem, plan[:n, :m], partly=partly)
        wanted = jnp.where(k > 0, DAMPING * cost + (1 - DAMPING) * wanted, wanted) if partly else wanted
        # what belongs to a row or column moves into the potentials: smaller numbers round better
        wanted = wanted - wanted.min(axis=1, keepdims=True)
        wanted = wanted - wanted.min(axis=0, keepdims=True)
        ratio = before / epsilon
        found, f, g, error = _balanced(wanted / epsilon, log_a, log_b, f * ratio, g * ratio)
        moved = jnp.abs(found - plan).sum()
        less = (moved < least) | (k < settings.rounds)
        stale = jnp.where(less, 0, stale + 1)
        return k + 1, found, wanted, f, g, epsilon, error, moved, jnp.where(less, moved, least), stale

    def unsettled(state: tuple[Array, ...]) -> Array:
        k, moved, stale = state[0], state[7], state[9]
        return (k < settings.rounds) | ((k < MOST_ROUNDS) & (moved > SETTLED[str(kind)]) & (stale < PATIENCE))

    plan = jnp.exp(log_a[:, None] + log_b)
    none, one = jnp.zeros((), int), jnp.ones((), kind)
    potentials = jnp.zeros_like(log_a), jnp.zeros_like(log_b)
    state: tuple[Array, ...] = (none, plan, jnp.zeros_like(plan), *potentials, one, one, one, one, none)
    _, plan, _, _, _, _, error, moved, _, _ = jax.lax.while_loop(unsettled, round_, state)
    return FusedPlan(_rounded(plan, jnp.exp(log_a), jnp.exp(log_b)), error, moved)


def _rounded(plan: Array, a: Array, b: Array) -> Array:
    """The plan on its marginals (Altschuler, Weed & Rigollet 2017, algorithm 2), moved by at most twice its error."""
    plan = plan * jnp.minimum(a / jnp.maximum(plan.sum(axis=1), jnp.finfo(plan.dtype).tiny), 1)[:, None]
    plan = plan * jnp.minimum(b / jnp.maximum(plan.sum(axis=0), jnp.finfo(plan.dtype).tiny), 1)
    off_a, off_b = jnp.maximum(a - plan.sum(axis=1), 0), jnp.maximum(b - plan.sum(axis=0), 0)
    total = off_a.sum()
    return plan + off_a[:, None] * off_b / jnp.where(total > 0, total, 1.0)


def _forward(
    problem: FusedProblem, settings: FusedSettings, masses: Masses
) -> tuple[FusedPlan, tuple[FusedProblem, Array]]:
    padded = _solved(problem, settings, masses)
    n, m = problem.linear.shape
    return FusedPlan(padded.plan[:n, :m], padded.error, padded.moved), (problem, padded.plan)


def _backward(
    settings: FusedSettings, kept: tuple[FusedProblem, Array], given: FusedPlan
) -> tuple[FusedProblem, Masses]:
    problem, plan = kept
    n, m = problem.linear.shape
    root = jnp.sqrt(plan)

    def within(z: Array) -> Array:
        """Projection to the directions that keep the marginals; z is a change of the plan over its root."""
        change = root * z
        x, y = solve_marginals(plan, change.sum(axis=1), change.sum(axis=0))
        return z - root * (x[:, None] + y)

    def curved(z: Array) -> Array:
        change = (root * z)[:n, :m]
        rows = (problem.left**2) @ change.sum(axis=1)
        columns = (problem.right**2) @ change.sum(axis=0)
        bent = 2 * (rows[:, None] + columns) - 4 * _between(problem, change)
        return within(settings.epsilon * z + root * jnp.zeros_like(plan).at[:n, :m].set(bent))

    size = jnp.abs(given.plan).max()
    size = jnp.where(size > jnp.finfo(size.dtype).tiny, size, 1.0)
    wanted = within(root * jnp.zeros_like(plan).at[:n, :m].set(given.plan / size))
    z = conjugate_gradients(curved, wanted, tolerance=PRECISION[str(plan.dtype)], most=MOST_GRADIENT_STEPS)
    direction = size * (root * z)[:n, :m]
    (back,) = jax.vjp(lambda p: linearised(p, plan[:n, :m]), problem)[1](-direction)
    return back, Masses(jnp.zeros(n, plan.dtype), jnp.zeros(m, plan.dtype))


_fused_plan.defvjp(_forward, _backward)


def _between(problem: FusedProblem, plan: Array) -> Array:
    return jnp.matmul(jnp.matmul(problem.left, plan, precision="highest"), problem.right, precision="highest")


def _log_masses(mass: Array, overlap: float | None) -> Array:
    """Log of the masses, in the partial problem followed by what of the other side is left out."""
    return jnp.log(mass) if overlap is None else jnp.append(jnp.log(mass), math.log(1 - overlap))


def _padded_cost(problem: FusedProblem, plan: Array, *, partly: bool) -> Array:
    cost = linearised(problem, plan)
    return jnp.pad(cost, ((0, 1), (0, 1))).at[-1, -1].set(FORBIDDEN) if partly else cost


def _balanced(cost: Array, log_a: Array, log_b: Array, f: Array, g: Array) -> tuple[Array, Array, Array, Array]:
    """Plan exp(f + g - cost) of masses exp(log_a), exp(log_b), its potentials, and the mass off its marginals."""
    lib, kind = ott(), str(cost.dtype)
    problem = lib.LinearProblem(lib.Geometry(cost_matrix=cost, epsilon=1.0), jnp.exp(log_a), jnp.exp(log_b))
    solver: Any = lib.Sinkhorn(
        threshold=ROUGH, inner_iterations=INNER, max_iterations=MOST_ITERATIONS, implicit_diff=None
    )
    rough = solver(problem, (f, g))

    def off(plan: Array) -> tuple[Array, Array, Array, Array]:
        off_f, off_g = plan.sum(axis=1) - jnp.exp(log_a), plan.sum(axis=0) - jnp.exp(log_b)
        return plan, off_f, off_g, jnp.abs(off_f).sum() + jnp.abs(off_g).sum()

    def newton(state: tuple[Array, ...]) -> tuple[Array, ...]:
        k, f, g, plan, off_f, off_g, error, _ = state
        step_f, step_g = solve_marginals(plan, off_f, off_g)
        # a factor, not the potentials anew: of numbers as large as the cost the exponential rounds coarsely
        trial = off(plan * jnp.exp(-step_f[:, None] - step_g))
        better = trial[3] < error

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(better, new, old)

        return (
            k + 1, kept(f - step_f, f), kept(g - step_g, g), *(kept(x, y) for x, y in zip(
                trial, (plan, off_f, off_g, error), strict=True)), better
        )  # fmt: skip

    def unbalanced(state: tuple[Array, ...]) -> Array:
        return (state[0] < NEWTON_STEPS) & (state[-2] > BALANCED[kind]) & state[-1]

    start: tuple[Array, ...] = (
        jnp.zeros((), int),
        rough.f,
        rough.g,
        *off(jnp.exp(rough.f[:, None] + rough.g - cost)),
        jnp.ones((), bool),
    )
    _, f, g, plan, _, _, error, _ = jax.lax.while_loop(unbalanced, newton, start)
    return plan, f, g, error
