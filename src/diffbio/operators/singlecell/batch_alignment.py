"""What the two autoencoders that align batches share, by MMD and by a critic: checks, start, decoding without batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...errors import ConfigError, DataError
from ...nn.batch_autoencoder import BatchAutoencoder
from ...nn.count_vae import one_hot_batch
from ..base import Data, Operator, checked_finite

OVERLAP_WIDTH = 0.25  # of the density that says what batches share, in units of the bandwidth


def check_sizes(config: Any) -> None:
    """Refuses settings that do not fit each other.

    Raises:
        ConfigError: a latent space wider than the input, or a reference batch that is none.
    """
    who = type(config).__name__
    if config.latent_dim > config.n_genes:
        msg = f"{who}.latent_dim must be at most n_genes, {config.n_genes}; got {config.latent_dim}."
        raise ConfigError(msg)
    if config.reference_batch is not None and config.reference_batch >= config.n_batches:
        msg = f"{who}.reference_batch must be below n_batches, {config.n_batches}; got {config.reference_batch}."
        raise ConfigError(msg)


def read_cells(op: Operator, expression: Array, batch_labels: Array) -> tuple[Array, Array]:
    """The checked values, and a row of zeros and a one per cell.

    Raises:
        DataError: a label out of range, or values that are not finite (of counts, negative).
    """
    who = type(op).__name__
    config: Any = op.config
    lowest = -np.inf if config.reconstruction == "expression" else 0.0
    x = checked_finite(who, expression, key="expression", lowest=lowest)
    batch = one_hot_batch(batch_labels, config.n_batches, who=who)
    assert batch is not None
    return x, batch.astype(x.dtype)


def start_from(op: Any, data: Data) -> None:
    """`init_from` of both autoencoders: their start from data, on the host."""
    inputs = op._inputs(data)
    read_cells(op, inputs["expression"], inputs["batch_labels"])
    x, labels = np.asarray(inputs["expression"]), np.asarray(inputs["batch_labels"])
    if op.config.n_batches < 2:
        msg = f"{type(op).__name__}: n_batches is 1: there is nothing to correct; pass the number of batches."
        raise DataError(msg)
    op.autoencoder.start_from(x, labels, who=type(op).__name__)


def corrected_expression(autoencoder: BatchAutoencoder, x: Array, z: Array, reference_batch: int | None) -> Array:
    """Decoded without the batch; of counts, the expected ones at the cell's own library size."""
    decoded = autoencoder.without_batch(z, reference_batch)
    return decoded if autoencoder.likelihood == "expression" else decoded * x.sum(axis=1, keepdims=True)


def example_cells() -> Data:
    """15 cells of three batches that lie apart, for the contract."""
    x = jax.random.normal(jax.random.key(0), (15, 6))
    labels = jnp.arange(15) % 3
    return {"expression": x + labels[:, None], "batch_labels": labels}
