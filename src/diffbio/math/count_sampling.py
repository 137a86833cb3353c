"""Gamma and Poisson draws for every entry of a matrix of cells and genes, a stream of its own for each cell.

Each is a loop that goes on until the last entry of a block of cells is accepted; blocks fit the cache. What a cell
gets depends on its key alone. An entry whose parameter is no number, or out of range, ends at once: gamma draws are NaN
there, Poisson draws 0. On a CPU several times as fast as `jax.random.gamma` and `jax.random.poisson`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCK = 1 << 13  # entries that are drawn at once
INVERTED = 10.0  # means from here on are drawn by rejection
LOWEST = 1e-7
ROUNDS = 200  # of a rejection, each of which accepts more than four in five: a bound for loops that rounding might keep


@jax.jit
def gamma_draws(keys: Key[Array, " cells"], shape: Float[Array, "cells genes"]) -> Float[Array, "cells genes"]:
    """Gamma(shape, 1) by Marsaglia and Tsang (2000), for shapes below 1 times a power of a uniform.

    The derivative is the implicit one, -∂F/∂shape / f (Figurnov 2018): that of the law, not of the path of accepted
    draws, so it is right in expectation.
    """
    return _with_implicit_gradient(shape, jax.lax.stop_gradient(_in_blocks(_gamma_block, keys, shape)))


@jax.jit
def poisson_draws(keys: Key[Array, " cells"], mean: Float[Array, "cells genes"]) -> Int[Array, "cells genes"]:
    """Whole numbers of Poisson(mean), without a derivative: by inversion, from mean 10 on by rejection.

    The rejection is Hörmann's (1993, PTRS), its ratio of probabilities written without cancellation.
    """
    return _in_blocks(_poisson_block, keys, mean).astype(int)


@jax.jit
def thinned(keys: Key[Array, " cells"], counts: Int[Array, "cells genes"], keep: Array) -> Int[Array, "cells genes"]:
    """`counts`, each kept whole with probability `keep`, else 0."""
    return jnp.where(_uniforms(keys, 0, keep) < keep, counts, 0)


@jax.custom_jvp
def _with_implicit_gradient(shape: Array, draws: Array) -> Array:
    return draws


@_with_implicit_gradient.defjvp
def _implicit(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    shape, draws = primals
    found = draws > 0  # below the least float the shape no longer matters
    slope = jax.lax.random_gamma_grad(shape, jnp.where(found, draws, 1.0))
    return draws, jnp.where(found, slope, 0.0) * tangents[0]


def _in_blocks(draw: Callable[[Array, Array], Array], keys: Array, parameter: Array) -> Array:
    held = jax.lax.stop_gradient(parameter)
    n, g = held.shape
    rows = max(1, min(n, BLOCK // max(g, 1)))
    n_blocks = -(-n // rows)
    if n_blocks <= 1:
        return draw(keys, held)
    places = jnp.minimum(jnp.arange(n_blocks * rows), n - 1).reshape(n_blocks, rows)
    drawn = jax.lax.map(lambda rows: draw(keys[rows], held[rows]), places)
    return drawn.reshape(-1, g)[:n]


def _uniforms(keys: Array, step: Any, like: Array) -> Array:
    width = like.shape[1:]
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), width, like.dtype, LOWEST))(keys)


def _normals(keys: Array, step: Any, like: Array) -> Array:
    width = like.shape[1:]
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), width, like.dtype))(keys)


def _gamma_block(keys: Array, shape: Array) -> Array:
    drawable = jnp.isfinite(shape) & (shape > 0)
    held = jnp.where(drawable, shape, 1.0)
    d = jnp.where(held < 1, held + 1, held) - 1 / 3
    c = 1 / jnp.sqrt(9 * d)

    def step(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        i, draws, done = state
        z, u = _normals(keys, 2 * i + 1, shape), _uniforms(keys, 2 * i + 2, shape)
        v = (1 + c * z) ** 3
        accepted = (v > 0) & (jnp.log(u) < 0.5 * z * z + d * (1 - v + jnp.log(jnp.maximum(v, 1e-30))))
        return i + 1, jnp.where(done | ~accepted, draws, d * v), done | accepted

    draws = jax.lax.while_loop(_is_rejecting, step, (jnp.asarray(0), d, ~drawable))[1]
    draws = jnp.where(held < 1, draws * jnp.exp(jnp.log(_uniforms(keys, 0, shape)) / held), draws)
    return jnp.where(drawable, draws, jnp.nan)


def _is_rejecting(state: tuple[Any, Array, Array]) -> Array:
    i, _, done = state
    return (i < ROUNDS) & ~done.all()


def _poisson_block(keys: Array, mean: Array) -> Array:
    few = jnp.where(mean < INVERTED, mean, 0.0)
    u = _uniforms(keys, 0, mean)

    def climb(state: tuple[Any, Array, Array, Array]) -> tuple[Any, Array, Array, Array]:
        k, count, p, cdf = state
        above = u > cdf
        p = p * few / (k + 1)
        return k + 1, count + above, p, cdf + p

    def goes_on(state: tuple[Any, Array, Array, Array]) -> Array:
        k, _, p, cdf = state
        return ((u > cdf) & ((k < few) | (p > 1e-9))).any()  # rounding may leave cdf below u for ever

    p = jnp.exp(-few)
    start = (jnp.asarray(0.0, mean.dtype), jnp.zeros_like(mean), p, p)
    count = jax.lax.while_loop(goes_on, climb, start)[1]
    many = (mean >= INVERTED) & jnp.isfinite(mean)
    return jax.lax.cond(many.any(), lambda: jnp.where(many, _rejected(keys, mean, many), count), lambda: count)


def _rejected(keys: Array, mean: Array, many: Array) -> Array:
    m = jnp.where(many, mean, INVERTED)
    b = 0.931 + 2.53 * jnp.sqrt(m)
    a = -0.059 + 0.02483 * b
    log_alpha = jnp.log(1.1239 + 1.1328 / (b - 3.4))
    inner = 0.9277 - 3.6224 / (b - 2)

    def log_ratio(k: Array) -> Array:
        """Poisson log probability of k by Stirling's series: k - m - k log(k / m), without large terms."""
        whole = jnp.maximum(k, 1.0)
        series = 1 / (12 * whole) - 1 / (360 * whole**3)
        value = whole - m - whole * jnp.log1p((whole - m) / m) - 0.5 * jnp.log(2 * jnp.pi * whole) - series
        return jnp.where(k < 1, -m, value)

    def step(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        i, count, done = state
        u, v = _uniforms(keys, 2 * i + 1, mean) - 0.5, _uniforms(keys, 2 * i + 2, mean)
        us = 0.5 - jnp.abs(u)
        k = jnp.floor((2 * a / us + b) * u + m + 0.43)
        sure = (us >= 0.07) & (v <= inner)
        never = (k < 0) | ((us < 0.013) & (v > us))
        tested = jnp.log(v) + log_alpha - jnp.log(a / us**2 + b) <= log_ratio(k)
        accepted = sure | (~never & tested)
        return i + 1, jnp.where(done | ~accepted, count, k), done | accepted

    return jax.lax.while_loop(_is_rejecting, step, (jnp.asarray(0), jnp.floor(m), ~many))[1]
