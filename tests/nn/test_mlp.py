import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffbio.nn.mlp import MLP


def test_is_born_in_eval_mode_and_treats_cells_one_by_one():
    mlp = MLP(5, (7, 3), dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 5))
    np.testing.assert_allclose(mlp(x)[:2], mlp(x[:2]), rtol=1e-6)
    np.testing.assert_array_equal(mlp(x), mlp(x))


def test_train_mode_normalises_over_the_batch_and_moves_the_running_averages():
    mlp = MLP(5, (7,), rngs=nnx.Rngs(0))
    x = 3.0 + jax.random.normal(jax.random.key(0), (200, 5))
    block = mlp.blocks[0]
    mlp.train()
    block.norm(block.linear(x))
    mean = block.linear(x).mean(0)
    np.testing.assert_allclose(block.norm.mean[...], 0.1 * mean, rtol=1e-4)  # momentum 0.9, from 0
    np.testing.assert_allclose(block.norm(block.linear(x)).mean(0), 0.0, atol=1e-5)


def test_dropout_differs_between_calls_in_train_mode():
    mlp = MLP(5, (50,), dropout_rate=0.5, batch_norm=False, rngs=nnx.Rngs(0))
    mlp.train()
    x = jnp.ones((4, 5))
    assert jnp.abs(mlp(x) - mlp(x)).max() > 0


def test_covariates_reach_every_block_when_deep_and_the_first_otherwise():
    deep, shallow = (MLP(5, (7, 4), n_covariates=2, deep=d, rngs=nnx.Rngs(0)) for d in (True, False))
    assert [b.linear.in_features for b in deep.blocks] == [7, 9]
    assert [b.linear.in_features for b in shallow.blocks] == [7, 7]
    x, covariates = jnp.ones((3, 5)), jnp.zeros((3, 2))
    np.testing.assert_array_equal(deep(x), deep(x, covariates))  # none is no effect
    assert MLP(5, (), n_covariates=2, rngs=nnx.Rngs(0)).n_outputs == 7
