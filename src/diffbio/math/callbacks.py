"""Functions of the host (NumPy, SciPy) as steps of a JAX program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_host(function: Callable[..., Any], shapes: Any, *given: Any) -> Any:
    """`function` of NumPy arrays: at once where values are known, else as a callback of the compiled program.

    No gradient goes through it. Double precision passes unharmed, also where `jax.enable_x64` holds in this thread
    only: callbacks run in another one, where JAX would round.

    Args:
        function: takes as many arrays as are given.
        shapes: a tree of `jax.ShapeDtypeStruct`, in the form that `function` returns; results are cast to its dtypes.
        given: arrays.
    """
    given = tuple(jax.lax.stop_gradient(jnp.asarray(a)) for a in given)

    def call(*arrays: np.ndarray) -> Any:
        found = function(*arrays)
        return jax.tree.map(lambda shape, value: np.asarray(value, shape.dtype).reshape(shape.shape), shapes, found)

    if not any(isinstance(a, jax.core.Tracer) for a in given):
        return jax.tree.map(jnp.asarray, call(*(np.asarray(a) for a in given)))
    doubled = [a.dtype == jnp.float64 for a in given]
    words = [_as_words(a) if double else a for a, double in zip(given, doubled, strict=True)]

    def call_in_words(*arrays: Any) -> Any:
        own = [
            _from_words(np.asarray(a)) if double else np.asarray(a) for a, double in zip(arrays, doubled, strict=True)
        ]
        return jax.tree.map(lambda a: _to_words(a) if a.dtype == np.float64 else a, call(*own))

    in_words = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((*s.shape, 2), jnp.uint32) if s.dtype == jnp.float64 else s, shapes
    )
    found = jax.pure_callback(call_in_words, in_words, *words, vmap_method="sequential")
    return jax.tree.map(
        lambda s, a: jax.lax.bitcast_convert_type(a, jnp.float64) if s.dtype == jnp.float64 else a, shapes, found
    )


def _as_words(a: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(a, jnp.uint32)


def _to_words(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).reshape(*a.shape, 1).view(np.uint32)


def _from_words(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(np.float64)[..., 0]
