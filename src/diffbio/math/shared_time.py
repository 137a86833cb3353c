"""One time per cell, and the kinetics of every gene along it, fitted together.

The dynamical model of Bergen et al. 2020 fits a time per cell and gene. Here all genes share the cell's time (as
UniTVelo's unified mode, Gao et al. 2022, Nat. Commun. 13:6586), so that rates have a common unit and genes with little
information borrow the time of others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .blocks import mapped_in_blocks
from .splicing_kinetics import Kinetics, curve

TIMES, EARLIEST, LATEST = 201, -0.1, 1.1  # that are tried for every cell
STEP = (LATEST - EARLIEST) / (TIMES - 1)
BINS = 40  # of cells by time, where the first guess is fitted
FLOOR = 1e-4  # of a gene's mean squared residual, in units of its variance
LEVENBERG = 3  # steps for the genes in a round
LAST, NEWTON = 15, 12  # rounds for the genes alone at the end, and Newton steps after them
SETTLING = 20  # steps for a time at the end
CELLS_AT_ONCE = 256
GENES_AT_ONCE = 64
LEAST_RATIO = 1e-2  # of gamma / beta that the prior is centred at
# Gaussian priors, weak beside a hundred cells, in the order of Kinetics; None: see `_prior`
PRIOR_MEAN = (0.0, 1.5, None, 0.0, -0.7, 0.0)
PRIOR_SPREAD = (3.0, 1.5, 2.0, 0.5, 1.0, None)
TIME_SPREAD = 1.0  # of the prior of a cell's time around 1/2


class Shared(NamedTuple):
    """What is fitted."""

    genes: Kinetics  # arrays (genes,)
    time: Float[Array, " cells"]


class Problem(NamedTuple):
    """The data, scaled gene by gene."""

    unspliced: Float[Array, "cells genes"]  # divided by a gene's spread
    spliced: Float[Array, "cells genes"]
    scale_ratio: Float[Array, " genes"]  # spread of spliced over that of unspliced
    ratio: Float[Array, " genes"]  # log gamma / beta that the prior expects


def misfit(gene: Any, time: Array, data: Any, width: float) -> tuple[Array, Array]:
    """Residuals of one gene in all cells; `data` is one gene of a `Problem`."""
    u, s = curve(gene, time, width=width)
    return data.scale_ratio * u - data.unspliced, s - data.spliced


def _prior(data: Any, scale_spread: float) -> tuple[Array, Array]:
    """Mean and standard deviation of a gene's parameters."""
    mean = jnp.stack([data.ratio if m is None else jnp.asarray(m, data.ratio.dtype) for m in PRIOR_MEAN])
    return mean, jnp.asarray([scale_spread if w is None else w for w in PRIOR_SPREAD], data.ratio.dtype)


def _gene_loss(gene: Any, time: Array, data: Any, width: float, scale_spread: float) -> Array:
    u, s = misfit(gene, time, data, width)
    mean, spread = _prior(data, scale_spread)
    noise = (u**2 + s**2).mean() / 2 + FLOOR
    return len(time) * jnp.log(noise) + 0.5 * (((jnp.stack(gene) - mean) / spread) ** 2).sum()


def _levenberg(
    gene: Any, damping: Array, time: Array, data: Any, width: float, scale_spread: float
) -> tuple[Any, Array]:
    """Damped Gauss-Newton steps for one gene at given times: the gene, and the damping to go on with."""
    start, back = ravel_pytree(gene)
    mean, spread = _prior(data, scale_spread)

    def residuals(x: Array) -> Array:
        return jnp.concatenate(misfit(back(x), time, data, width))

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        x, damping, value = carry
        normal, slope = _normal_equations(residuals, x, spread)
        slope = slope + (x - mean) / spread**2
        move = jnp.linalg.solve(normal + damping * jnp.diag(jnp.diag(normal)), slope)
        tried = x - jnp.clip(move, -spread, spread)
        new = _gene_loss(back(tried), time, data, width, scale_spread)
        better = new < value
        carry = (
            jnp.where(better, tried, x),
            jnp.clip(jnp.where(better, damping / 4, damping * 6), 1e-9, 1e6),
            jnp.where(better, new, value),
        )
        return carry, None

    value = _gene_loss(gene, time, data, width, scale_spread)
    (x, damping, _), _ = jax.lax.scan(step, (start, damping, value), None, length=LEVENBERG)
    return back(x), damping


