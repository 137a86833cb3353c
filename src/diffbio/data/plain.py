"""Values turned into types that every reader of .h5ad and .zarr knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy import sparse


def to_numpy(value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array of numpy or any array library (jax) as numpy; bfloat16 and the like become float32."""
    array = np.asarray(value)
    if array.dtype.kind == "V" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        array = array.astype(np.float32)
    return np.ascontiguousarray(array) if array.ndim else array


def plain(value: Any) -> Any:
    """Return `value` as dicts, numpy arrays, sparse matrices, data frames, str, bool, int and float.

    None becomes "none", a list of unlike things JSON text, and "/" in a key "|", since anndata refuses it.
    """
    if value is None:
        return "none"
    if isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key).replace("/", "|"): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return _plain_list(sorted(value, key=str) if isinstance(value, set | frozenset) else list(value))
    if sparse.issparse(value):
        return cast("Any", sparse.csr_matrix)(value)
    if type(value).__module__.split(".")[0] == "pandas":
        return value
    if hasattr(value, "__array__"):
        array = to_numpy(value)
        return plain(array.item()) if array.ndim == 0 else array
    return str(value)


def _plain_list(values: list[Any]) -> Any:
    if all(isinstance(item, str | Path) for item in values):
        return np.array([str(item) for item in values], dtype=object) if values else np.array([], dtype=str)
    if all(isinstance(item, bool | int | float | np.number | np.bool_) for item in values):
        array = np.array(values)
        return array if array.dtype.kind in "biuf" else np.array([str(item) for item in values], dtype=object)
    return json.dumps(values, default=str)
