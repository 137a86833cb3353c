"""Unbalanced entropic transport between two sets of cells, with an exact gradient; solved by ott-jax.

The plan P (cells, later_cells) between masses a and b minimises

    <C, P> + eps KL(P | 1/(n m)) + lambda1 KL(P 1 | a) + lambda2 KL(P^T 1 | b)

(Chizat et al. 2018; Waddington-OT: Schiebinger et al. 2019, Cell 176:928). It is
P_ij = exp((f_i + g_j - C_ij) / eps) / (n m), with the potentials f and g that the two marginal conditions fix. An
infinite lambda holds its marginal exactly.
"""

import math
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .conjugate import conjugate_gradients
from .distances import safe_sqrt, squared_euclidean
from .principal import principal_components

LARGEST = 10.0  # standard deviations above the mean
MOST_DENSE = 25_000_000  # pairs of cells of which an array is made
MOST_ITERATIONS = 5000
INNER = 10  # iterations between two looks at the error
DECAY = 0.8  # of epsilon from one iteration to the next, from the median cost down
ROUGH = {"float64": 1e-6, "float32": 1e-4}  # mass off its marginal, where Newton's method takes over
CONVERGED = {"float64": 1e-5, "float32": 1e-4}  # of the mass; above, a warning
NEWTON_STEPS = 3
LEAST = {"float64": -600.0, "float32": -70.0}  # log of a cell's growth as a solve counts it; less could be 0 mass
PRECISION = {"float64": 1e-13, "float32": 1e-6}  # of the linear solves, relative


class Coupling(NamedTuple):
    """A transport plan. Row i of `plan` holds the descendants of cell i; n times its sum is the cell's growth."""

    plan: Float[Array, "cells later_cells"]
    growth: Float[Array, " cells"]  # descendants of each cell
    error: Float[Array, ""]  # mass that is off its marginal condition, of the total
    f: Float[Array, " cells"]  # potentials, in units of the cost
    g: Float[Array, " later_cells"]


class Potentials(NamedTuple):
    """Dual variables of the two marginals, in units of cost."""

    f: Float[Array, " cells"]
    g: Float[Array, " later_cells"]
    error: Float[Array, ""]  # as in `Coupling`


def ott() -> Any:
    """The parts of ott-jax in use, imported when first needed (it takes seconds)."""
    with warnings.catch_warnings():  # its import of jaxopt, which is not maintained, says so
        warnings.simplefilter("ignore", DeprecationWarning)
        from ott.geometry import epsilon_scheduler, geometry, pointcloud
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn, sinkhorn_lr
    return SimpleNamespace(
        Epsilon=epsilon_scheduler.Epsilon, Geometry=geometry.Geometry, PointCloud=pointcloud.PointCloud,
        LinearProblem=linear_problem.LinearProblem, Sinkhorn=sinkhorn.Sinkhorn, LRSinkhorn=sinkhorn_lr.LRSinkhorn,
    )  # fmt: skip