def _normal_equations(residuals: Any, x: Array, spread: Array) -> tuple[Array, Array]:
    """Gauss-Newton matrix of a gene with its priors, and the slope of its loss without them."""
    r = residuals(x)
    jacobian = jax.vmap(lambda e: jax.jvp(residuals, (x,), (e,))[1])(jnp.eye(len(x), dtype=x.dtype))
    noise = (r**2).mean() + FLOOR
    # the loss is len(time) log(noise): the weight of a residual is 1 / noise
    return jacobian @ jacobian.T / noise + jnp.diag(1.0 / spread**2), jacobian @ r / noise


def _fit_genes(z: Shared, damping: Array, data: Problem, width: float, scale_spread: float) -> tuple[Kinetics, Array]:
    columns = _columns(data)
    return mapped_in_blocks(
        lambda args: _levenberg(args[0], args[1], z.time, args[2], width, scale_spread),
        (z.genes, damping, columns),
        GENES_AT_ONCE,
    )


def _fit_times(z: Shared, data: Problem, width: float) -> Array:
    """The best time of every cell, all genes together: of a grid by one matrix product, then between its points."""
    weight = 1.0 / noise_of(z, data, width)
    grid = jnp.linspace(EARLIEST, LATEST, TIMES, dtype=z.time.dtype)
    u, s = jax.vmap(lambda t: curve(z.genes, t, width=width))(grid)
    u = u * data.scale_ratio
    cost = (weight * (u**2 + s**2)).sum(axis=1) / 2 - (data.unspliced @ (weight * u).T + data.spliced @ (weight * s).T)
    found = jnp.argmin(cost + 0.5 * ((grid - 0.5) / TIME_SPREAD) ** 2, axis=1)

    def between(args: tuple[Array, Array, Array]) -> Array:
        """The lowest point of the parabola through three points of the grid, computed without cancellation."""
        place, own_u, own_s = args

        def one(at: Array) -> Array:
            misfits = (u[at] - own_u) ** 2 + (s[at] - own_s) ** 2
            return weight @ misfits / 2 + 0.5 * ((grid[at] - 0.5) / TIME_SPREAD) ** 2

        middle = jnp.clip(place, 1, TIMES - 2)
        before, here, after = one(middle - 1), one(middle), one(middle + 1)
        bend = before - 2 * here + after
        shift = jnp.where(bend > 0, 0.5 * (before - after) / jnp.where(bend > 0, bend, 1.0), 0.0)
        return grid[middle] + jnp.clip(shift, -1.5, 1.5) * STEP

    return mapped_in_blocks(between, (found, data.unspliced, data.spliced), CELLS_AT_ONCE)


def noise_of(z: Shared, data: Problem, width: float) -> Float[Array, " genes"]:
    """Mean squared residual of every gene in units of its variance; 1 is no better than a constant of 0 spread."""
    columns = _columns(data)

    def one(args: Any) -> Array:
        u, s = misfit(args[0], z.time, args[1], width)
        return (u**2 + s**2).mean() / 2 + FLOOR

    return mapped_in_blocks(one, (z.genes, columns), GENES_AT_ONCE)


