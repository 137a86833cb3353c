"""Transcription that is switched on and off, splicing and degradation: du/dt = a(t) - b u, ds/dt = b u - g s.

The equations are linear: a gene that is on from t_on to t_off has the response to a step at t_on minus that at t_off.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALL = {jnp.dtype("float32"): 3e-2, jnp.dtype("float64"): 1e-4}  # below it the series is the more exact


class Kinetics(NamedTuple):
    """Parameters of genes, each of which may be any real number."""

    log_level: Float[Array, "*genes"]  # of alpha / beta, the unspliced RNA that an active gene reaches
    log_beta: Float[Array, "*genes"]  # splicing rate, per unit of time
    log_ratio: Float[Array, "*genes"]  # of gamma / beta
    on: Float[Array, "*genes"]  # when transcription starts
    log_span: Float[Array, "*genes"]  # how long it lasts
    log_scale: Float[Array, "*genes"]  # unspliced molecules seen per molecule, relative to spliced ones


def step_response(
    x: Float[Array, "*times"], ratio: Float[Array, "*_times"]
) -> tuple[Float[Array, "*times"], Float[Array, "*times"]]:
    """Unspliced u and spliced s at time x >= 0 in units of 1 / beta, after transcription alpha = beta has set in at 0.

    u = 1 - e^-x, s = (1 - e^-rx) / r + (e^-x - e^-rx) / (1 - r) with r = gamma / beta; finite at r = 0 and r = 1 too.
    """
    slow, apart = jnp.minimum(1.0, ratio), jnp.abs(1.0 - ratio) * x
    spliced = x * _mean_decay(ratio * x) - x * jnp.exp(-slow * x) * _mean_decay(apart)
    return -jnp.expm1(-x), spliced


def _mean_decay(z: Array) -> Array:
    """(1 - e^-z) / z, also near 0."""
    near = z < SMALL[z.dtype]
    safe = jnp.where(near, 1.0, z)
    series = 1.0 - z / 2 * (1.0 - z / 3 * (1.0 - z / 4))
    return jnp.where(near, series, -jnp.expm1(-safe) / safe)


def since(elapsed: Array, width: float) -> Array:
    """Elapsed time, 0 where it is negative; smooth over `width`: width log(1 + e^(elapsed / width))."""
    if width == 0:
        return jnp.maximum(elapsed, 0.0)
    return width * jax.nn.softplus(elapsed / width)


def curve(gene: Kinetics, t: Float[Array, "*times"], *, width: float) -> tuple[Array, Array]:
    """Unspliced (as seen) and spliced RNA at times t.

    width: of the switches, in units of t; 0 switches at once, and is exact. Else it is a solution for transcription
    that rises over this time, up to terms of its order.
    """
    beta, ratio = jnp.exp(gene.log_beta), jnp.exp(gene.log_ratio)
    level = jnp.exp(gene.log_level)
    # both switches in one array: programs with derivatives of this are half as long
    elapsed = jnp.stack([t - gene.on, t - gene.on - jnp.exp(gene.log_span)])
    u, s = step_response(beta * since(elapsed, width), ratio)
    return jnp.exp(gene.log_scale) * level * (u[0] - u[1]), level * (s[0] - s[1])


def advanced(
    u: Float[Array, "*cells"],
    s: Float[Array, "*cells"],
    *,
    alpha: Float[Array, "*_cells"],
    beta: Float[Array, "*_genes"],
    gamma: Float[Array, "*_genes"],
    time: float,
) -> tuple[Float[Array, "*cells"], Float[Array, "*cells"]]:
    """State after `time` at a constant rate of transcription; exact."""
    x, ratio = beta * time, gamma / beta
    of_u, of_s = step_response(x, ratio)
    level = alpha / beta
    fading = jnp.exp(-ratio * x)
    # what is unspliced now comes through splicing: the derivative of the step response
    passing = x * jnp.exp(-jnp.minimum(1.0, ratio) * x) * _mean_decay(jnp.abs(1.0 - ratio) * x)
    return u * jnp.exp(-x) + level * of_u, s * fading + u * passing + level * of_s
