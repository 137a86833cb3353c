"""The fully connected block of the count models."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class DenseBlock(nnx.Module):
    """relu(batch_norm(x W)), then dropout; x W + b in place of the norm when it is off. Born in eval mode.

    With layer_norm, every cell is brought to mean 0 and variance 1 over the outputs before the relu, without
    weights, as in scVI.

    Epsilon 1e-3 as in scVI. Momentum 0.9 instead of its 0.99: an epoch of a small data set has few steps, and
    running averages that lag behind the weights shift what eval mode decodes.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        *,
        dropout_rate: float = 0.0,
        batch_norm: bool = True,
        layer_norm: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        # the norm subtracts the mean, so a bias in front of it would do nothing
        self.linear = nnx.Linear(n_inputs, n_outputs, use_bias=not batch_norm, rngs=rngs)
        self.norm = nnx.data(
            nnx.BatchNorm(n_outputs, use_running_average=True, momentum=0.9, epsilon=1e-3, rngs=rngs)
            if batch_norm
            else None
        )
        self.layer_norm = nnx.data(
            nnx.LayerNorm(n_outputs, epsilon=1e-5, use_bias=False, use_scale=False, rngs=rngs) if layer_norm else None
        )
        self.dropout = nnx.Dropout(dropout_rate, deterministic=True, rngs=rngs)

    def __call__(self, x: Float[Array, "cells inputs"]) -> Float[Array, "cells outputs"]:
        """Of every cell by itself in eval mode; in train mode the norm is over the batch."""
        h = self.linear(x)
        h = h if self.norm is None else self.norm(h)
        h = h if self.layer_norm is None else self.layer_norm(h)
        return self.dropout(jax.nn.relu(h))


class MLP(nnx.Module):
    """Dense blocks one after the other; covariates are appended to the input of the first or of every block.

    hidden_dims: width of each block; empty is the identity on [x, covariates].
    n_covariates: width of the covariates.
    deep: append them to every block's input (scVI's deep injection), not to the first alone.
    batch_norm, layer_norm: of every block.
    """

    def __init__(
        self,
        n_inputs: int,
        hidden_dims: tuple[int, ...],
        *,
        n_covariates: int = 0,
        deep: bool = True,
        dropout_rate: float = 0.0,
        batch_norm: bool = True,
        layer_norm: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.n_covariates = n_covariates
        self.deep = deep
        widths = (n_inputs, *hidden_dims)
        self.blocks = nnx.List(
            [
                DenseBlock(
                    before + (n_covariates if deep or i == 0 else 0),
                    after,
                    dropout_rate=dropout_rate,
                    batch_norm=batch_norm,
                    layer_norm=layer_norm,
                    rngs=rngs,
                )
                for i, (before, after) in enumerate(itertools.pairwise(widths))
            ]
        )
        self.n_outputs = widths[-1] + (n_covariates if not hidden_dims else 0)

    def __call__(
        self, x: Float[Array, "cells inputs"], covariates: Float[Array, "cells covariates"] | None = None
    ) -> Float[Array, "cells outputs"]:
        """Runs the blocks. covariates: None counts as zeros, that is, no effect of any of them."""
        if covariates is None and self.n_covariates:
            covariates = jnp.zeros((x.shape[0], self.n_covariates), x.dtype)
        h = x
        for i, block in enumerate(self.blocks):
            h = block(_append(h, covariates) if self.deep or i == 0 else h)
        return h if self.blocks else _append(h, covariates)


def _append(x: jax.Array, covariates: jax.Array | None) -> jax.Array:
    return x if covariates is None else jnp.concatenate([x, covariates.astype(x.dtype)], axis=-1)