def _first_guess(time: Array, data: Problem) -> Kinetics:
    """The best of a few switches and speeds for every gene, on means of the cells by time."""
    n_bins = min(BINS, len(time))
    rank = jnp.argsort(jnp.argsort(time))
    place = rank * n_bins // len(time)
    count = jax.ops.segment_sum(jnp.ones_like(time), place, n_bins)
    middle = jax.ops.segment_sum(time, place, n_bins) / count
    u, s = (jax.ops.segment_sum(x, place, n_bins) / count[:, None] for x in (data.unspliced, data.spliced))
    starts, ends, speeds = jnp.meshgrid(
        jnp.asarray([-0.3, 0.0, 0.25, 0.5]), jnp.asarray([0.15, 0.4, 0.7, 1.0, 2.0]), jnp.asarray([2.0, 5.0, 15.0]),
        indexing="ij",
    )  # fmt: skip
    starts, ends, speeds = (x.ravel().astype(time.dtype) for x in (starts, ends, speeds))
    kept = jnp.where(ends > starts + 0.1, ends - starts, 0.5)

    def tried(start: Array, span: Array, speed: Array) -> tuple[Kinetics, Array]:
        zero = jnp.zeros_like(data.ratio)
        genes = Kinetics(zero, zero + jnp.log(speed), data.ratio, zero + start, zero + jnp.log(span), zero)
        a, b = jax.vmap(lambda t: curve(genes, t, width=0.02))(middle)
        a = a * data.scale_ratio
        above, below = (count[:, None] * (a * u + b * s)).sum(axis=0), (count[:, None] * (a * a + b * b)).sum(axis=0)
        level = jnp.maximum(above, 1e-6) / jnp.maximum(below, 1e-12)
        cost = (count[:, None] * ((level * a - u) ** 2 + (level * b - s) ** 2)).sum(axis=0)
        return genes._replace(log_level=jnp.log(level)), cost

    options, costs = jax.lax.map(lambda args: tried(*args), (starts, kept, speeds))
    best = jnp.argmin(costs, axis=0)
    return Kinetics(*(x[best, jnp.arange(len(best))] for x in options))


def _alternated(time: Array, data: Problem, width: float, scale_spread: float, rounds: int) -> Shared:
    """Fits genes to times and times to genes in turn; at the end genes alone, until they stand still."""
    z = Shared(_first_guess(time, data), time)

    def turn(carry: tuple[Shared, Array], number: Array) -> tuple[tuple[Shared, Array], None]:
        z, damping = carry
        genes, damping = _fit_genes(z, damping, data, width, scale_spread)
        z = z._replace(genes=genes)
        times = jax.lax.cond(number < rounds, lambda: _fit_times(z, data, width), lambda: z.time)
        on_grid = EARLIEST + jnp.round((times - EARLIEST) / STEP) * STEP
        return (z._replace(time=jnp.where(number < rounds - 1, times, on_grid)), damping), None

    start = (z, jnp.full_like(data.ratio, 1e-2))
    return jax.lax.scan(turn, start, jnp.arange(rounds + LAST))[0][0]


@functools.partial(jax.jit, static_argnames=("width", "scale_spread", "rounds"))
def fit(time: Float[Array, " cells"], data: Problem, *, width: float, scale_spread: float, rounds: int) -> Shared:
    """Kinetics and times in turn, from a first order of the cells.

    In the last round times are rounded to a grid (of 0.006), genes are fitted to their optimum there, and times then
    move off the grid to where they fit best. Which point of the grid a cell is at is a discrete choice outside the
    gradient, as is which of several optima the search finds. Given these, the gradients with respect to the data are
    exact: by the implicit function theorem at the optimum of each gene, and at that of each cell's time.

    Args:
        time: first guess, such as ranks / cells.
        data: see `problem`.
        width: of the switches, in units of the time.
        scale_spread: standard deviation of the prior of log_scale.
        rounds: of the alternation.
    """
    z = _alternated(*jax.lax.stop_gradient((time, data)), width, scale_spread, rounds)
    z = jax.lax.stop_gradient(z)

    @jax.checkpoint
    def gene_at_optimum(args: Any) -> Any:
        gene, column = args
        return _settled(gene, column, z.time, width, scale_spread)

    genes = mapped_in_blocks(gene_at_optimum, (z.genes, _columns(data)), GENES_AT_ONCE)
    found = Shared(genes, z.time)
    weight = 1.0 / noise_of(found, data, width)

    @jax.checkpoint
    def time_at_optimum(args: Any) -> Array:
        start, u, s = args
        return _settled_time(start, u, s, genes, data.scale_ratio, weight, width)

    times = mapped_in_blocks(time_at_optimum, (z.time, data.unspliced, data.spliced), CELLS_AT_ONCE)
    return found._replace(time=times)


def _columns(data: Problem) -> Problem:
    return data._replace(unspliced=data.unspliced.T, spliced=data.spliced.T)


