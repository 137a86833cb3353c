"""Multidimensional scaling: positions whose distances are as given, classic, by majorisation or by pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .distances import squared_euclidean
from .principal import bounded_eigh

LAST_STEP = 1e-3  # of SGD, as a share of the first


def classic_mds(distances: Float[Array, "points _points"], n_components: int) -> Float[Array, "points components"]:
    """Positions by Torgerson 1952: leading eigenvectors of -J D² J / 2, each as long as the root of its eigenvalue.

    Equals principal component scores where the distances are Euclidean. The largest coordinate of each component is
    positive; components without variance are 0.
    """
    squared = distances**2
    mean = squared.mean(axis=0)
    values, vectors = bounded_eigh((mean[:, None] + mean - squared - mean.mean()) / 2)
    values, vectors = values[::-1][:n_components], vectors[:, ::-1][:, :n_components]
    floor = jnp.finfo(distances.dtype).eps * len(distances) * jnp.maximum(values[0], jnp.finfo(distances.dtype).tiny)
    real = values > floor
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(axis=0)[None], axis=0)
    positions = vectors * jnp.where(largest < 0, -1.0, 1.0) * jnp.sqrt(jnp.where(real, values, 1.0))
    positions = jnp.where(real, positions, 0.0)
    return jnp.pad(positions, ((0, 0), (0, n_components - positions.shape[1])))


def stress(distances: Float[Array, "points _points"], positions: Float[Array, "points components"]) -> Float[Array, ""]:
    """Kruskal's stress 1: root of Σ (d - |y_i - y_j|)² / Σ d²."""
    square = (distances**2).sum()
    off = ((distances - _apart(positions)) ** 2).sum()
    return jnp.sqrt(off / jnp.where(square > 0, square, 1.0))


def smacof(
    distances: Float[Array, "points _points"], start: Float[Array, "points components"], *, n_steps: int = 30
) -> Float[Array, "points components"]:
    """Lowers the stress Σ (d - |y_i - y_j|)² by `n_steps` steps of SMACOF from `start`; differentiable throughout.

    Each is Guttman's transform G, which minimises a majorising function of the stress (de Leeuw 1977). All but the
    last are relaxed, 2 G(y) - y, which is about twice as fast (de Leeuw & Heiser 1980). Cost points² a step.
    """

    @jax.checkpoint  # else the gradient keeps (points, points) of every step
    def transform(y: jax.Array) -> jax.Array:
        apart = _apart(y)
        separate = apart > 0
        ratio = jnp.where(separate, distances / jnp.where(separate, apart, 1.0), 0.0)
        return (ratio.sum(axis=1, keepdims=True) * y - jnp.matmul(ratio, y, precision="highest")) / len(y)

    relaxed = jax.lax.scan(lambda y, _: (2 * transform(y) - y, None), start, length=max(n_steps - 1, 0))[0]
    return transform(relaxed) if n_steps > 0 else start


def sgd_mds(
    distances: Float[Array, "points _points"], start: Float[Array, "points components"], *, n_passes: int = 15
) -> Float[Array, "points components"]:
    """Lowers the same stress by moving pairs of points towards their distance (Zheng, Pawar & Goodman 2019).

    A pass meets every pair once. Pairs are played as a round-robin tournament: those of a round share no point, and
    move at once. Steps fall geometrically from 1, where a pair ends at its distance, to 0.001. Nothing is random:
    differentiable by unrolling.
    """
    n = len(start)
    even = n + n % 2  # with an odd number, one point rests in each round
    ring = jnp.arange(1, even)
    padded = jnp.pad(start, ((0, even - n), (0, 0)))
    wanted = jnp.pad(distances, ((0, even - n), (0, even - n)))

    def play(carry: tuple[jax.Array, jax.Array], turn: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        y, step = carry
        seats = jnp.concatenate([jnp.zeros(1, ring.dtype), jnp.roll(ring, turn)])
        home, away = seats[: even // 2], seats[::-1][: even // 2]
        gap = y[home] - y[away]
        square = (gap * gap).sum(axis=1)
        plays = (square > 0) & (home < n) & (away < n)
        length = jnp.sqrt(jnp.where(plays, square, 1.0))
        move = jnp.where(plays, step / 2 * (1.0 - wanted[home, away] / length), 0.0)[:, None] * gap
        return (y.at[home].add(-move).at[away].add(move), step), None

    @jax.checkpoint
    def one_pass(y: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.scan(play, (y, step), jnp.arange(even - 1))[0][0], None

    steps = jnp.geomspace(1.0, LAST_STEP, n_passes, dtype=start.dtype)
    y = jax.lax.scan(one_pass, padded, steps)[0][:n]
    return y - y.mean(axis=0)


def _apart(positions: Float[Array, "points components"]) -> Float[Array, "points _points"]:
    """Distances of the points; with gradient 0 where they coincide, as on the diagonal."""
    square = squared_euclidean(positions, positions)
    separate = (square > 0) & ~jnp.eye(len(positions), dtype=bool)
    return jnp.where(separate, jnp.sqrt(jnp.where(separate, square, 1.0)), 0.0)
