"""Small minimisations that many genes need at once: Newton's method within a box, and the gradient of its result."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

FLAT = 1e-6  # of the largest curvature: below it a direction is taken to be flat
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-7, 1e8

Loss = Callable[[Array, Any], Array]  # (parameters (p,), data) -> ()


class _Progress(NamedTuple):
    at: Array  # (p,)
    value: Array  # ()
    damping: Array  # ()
    step: Array  # ()
    moving: Array  # ()


def minimize(
    loss: Loss,
    start: Float[Array, " p"],
    data: Any,
    *,
    lower: Float[Array, " p"],
    upper: Float[Array, " p"],
    n_steps: int,
) -> Float[Array, " p"]:
    """A local minimum within a box: Newton steps by |eigenvalues| (saddles repel), damped until the loss falls.

    Meant for `jax.vmap`: problems that have ended wait for the others. No gradient flows through the search;
    `with_implicit_gradient` gives its result one.

    Args:
        loss: of parameters and `data`; parameters of order 1.
        start: within the box.
        data: a tree of arrays; all that a gradient is wanted of.
        lower: of the box, infinite where there is none.
        upper: likewise.
        n_steps: at most; the search ends where the quadratic model promises nothing above rounding.
    """
    start, data, lower, upper = jax.lax.stop_gradient((start, data, lower, upper))
    slope, curvature, rounding = jax.grad(loss), jax.hessian(loss), float(jnp.finfo(start.dtype).eps)
    noise, tolerance = 4 * rounding, rounding**1.4

    def advance(now: _Progress) -> _Progress:
        gradient = slope(now.at, data)
        free = _free(now.at, gradient, lower, upper)
        size, turn = _model(curvature(now.at, data), free)
        along = turn.T @ jnp.where(free, gradient, 0.0)  # what leaves the box is no part of the model
        damped = size + now.damping * size.max()
        ahead = jnp.clip(now.at - turn @ (along / damped), lower, upper)
        reached = loss(ahead, data)
        # near a minimum the loss is flat to rounding while the gradient still tells where it is
        better = reached < now.value + noise * (1e-3 + jnp.abs(now.value))
        damping = jnp.where(better, jnp.maximum(now.damping * 0.1, LEAST_DAMPING), now.damping * 8.0)
        return _Progress(
            jnp.where(better, ahead, now.at),
            jnp.where(better, reached, now.value),
            damping,
            now.step + 1,
            ((along**2 / size).sum() > tolerance) & (damping < MOST_DAMPING),
        )

    first = _Progress(
        start, loss(start, data), jnp.asarray(FIRST_DAMPING, start.dtype), jnp.zeros((), jnp.int32),
        jnp.ones((), bool),
    )  # fmt: skip
    return jax.lax.while_loop(lambda now: (now.step < n_steps) & now.moving, advance, first).at


def with_implicit_gradient(
    loss: Loss, at: Float[Array, " p"], data: Any, *, lower: Float[Array, " p"], upper: Float[Array, " p"]
) -> Float[Array, " p"]:
    """A minimum as a function of `data`: the value `at`, with the derivative of the implicit function.

    Parameters that rest on a side of the box stay there: their derivative is 0, and so is that along flat directions,
    of a curvature below 1e-6 of the largest.
    """
    at, fixed = jax.lax.stop_gradient((at, data))
    free = _free(at, jax.grad(loss)(at, fixed), lower, upper)
    size, turn = jax.lax.stop_gradient(_model(jax.hessian(loss)(at, fixed), free))
    gradient = jnp.where(free, jax.grad(loss)(at, data), 0.0)
    flat = size <= 1.01 * FLAT * size.max()
    move = turn @ jnp.where(flat, 0.0, (turn.T @ gradient) / size)
    return at - (move - jax.lax.stop_gradient(move))


def _free(at: Array, gradient: Array, lower: Array, upper: Array) -> Bool[Array, " p"]:
    return ~(((at <= lower) & (gradient > 0)) | ((at >= upper) & (gradient < 0)) | (lower == upper))


def _model(hessian: Array, free: Array) -> tuple[Array, Array]:
    """Curvatures, made positive, along directions of the free parameters."""
    values, turn = jnp.linalg.eigh(jnp.where(free[:, None] & free, hessian, 0.0))
    size = jnp.abs(values)
    largest = size.max()
    return jnp.maximum(size, jnp.where(largest > 0, FLAT * largest, 1.0)), turn
