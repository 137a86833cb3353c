"""Costs between slices of a tissue, and the rigid motion that lays one on the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .distances import safe_sqrt
from .ot import log_normalized


class RigidMotion(NamedTuple):
    """y -> rotation y + translation."""

    rotation: Float[Array, "dims dims"]
    translation: Float[Array, " dims"]


def kl_dissimilarity(
    x: Float[Array, "spots genes"], y: Float[Array, "other_spots genes"], pseudocount: float
) -> Float[Array, "spots other_spots"]:
    """sum_g p_ig log(p_ig / q_jg), in nats: p, q the shares of each spot's counts plus a pseudocount (Zeira 2022)."""
    p, q = (v + pseudocount for v in (x, y))
    p, q = (v / v.sum(axis=1, keepdims=True) for v in (p, q))
    cross = jnp.matmul(p, jnp.log(q).T, precision="highest")
    return (p * jnp.log(p)).sum(axis=1)[:, None] - cross


def euclidean_dissimilarity(
    x: Float[Array, "spots genes"], y: Float[Array, "other_spots genes"]
) -> Float[Array, "spots other_spots"]:
    """Euclidean distances of log(1 + counts scaled to 10,000 a spot)."""
    x, y = log_normalized(x), log_normalized(y)
    middle = jax.lax.stop_gradient(y.mean(axis=0))  # leaves the distance, and float32 from cancelling
    x, y = x - middle, y - middle
    square = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * jnp.matmul(x, y.T, precision="highest")
    return safe_sqrt(square)


def distances_within(coords: Float[Array, "spots dims"]) -> Float[Array, "spots spots"]:
    """Euclidean distances between the spots of a slice: exactly 0 and without gradient from a spot to itself."""
    # by coordinate: two or three arrays of pairs, and no cancellation
    return safe_sqrt(sum(((x[:, None] - x) ** 2 for x in coords.T), start=jnp.zeros((), coords.dtype)))


def spacing(distances: Float[Array, "spots spots"]) -> Float[Array, ""]:
    """Median over the spots of the distance to the nearest other one; who that is, is chosen outside the gradient."""
    apart = jnp.where(jnp.eye(len(distances), dtype=bool), jnp.inf, distances)
    return jnp.median(apart.min(axis=1))


def scaled_distances(
    left: Float[Array, "spots spots"], right: Float[Array, "other_spots other_spots"], scaling: str
) -> tuple[Float[Array, "spots spots"], Float[Array, "other_spots other_spots"]]:
    """Both distance matrices in the unit that `scaling` names.

    Args:
        left: of slice 1.
        right: of slice 2.
        scaling: "spacing", the mean of both slices' spacing; "max", each slice's own largest distance; "none".
    """
    if scaling == "none":
        return left, right
    if scaling == "max":
        return _over(left, left.max()), _over(right, right.max())
    unit = (spacing(left) + spacing(right)) / 2
    return _over(left, unit), _over(right, unit)


def rigid_motion(
    x: Float[Array, "spots dims"],
    y: Float[Array, "other_spots dims"],
    plan: Float[Array, "spots other_spots"],
    *,
    reflection: bool = False,
) -> RigidMotion:
    """The motion of y that minimises sum_ij plan_ij |x_i - R y_j - t|² (Procrustes); differentiable.

    Args:
        x: coordinates that stay.
        y: coordinates that are moved.
        plan: weights of the pairs, of any total.
        reflection: whether R may turn the slice over.
    """
    rows, columns = plan.sum(axis=1), plan.sum(axis=0)
    total = rows.sum()
    over = 1 / jnp.where(total > 0, total, 1.0)
    middle_x, middle_y = over * (rows @ x), over * (columns @ y)
    cross = over * ((x - middle_x).T @ plan @ (y - middle_y))
    rotation = nearest_rotation(cross, reflection=reflection)
    return RigidMotion(rotation, middle_x - rotation @ middle_y)


def moved(coords: Float[Array, "spots dims"], motion: RigidMotion) -> Float[Array, "spots dims"]:
    """The coordinates after the motion."""
    return coords @ motion.rotation.T + motion.translation


def inverse_motion(motion: RigidMotion) -> RigidMotion:
    """The motion back."""
    return RigidMotion(motion.rotation.T, -motion.rotation.T @ motion.translation)


def nearest_rotation(cross: Float[Array, "dims dims"], *, reflection: bool = False) -> Float[Array, "dims dims"]:
    """The rotation R of largest tr(R^T cross), by singular values; with `reflection` any orthogonal matrix.

    The derivative is that of the polar factor, R V ((V^T K V)_ij / (s_i + s_j)) V^T with K = R^T d - d^T R, which,
    other than that of the singular vectors, is finite where two singular values are equal. Where cross does not fix
    the rotation (s_i + s_j = 0) it is 0.
    """
    return (_orthogonal if reflection else _rotation)(cross)


def _factors(cross: Array, *, reflection: bool) -> tuple[Array, Array, Array]:
    """R, V and the eigenvalues s of R^T cross."""
    u, s, vt = jnp.linalg.svd(cross)
    turn = jnp.ones_like(s)
    if not reflection:
        turn = turn.at[-1].set(jnp.sign(jnp.linalg.det(u @ vt)))
    return (u * turn) @ vt, vt.T, s * turn


def _derivative(cross: Array, change: Array, *, reflection: bool) -> tuple[Array, Array]:
    rotation, v, s = _factors(cross, reflection=reflection)
    lean = rotation.T @ change
    both = s[:, None] + s
    fixed = both > jnp.finfo(s.dtype).eps * jnp.maximum(s[0], jnp.finfo(s.dtype).tiny)
    turned = jnp.where(fixed, (v.T @ (lean - lean.T) @ v) / jnp.where(fixed, both, 1.0), 0.0)
    return rotation, rotation @ v @ turned @ v.T


@jax.custom_jvp
def _rotation(cross: Array) -> Array:
    return _factors(cross, reflection=False)[0]


@jax.custom_jvp
def _orthogonal(cross: Array) -> Array:
    return _factors(cross, reflection=True)[0]


@_rotation.defjvp
def _rotation_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    return _derivative(primals[0], tangents[0], reflection=False)


@_orthogonal.defjvp
def _orthogonal_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    return _derivative(primals[0], tangents[0], reflection=True)


def _over(values: Array, unit: Array) -> Array:
    return values / jnp.where(unit > 0, unit, 1.0)  # 0 where all spots lie in one place
