import jax
import jax.numpy as jnp
import numpy as np

from diffbio.math.callbacks import on_host


def halves(a, numbers):
    assert a.dtype == np.float64
    return {"half": a / 2, "numbers": numbers + 1}


def test_double_precision_is_not_rounded_on_the_way():
    with jax.enable_x64(True):
        a, numbers = jnp.asarray([1.0 + 1e-12, 3.0]), jnp.asarray([3, 4], jnp.int32)
        shapes = {
            "half": jax.ShapeDtypeStruct((2,), jnp.float64),
            "numbers": jax.ShapeDtypeStruct((2,), jnp.int32),
        }
        for run in (lambda a, n: on_host(halves, shapes, a, n), jax.jit(lambda a, n: on_host(halves, shapes, a, n))):
            found = run(a, numbers)
            np.testing.assert_array_equal(np.asarray(found["half"]), np.asarray(a) / 2)
            np.testing.assert_array_equal(found["numbers"], [4, 5])


def test_no_gradient_goes_through():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    grad = jax.jit(jax.grad(lambda a: (a * on_host(lambda v: v * 3, shape, a)).sum()))(jnp.ones(2))
    np.testing.assert_allclose(grad, 3.0)