def _settled(gene: Any, data: Any, time: Array, width: float, scale_spread: float) -> Any:
    """The optimum of a gene near `gene`, with its derivative by the data, -(Hessian)^-1 d(slope)."""
    fixed = jax.lax.stop_gradient(data)
    x, back = ravel_pytree(gene)

    def value(x: Array, data: Any) -> Array:
        return _gene_loss(back(x), time, data, width, scale_spread)

    def newton(carry: Any, _: None) -> tuple[Any, None]:
        x, slope, curvature, damping = carry
        tried = x - jnp.linalg.solve(curvature + damping * jnp.diag(jnp.abs(jnp.diag(curvature))), slope)
        now, new_slope = jax.value_and_grad(value)(tried, fixed)
        before = value(x, fixed)
        better = now <= before + 4 * jnp.finfo(x.dtype).eps * jnp.abs(before)
        x, slope = jnp.where(better, tried, x), jnp.where(better, new_slope, slope)
        damping = jnp.where(better, damping / 100, jnp.maximum(10 * damping, 1e-3))
        return (x, slope, jax.hessian(value)(x, fixed), damping), None

    shape = jnp.eye(len(x), dtype=x.dtype)  # a first step along the slope hardly moves, it only finds the curvature
    first = (x, jax.grad(value)(x, fixed), shape * 1e12, jnp.asarray(1e-4, x.dtype))
    (x, _, curvature, _), _ = jax.lax.scan(newton, first, None, length=NEWTON)
    x = jax.lax.stop_gradient(x)
    move = jnp.linalg.solve(jax.lax.stop_gradient(curvature), jax.grad(value)(x, data))
    return back(x - (move - jax.lax.stop_gradient(move)))


def _settled_time(
    start: Array, u: Array, s: Array, genes: Any, scale_ratio: Array, weight: Array, width: float
) -> Array:
    """The best time of a cell within two steps of the grid from `start`, with its derivative."""

    def value(t: Array, u: Array, s: Array, genes: Any, scale_ratio: Array, weight: Array) -> Array:
        a, b = curve(genes, t, width=width)
        misfits = weight @ ((scale_ratio * a - u) ** 2 + (b - s) ** 2)
        return 0.5 * misfits + 0.5 * ((t - 0.5) / TIME_SPREAD) ** 2

    given = (u, s, genes, scale_ratio, weight)
    fixed = jax.lax.stop_gradient(given)
    slope, reach = jax.grad(value), 2 * STEP

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        t, low, high = carry
        g, curvature = jax.jvp(lambda t: slope(t, *fixed), (t,), (jnp.ones_like(t),))
        low, high = jnp.where(g < 0, t, low), jnp.where(g > 0, t, high)  # the minimum stays between them
        tried = t - g / jnp.where(curvature > 0, curvature, 1.0)
        inside = (curvature > 0) & (tried > low) & (tried < high)
        done = jnp.abs(g) <= 64 * jnp.finfo(t.dtype).eps * jnp.abs(curvature)  # where rounding says which side is up
        return (jnp.where(done, t, jnp.where(inside, tried, (low + high) / 2)), low, high), None

    first = (start, start - reach, start + reach)
    t = jax.lax.stop_gradient(jax.lax.scan(step, first, None, length=SETTLING)[0][0])
    curvature = jax.jvp(lambda t: slope(t, *fixed), (t,), (jnp.ones_like(t),))[1]
    # at the end of its range a time does not follow the data
    free = (jnp.abs(t - start) < 0.999 * reach) & (curvature > 0)
    move = jnp.where(free, slope(t, *given) / jnp.where(free, jax.lax.stop_gradient(curvature), 1.0), 0.0)
    return t - (move - jax.lax.stop_gradient(move))


def problem(
    unspliced: Float[Array, "cells genes"], spliced: Float[Array, "cells genes"], ratio: Float[Array, " genes"]
) -> Problem:
    """Moments scaled by each gene's spread; `ratio` is the gamma / beta that is expected, as of steady states."""
    u, s = (_spread(x) for x in (unspliced, spliced))
    return Problem(unspliced / u, spliced / s, s / u, jnp.log(jnp.maximum(ratio, LEAST_RATIO)))


def _spread(x: Array) -> Array:
    centred = x - x.mean(axis=0)
    variance = (centred**2).mean(axis=0)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)