def log_normalized(counts: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """log(1 + counts scaled to a total of 10,000 in each cell); a cell without counts stays 0."""
    total = counts.sum(axis=1, keepdims=True)
    return jnp.log1p(counts * jnp.where(total > 0, 1e4 / jnp.where(total > 0, total, 1.0), 0.0))


def local_components(
    x: Float[Array, "cells genes"], y: Float[Array, "later_cells genes"], n_components: int, *, unit_variance: bool
) -> tuple[Float[Array, "cells components"], Float[Array, "later_cells components"]]:
    """Principal components of both sets together, as Waddington-OT has them for each pair of time points.

    Differentiable. `unit_variance` divides every gene by its standard deviation over both sets and cuts what lies more
    than 10 of them above the mean down to 10; a gene that does not vary counts nothing. At most as many components as
    cells or genes.
    """
    both = jnp.concatenate([x, y])
    both = both - both.mean(axis=0)
    if unit_variance:
        spread = safe_sqrt((both * both).mean(axis=0))
        both = both * jnp.where(spread > 1e-6, 1.0 / jnp.where(spread > 1e-6, spread, 1.0), 0.0)
        both = jnp.minimum(both, LARGEST)
    scores = principal_components(both, min(n_components, *both.shape)).scores
    return scores[: len(x)], scores[len(x) :]


def median_cost(
    x: Float[Array, "cells features"], y: Float[Array, "later_cells features"]
) -> Float[Array, "cells later_cells"]:
    """Squared Euclidean distances divided by their median; 0 where the median is 0."""
    cost = squared_euclidean(x, y)
    middle = jnp.median(cost)
    return cost * jnp.where(middle > 0, 1.0 / jnp.where(middle > 0, middle, 1.0), 0.0)


@partial(jax.jit, static_argnames=("epsilon", "lambda1", "lambda2", "growth_iterations"))
def coupling(
    cost: Float[Array, "cells later_cells"],
    growth: Float[Array, " cells"],
    *,
    epsilon: float,
    lambda1: float,
    lambda2: float,
    growth_iterations: int = 1,
) -> Coupling:
    """The plan from masses growth_i / n to equal masses of the same total; differentiable in cost and growth.

    Args:
        cost: such as `median_cost`.
        growth: expected descendants of each cell, > 0.
        epsilon: of the entropy, in units of the cost.
        lambda1: how strongly the rows keep to the growth; `inf` holds them to it.
        lambda2: how strongly the columns keep to equal masses.
        growth_iterations: solves in all: each after the first starts from the growth that the plan before it gave,
            its row sums (as wot's growth_iters).
    """
    n, m = cost.shape
    regularisation = (epsilon, lambda1, lambda2)

    def solve(state: tuple[Array, Potentials], _: None) -> tuple[tuple[Array, Potentials], None]:
        log_growth, before = state
        log_growth = jnp.maximum(log_growth, LEAST[str(cost.dtype)])
        log_b = jax.nn.logsumexp(log_growth) - math.log(n) - math.log(m)
        found = potentials(
            cost, log_growth - math.log(n), jnp.full(m, log_b), jax.lax.stop_gradient(before), regularisation
        )
        refined = jax.nn.logsumexp((found.f[:, None] + found.g - cost) / epsilon, axis=1) - math.log(m)
        return (refined, found), None

    zero = jnp.zeros((), cost.dtype)
    start = Potentials(jnp.zeros(n, cost.dtype), jnp.zeros(m, cost.dtype), zero)
    given = jnp.log(growth).astype(cost.dtype)
    (refined, found), _ = jax.lax.scan(solve, (given, start), length=growth_iterations)
    return Coupling(_plan(cost, found.f, found.g, epsilon), jnp.exp(refined), found.error, found.f, found.g)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def potentials(
    cost: Float[Array, "cells later_cells"],
    log_a: Float[Array, " cells"],
    log_b: Float[Array, " later_cells"],
    start: Potentials,
    regularisation: tuple[float, float, float],
) -> Potentials:
    """Potentials of the plan between masses exp(log_a) and exp(log_b); regularisation: epsilon, lambda1, lambda2.

    Log-domain Sinkhorn iterations of ott-jax, with epsilon falling from the median cost, then Newton's method, which
    brings the marginal conditions to rounding. The gradient is that of the conditions (implicit function theorem) by
    conjugate gradients on their exact Hessian; ott 0.6's own differs from it by up to 2 percent.
    """
    epsilon, lambda1, lambda2 = regularisation
    kind = str(cost.dtype)
    lib, (n, m) = ott(), cost.shape
    # ott's entropy has no reference measure; a constant cost puts 1 / (n m) in
    shifted = cost + epsilon * math.log(n * m)
    scheduled = INNER * math.ceil(max(math.log(max(1 / epsilon, 1.0)) / -math.log(DECAY), 1.0) / INNER)
    geometry = lib.Geometry(cost_matrix=shifted, epsilon=lib.Epsilon(epsilon, init=max(1 / epsilon, 1.0), decay=DECAY))
    problem = lib.LinearProblem(
        geometry, jnp.exp(log_a), jnp.exp(log_b), tau_a=_tau(lambda1, epsilon), tau_b=_tau(lambda2, epsilon)
    )
    solver = lib.Sinkhorn(
        threshold=ROUGH[kind], inner_iterations=INNER, max_iterations=MOST_ITERATIONS,
        min_iterations=scheduled - 1,  # ott takes an error not yet measured at `min_iterations` for divergence
        recenter_potentials=True, implicit_diff=None,
    )  # fmt: skip
    solved = solver(problem, (start.f, start.g))

    def newton(at: Potentials, _: None) -> tuple[Potentials, None]:
        off_f, off_g, error = _residual(cost, log_a, log_b, at.f, at.g, regularisation)
        step_f, step_g = _inverse(cost, at.f, at.g, off_f, off_g, regularisation)
        f, g = at.f - epsilon * step_f, at.g - epsilon * step_g
        after = _residual(cost, log_a, log_b, f, g, regularisation)[2]
        better = after < error
        return Potentials(jnp.where(better, f, at.f), jnp.where(better, g, at.g), jnp.where(better, after, error)), None

    at = Potentials(solved.f, solved.g, jnp.zeros((), cost.dtype))
    return jax.lax.scan(newton, at, length=NEWTON_STEPS)[0]


def _forward(
    cost: Array, log_a: Array, log_b: Array, start: Potentials, regularisation: tuple[float, float, float]
) -> tuple[Potentials, tuple[Array, Array, Array]]:
    found = potentials(cost, log_a, log_b, start, regularisation)
    return found, (cost, found.f, found.g)


def _backward(
    regularisation: tuple[float, float, float], kept: tuple[Array, Array, Array], given: Potentials
) -> tuple[Array, Array, Array, Potentials]:
    cost, f, g = kept
    epsilon = regularisation[0]
    x, y = _inverse(cost, f, g, given.f, given.g, regularisation)
    plan = _plan(cost, f, g, epsilon)
    none = Potentials(jnp.zeros_like(f), jnp.zeros_like(g), jnp.zeros_like(given.error))
    return plan * (x[:, None] + y), epsilon * x * plan.sum(axis=1), epsilon * y * plan.sum(axis=0), none


potentials.defvjp(_forward, _backward)


def _tau(strength: float, epsilon: float) -> float:
    """Exponent of a marginal in Sinkhorn's iteration; 1 where it is held exactly."""
    return 1.0 if math.isinf(strength) else strength / (strength + epsilon)


def _plan(cost: Array, f: Array, g: Array, epsilon: float) -> Array:
    n, m = cost.shape
    return jnp.exp((f[:, None] + g - cost) / epsilon - math.log(n * m))


def _residual(
    cost: Array, log_a: Array, log_b: Array, f: Array, g: Array, regularisation: tuple[float, float, float]
) -> tuple[Array, Array, Array]:
    """By how much each marginal misses its condition, and the sum of that as a share of the mass."""
    epsilon, lambda1, lambda2 = regularisation
    plan = _plan(cost, f, g, epsilon)
    off_f = plan.sum(axis=1) - jnp.exp(log_a - f / lambda1)
    off_g = plan.sum(axis=0) - jnp.exp(log_b - g / lambda2)
    return off_f, off_g, (jnp.abs(off_f).sum() + jnp.abs(off_g).sum()) / plan.sum()


def _inverse(
    cost: Array, f: Array, g: Array, u: Array, v: Array, regularisation: tuple[float, float, float]
) -> tuple[Array, Array]:
    """Epsilon times the inverse Jacobian of the marginal conditions."""
    epsilon, lambda1, lambda2 = regularisation
    return solve_marginals(_plan(cost, f, g, epsilon), u, v, slack=(epsilon / lambda1, epsilon / lambda2))


def solve_marginals(
    plan: Float[Array, "cells later_cells"],
    u: Float[Array, " cells"],
    v: Float[Array, " later_cells"],
    *,
    slack: tuple[float, float] = (0.0, 0.0),
) -> tuple[Float[Array, " cells"], Float[Array, " later_cells"]]:
    """Solves [[D1, P], [P^T, D2]] (x, y) = (u, v), D the row and column sums of P times 1 + slack.

    With both marginals held exactly (no slack) the system is singular: x + c and y - c are one solution. Then the one
    without such a part is taken; the right sides have none but rounding.
    """
    tiny = jnp.finfo(plan.dtype).tiny
    size = jnp.maximum(jnp.abs(u).max(), jnp.abs(v).max())
    size = jnp.where(size > tiny, size, 1.0)
    u, v = u / size, v / size  # squares of very small right sides would be 0
    rows, columns = jnp.maximum(plan.sum(axis=1), tiny), jnp.maximum(plan.sum(axis=0), tiny)
    # scaled to a unit diagonal, which leaves the smallest mass as good a pivot as the largest
    left, right = 1 / jnp.sqrt(rows * (1 + slack[0])), 1 / jnp.sqrt(columns * (1 + slack[1]))

    singular = slack == (0.0, 0.0)
    shift = jnp.sqrt(rows / (2 * rows.sum())), -jnp.sqrt(columns / (2 * columns.sum()))  # of unit length

    def along(z: tuple[Array, Array], amount: float) -> tuple[Array, Array]:
        part = amount * (shift[0] @ z[0] + shift[1] @ z[1])
        return z[0] + part * shift[0], z[1] + part * shift[1]

    def product(z: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = z
        both = x + left * (plan @ (right * y)), y + right * ((left * x) @ plan)
        if not singular:
            return both
        more = along(z, 1.0)
        return both[0] + more[0] - x, both[1] + more[1] - y

    wanted = (left * u, right * v)
    x, y = conjugate_gradients(
        product, along(wanted, -1.0) if singular else wanted, tolerance=PRECISION[str(plan.dtype)], most=500
    )
    return size * left * x, size * right * y
