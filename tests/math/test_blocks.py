"""Sums over rows in blocks: the value and every gradient are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffbio.math.blocks import sum_in_blocks


def score(shared, rows):
    return (jnp.sin(rows["x"] @ shared["w"]) * rows["weight"]).sum() + (shared["b"] * rows["code"].sum()).sum()


@pytest.fixture
def given():
    k = jax.random.split(jax.random.key(0), 4)
    with jax.enable_x64():
        shared = {"w": jax.random.normal(k[0], (3, 2), float), "b": jax.random.normal(k[1], (), float)}
        rows = {
            "x": jax.random.normal(k[2], (4, 5, 3), float),
            "weight": jax.random.normal(k[3], (4, 5, 2), float),
            "code": jnp.arange(20).reshape(4, 5),
        }
        yield shared, rows


def whole(shared, rows):
    return sum(score(shared, jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(4))


def in_blocks(shared, rows):
    return sum_in_blocks(score, shared, rows)


def test_value_and_gradients_are_those_of_the_sum(given):
    shared, rows = given
    floats = {k: rows[k] for k in ("x", "weight")}

    def of(total):
        def value(shared, floats):
            return 3.0 * total(shared, {**rows, **floats}) ** 2

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(shared, floats)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), of(in_blocks), of(whole))


@pytest.mark.parametrize("name", ["w", "b"])
def test_a_gradient_of_one_argument_alone(given, name):
    shared, rows = given

    def of(total):
        return jax.grad(lambda part: total({**shared, name: part}, rows))(shared[name])

    np.testing.assert_allclose(of(in_blocks), of(whole), rtol=1e-12)


def test_second_derivatives(given):
    shared, rows = given

    def of(total):
        return jax.grad(lambda s: jax.grad(lambda w: total({**s, "w": w}, rows))(s["w"]).sum())(shared)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), of(in_blocks), of(whole))


def test_no_array_of_all_rows_is_kept():
    """What the gradient needs in memory does not grow with the number of blocks."""

    def wide(shared, rows):
        return jnp.tanh(rows @ shared).sum()

    def temporary(n_blocks):
        shared, rows = jnp.ones((4, 1000)), jnp.ones((n_blocks, 100, 4))
        step = jax.jit(jax.grad(lambda s: sum_in_blocks(wide, s, rows)))
        return step.lower(shared).compile().memory_analysis().temp_size_in_bytes

    assert temporary(64) < temporary(4) + 64 * 100 * 4 * 4 * 2
