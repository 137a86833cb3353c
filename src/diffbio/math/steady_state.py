"""The ratio of unspliced to spliced RNA at steady state, gene by gene.

La Manno et al. 2018, Nature 560:494; Bergen et al. 2020, Nature Biotechnology 38:1408, as scVelo 0.3.4 has them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LEAST_MAXIMUM = 1e-3  # scVelo: a gene's counts are divided by no less
LEAST_R2, LEAST_RATIO = 0.01, 0.01  # of genes that velocities are read from
FEWEST_GENES = 2  # fewer of them, and the fifth of all genes with the largest r2 is taken


class Ratios(NamedTuple):
    """A line through the origin for every gene."""

    gamma: Float[Array, " genes"]  # degradation in units of the splicing rate
    r2: Float[Array, " genes"]  # of the unspliced counts by the line
    velocity_genes: Bool[Array, " genes"]


@functools.partial(jax.jit, static_argnames=("share", "temperature"))
def upper_tail(
    spliced: Float[Array, "cells genes"],
    unspliced: Float[Array, "cells genes"] | None,
    *,
    share: float = 0.05,
    temperature: float = 0.0,
) -> Float[Array, "cells genes"]:
    """Weights of the `share` of the cells in which a gene is highest: s / max s + u / max u above its quantile.

    Args:
        spliced: moments; the quantile is interpolated, as numpy's.
        unspliced: None to rank by `spliced` alone.
        share: of the cells.
        temperature: of sigmoid((score - quantile) / temperature), in units of the score; 0 is the hard choice.
    """
    score = spliced / jnp.maximum(_largest(spliced), LEAST_MAXIMUM)
    if unspliced is not None:
        score = score + unspliced / jnp.maximum(_largest(unspliced), LEAST_MAXIMUM)
    bound = _quantile(score, 1.0 - share)
    if temperature > 0:
        return jax.nn.sigmoid((score - bound) / temperature)
    return (score >= bound).astype(score.dtype)


@functools.partial(jax.jit, static_argnames=("share", "temperature"))
def steady_state(
    spliced: Float[Array, "cells genes"],
    unspliced: Float[Array, "cells genes"],
    *,
    share: float = 0.05,
    temperature: float = 0.0,
) -> Ratios:
    """Ratio gamma = sum(w u s) / sum(w s²) over the cells of `upper_tail`, and which genes follow a line at all.

    Differentiable in both. Which cells are in the hard tail and which genes are read is discrete.
    """
    weights = upper_tail(spliced, unspliced, share=share, temperature=temperature)
    gamma = slope(weights * spliced, spliced, unspliced)
    residual = unspliced - gamma * spliced
    varies = ((unspliced - unspliced.mean(axis=0)) ** 2).sum(axis=0)
    r2 = jnp.where(varies > 0, 1.0 - (residual**2).sum(axis=0) / jnp.where(varies > 0, varies, 1.0), 0.0)
    found = (r2 > LEAST_R2) & (gamma > LEAST_RATIO) & (spliced > 0).any(axis=0) & (unspliced > 0).any(axis=0)
    some = r2 > jnp.quantile(r2, 0.8)
    return Ratios(gamma, r2, jnp.where(found.sum() < FEWEST_GENES, some, found))


@functools.partial(jax.jit, static_argnames=("share", "temperature"))
def stochastic(
    spliced: Float[Array, "cells genes"],
    unspliced: Float[Array, "cells genes"],
    spliced_squared: Float[Array, "cells genes"],
    spliced_unspliced: Float[Array, "cells genes"],
    *,
    share: float = 0.05,
    temperature: float = 0.0,
) -> Ratios:
    """Ratio gamma from means and second moments together, by generalised least squares.

    At steady state also 2<us> + <u> = gamma (2<s²> - <s>) (Bergen et al. 2020, eq. 9-10). The two equations are
    weighted by the inverse variance of their residuals. Genes that are no velocity genes keep their steady-state
    ratio, and r2 stays that of the steady state, as in scVelo.

    Args:
        spliced: mean over the neighbourhood, <s>.
        unspliced: <u>.
        spliced_squared: <s²>.
        spliced_unspliced: <us>.
        share: of cells in the tail.
        temperature: see `upper_tail`.
    """
    first = steady_state(spliced, unspliced, share=share, temperature=temperature)
    own = upper_tail(spliced, unspliced, share=share, temperature=temperature)
    alone = upper_tail(spliced, None, share=share, temperature=temperature)
    weights = 1.0 - (1.0 - own) * (1.0 - alone)
    variance, covariance = 2 * spliced_squared - spliced, 2 * spliced_unspliced + unspliced
    of_means = (unspliced - first.gamma * spliced).var(axis=0)
    of_second = (covariance - slope(variance, variance, covariance) * variance).var(axis=0)
    known = (of_means > 0) & (of_second > 0)
    a, b = (1.0 / jnp.where(known, v, 1.0) for v in (of_means, of_second))
    x = jnp.concatenate([weights * spliced * a, variance * b])
    gamma = slope(x, jnp.concatenate([spliced, variance]), jnp.concatenate([unspliced, covariance]))
    return first._replace(gamma=jnp.where(known & first.velocity_genes, gamma, first.gamma))


def slope(
    weighted: Float[Array, "rows genes"], x: Float[Array, "rows genes"], y: Float[Array, "rows genes"]
) -> Float[Array, " genes"]:
    """sum(weighted y) / sum(weighted x), 0 where there is nothing to divide by."""
    below = (weighted * x).sum(axis=0)
    return jnp.where(below > 0, (weighted * y).sum(axis=0) / jnp.where(below > 0, below, 1.0), 0.0)


def _largest(x: Float[Array, "cells genes"]) -> Float[Array, " genes"]:
    """Maximum of every column, with a derivative that holds where the compiler computes x twice.

    Cells of one neighbourhood tie; `max` looks for the values that are equal to it, and may then find none.
    """
    first = jnp.argmax(jax.lax.stop_gradient(x), axis=0)
    return jnp.take_along_axis(x, first[None], axis=0)[0]


def _quantile(x: Float[Array, "cells genes"], q: float) -> Float[Array, " genes"]:
    """As numpy, linear interpolation, with its rounding: between equal values it is that value exactly."""
    place = q * (len(x) - 1)
    low = int(place)
    share = place - low
    highest = jax.lax.top_k(x.T, len(x) - low)[0]  # a twentieth of the cells: much less than sorting all
    a, b = highest[:, -1], highest[:, max(len(x) - low - 2, 0)]
    return a + (b - a) * share if share < 0.5 else b - (b - a) * (1.0 - share)
