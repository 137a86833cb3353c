"""How much memory a run will take at the least, looked at before it starts: the compiler aborts where it gets none."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ..data.guard import address_space, free_memory
from ..errors import DeviceMemoryError
from ..recording import device

# Measured on x86-64 with JAX 0.12, 2 cores, data aside; what is refused here would have failed a minute later.
PROGRAMS = 300 << 20  # resident: the compiler and the programs of a run, beside the imports
ADDRESSES = 2600 << 20  # address space of a process that compiles, where `ulimit -v` bounds it
WEIGHTS = 6  # the weights themselves, their gradient, Adam's two moments, the update, the best so far
BATCH = 10  # arrays of the shape of a minibatch of counts


def check_memory(make: Callable[[], Any], n_genes: int, batch_size: int) -> None:
    """Makes sure that a model can be trained before `make` makes it.

    Raises:
        DeviceMemoryError: with an estimate, and what to lower.
    """
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(make)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
    batch = 4 * n_genes * batch_size
    data = WEIGHTS * weights + BATCH * batch if device() == "cpu" else 0  # else they are in the device's memory
    need, have = PROGRAMS + data, free_memory()
    limit = address_space()
    if limit is not None:
        need, have = max((need, have), (ADDRESSES + data, limit), key=lambda pair: pair[0] - pair[1])
    if need > have:
        msg = (
            f"out of memory: training needs at least {need / 1e9:.1f} GB (weights {WEIGHTS * weights / 1e9:.1f}, "
            f"minibatches of {batch_size} cells {BATCH * batch / 1e9:.1f}), {have / 1e9:.1f} GB can be had; lower "
            "batch_size (--batch-size), n_top_genes (--n-top-genes) or hidden_dims, or free memory"
        )
        raise DeviceMemoryError(msg)
