"""Conjugate gradients that end where rounding does, instead of going on until they overflow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

DIVERGED = 1e4  # times the least squared residual so far, above which nothing better comes


def conjugate_gradients(product: Callable[[Any], Any], wanted: Any, *, tolerance: float, most: int) -> Any:
    """Solves product(x) = wanted for a symmetric product without negative eigenvalues; x is a tree as `wanted` is.

    Ends at a residual of `tolerance` times `wanted` (2-norms), after `most` steps, at a direction without curvature, or
    where the residual grows 100-fold, and gives the x of the least residual. Not differentiable itself.
    """

    def dot(a: Any, b: Any) -> jax.Array:
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))

    def plus(a: Any, factor: jax.Array, b: Any) -> Any:
        return jax.tree.map(lambda left, right: left + factor * right, a, b)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        k, x, r, p, square, best, least, _ = state
        image = product(p)
        curvature = dot(p, image)
        along = curvature > 0
        length = jnp.where(along, square / jnp.where(along, curvature, 1.0), 0.0)
        x, r = plus(x, length, p), plus(r, -length, image)
        after = dot(r, r)
        p = plus(r, after / square, p)
        better = after < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, best)
        return k + 1, x, r, p, after, best, jnp.where(better, after, least), along

    total = dot(wanted, wanted)
    limit = jnp.maximum(tolerance**2 * total, jnp.finfo(total.dtype).tiny)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        k, square, least, along = state[0], state[4], state[6], state[7]
        return (k < most) & (square > limit) & (square < DIVERGED * least) & along

    zero = jax.tree.map(jnp.zeros_like, wanted)
    start = (jnp.zeros((), int), zero, wanted, wanted, total, zero, total, jnp.ones((), bool))
    return jax.lax.while_loop(unfinished, step, start)[5]
