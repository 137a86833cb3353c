"""The arrays of a module by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from ..operators.base import from_numpy


def flat_state(module: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """All arrays of a module by name."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}


def set_state(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over arrays by name.

    Raises:
        ValueError: names or shapes differ.
    """
    flat = dict(nnx.to_flat_state(nnx.state(module)))
    names = {"/".join(map(str, path)): path for path in flat}
    if odd := sorted(set(names) ^ set(arrays)):
        msg = f"weights differ in {odd[:4]}"
        raise ValueError(msg)
    for name, path in names.items():
        value = from_numpy(arrays[name], like=flat[path][...])
        if value.shape != flat[path][...].shape:
            msg = f"{name} has shape {value.shape}, expected {flat[path][...].shape}"
            raise ValueError(msg)
        flat[path].set_value(value)
    nnx.update(module, nnx.from_flat_state(flat))
