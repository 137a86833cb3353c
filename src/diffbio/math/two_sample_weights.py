"""Logistic regressions that two-sample tests need: weights that balance a covariate, and a test of zeros."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ROUNDS = 25
RIDGE = 1e-3  # in standardised units; keeps slopes finite where a covariate separates


def logistic(design: Float[Array, "cells p"], target: Float[Array, " cells"]) -> Float[Array, " p"]:
    """Coefficients of the share of ones, by Newton's method; `target` from 0 to 1; gradient of the implicit function.

    All slopes but the first, the constant's, are held by a small ridge.
    """
    ridge = RIDGE * jnp.eye(design.shape[1], dtype=design.dtype).at[0, 0].set(0.0)

    def newton(beta: Array, design: Array, target: Array) -> Array:
        share = jax.nn.sigmoid(design @ beta)
        slope = design.T @ (target - share) - ridge @ beta
        fixed = jax.lax.stop_gradient((design, share))
        curvature = (fixed[0] * (fixed[1] * (1 - fixed[1]))[:, None]).T @ fixed[0] + ridge
        # where all are ones the constant runs off; its curvature does not end below this
        return jnp.linalg.solve(curvature + 1e-6 * jnp.eye(len(beta), dtype=beta.dtype), slope)

    def step(_: Array, beta: Array) -> Array:
        move = newton(beta, *jax.lax.stop_gradient((design, target)))
        return beta + move / jnp.maximum(1.0, jnp.abs(move).max() / 3.0)

    beta = jax.lax.fori_loop(0, ROUNDS, step, jnp.zeros(design.shape[1], design.dtype))
    move = newton(jax.lax.stop_gradient(beta), design, target)
    return jax.lax.stop_gradient(beta - move) + move


def standardised(covariate: Float[Array, " cells"]) -> Float[Array, " cells"]:
    """Mean 0 and variance 1; zeros where it does not vary."""
    variance = covariate.var()
    varies = variance > 0
    return jnp.where(varies, (covariate - covariate.mean()) / jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)


@jax.jit
def overlap_weights(
    first: Float[Array, " cells"], second: Float[Array, " cells"], covariate: Float[Array, " cells"]
) -> tuple[Float[Array, " cells"], Float[Array, " cells"]]:
    """Memberships weighted so that both groups have the same mean and spread of the covariate.

    Overlap weights (Li, Morgan & Zaslavsky 2018, JASA 113:390): a cell counts as much as it is likely to be in the
    other group, by a logistic regression on the covariate and its square.
    """
    x = standardised(covariate)
    design = jnp.stack([jnp.ones_like(x), x, x**2], axis=1)
    share = second / jnp.maximum(first + second, 1e-12)
    other = jax.nn.sigmoid(design @ logistic(design, share))
    return first * other, second * (1 - other)


@jax.jit
def zeros_ratio(
    seen: Float[Array, "cells genes"], second: Float[Array, " cells"], covariate: Float[Array, " cells"]
) -> Float[Array, " genes"]:
    """Twice the log likelihood ratio of a logistic regression of `seen` on the condition, beside the covariate.

    As scDD's test of zeros (Korthauer et al. 2016), with a small ridge in place of its prior. In `second`, the share
    of the second condition, gradients are exact.
    """
    x = standardised(covariate)
    one = jnp.ones_like(x)

    def of_gene(seen: Array) -> Array:
        with_condition = jnp.stack([one, x, second], axis=1)
        values = []
        for design in (with_condition[:, :2], with_condition):
            beta = logistic(design, seen)
            eta, penalty = design @ beta, 0.5 * RIDGE * (beta[1:] ** 2).sum()
            values.append((seen * eta - jax.nn.softplus(eta)).sum() - penalty)
        return jnp.maximum(2 * (values[1] - values[0]), 0.0)

    return jax.vmap(of_gene, in_axes=1)(seen)
