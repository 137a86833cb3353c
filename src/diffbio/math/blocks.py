"""Sums over many rows, a block of rows at a time, so that the arrays of a block stay in the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_in_blocks(function: Callable[[Any, Any], jax.Array], shared: Any, blocks: Any) -> jax.Array:
    """Sum over i of function(shared, blocks[i]), a number; the gradient is taken along with the value.

    Where a gradient is asked for, each block's is computed right after its value, so that nothing of a block is kept
    and nothing is computed twice. This works because the value is one number: whatever the sum is used for scales the
    gradient as a whole. It is for reverse mode.

    shared: arrays that every block reads. blocks: arrays with an axis of blocks in front.

    >>> float(sum_in_blocks(lambda w, x: (w * x**2).sum(), jnp.asarray(2.0), jnp.arange(4.0).reshape(2, 2)))
    28.0
    """

    def add(total: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return total + function(shared, block), None

    first = jax.eval_shape(function, shared, jax.tree.map(lambda x: x[0], blocks))
    return jax.lax.scan(add, jnp.zeros((), first.dtype), blocks)[0]


def _forward(function: Callable[[Any, Any], jax.Array], shared: Any, blocks: Any) -> tuple[jax.Array, Any]:
    leaves, tree = jax.tree.flatten((shared, blocks))
    n_shared = len(jax.tree.leaves(shared))
    varies = [leaf.perturbed for leaf in leaves]  # counts, say, are data
    values = [leaf.value for leaf in leaves]

    def of_block(kept: list[Any], rows: list[Any]) -> tuple[jax.Array, tuple[list[Any], list[Any]]]:
        """Value and gradients of one block."""
        parts = [*zip(kept + rows, varies, strict=True)]

        def value(moved: list[Any]) -> jax.Array:
            given = iter(moved)
            return function(*jax.tree.unflatten(tree, [next(given) if v else x for x, v in parts]))

        total, gradient = jax.value_and_grad(value)([x for x, v in parts if v])
        n = sum(varies[:n_shared])
        return total, (gradient[:n], gradient[n:])

    def add(sums: Any, rows: list[Any]) -> tuple[Any, list[Any]]:
        total, (by_shared, by_rows) = of_block(values[:n_shared], rows)
        return jax.tree.map(jnp.add, sums, (total, by_shared)), by_rows

    rows = values[n_shared:]
    shapes = jax.eval_shape(of_block, values[:n_shared], [x[0] for x in rows])
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    (total, by_shared), by_rows = jax.lax.scan(add, start, rows)
    given = iter([*by_shared, *by_rows])
    return total, jax.tree.unflatten(tree, [next(given) if v else None for v in varies])


def _backward(function: Callable[[Any, Any], jax.Array], gradient: Any, upstream: Any) -> Any:
    del function
    if isinstance(upstream, SymbolicZero):
        upstream = jnp.zeros((), upstream.dtype)
    return jax.tree.map(lambda g: upstream * g, gradient)


sum_in_blocks.defvjp(_forward, _backward, symbolic_zeros=True)


def mapped_in_blocks(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """`function` of every row, `size` rows at a time; compiled once, whatever the number of rows.

    `jax.lax.map(batch_size=)` compiles a second program for the rows that are left over; here the last block is filled
    up with rows from the start, and what comes of these is cut off.

    >>> mapped_in_blocks(lambda x: x + 1, jnp.arange(5), 2)
    Array([1, 2, 3, 4, 5], dtype=int32)
    """
    n = len(jax.tree.leaves(rows)[0])
    if n <= size:
        return jax.vmap(function)(rows)
    n_blocks = -(-n // size)
    order = jnp.arange(n_blocks * size) % n
    blocks = jax.tree.map(lambda x: x[order].reshape(n_blocks, size, *x.shape[1:]), rows)
    found = jax.lax.map(jax.vmap(function), blocks)
    return jax.tree.map(lambda x: x.reshape(n_blocks * size, *x.shape[2:])[:n], found)
