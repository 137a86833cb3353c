"""Facts about a file and about this machine, as lines of text."""

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import numpy as np

from ..data.guard import free_memory
from ..data.matrix import DiskMatrix
from ..data.read import read
from ..data.source import counts_of
from ..data.tables import tables_of
from ..data.validate import check_counts
from ..errors import DiffBioError

FIRST_CELLS = 2000  # looked at to tell counts from other numbers
MOST_NAMES = 12


def facts_of(path: Path) -> Iterator[str]:
    """What is in a single-cell file; the matrices of a .h5ad or .zarr stay on disk.

    Raises:
        InputFileError: it cannot be read as one.
    """
    obs, var, names, size, kind = tables_of(path)
    if kind in ("h5ad", "zarr"):
        layers: dict[str, Any] = {"X": counts_of(path)}
        layers |= {f"layers/{name}": counts_of(path, layer=name) for name in names["layers"]}
    else:
        layers = {"X": read(path).X}
    memory = f"{bytes_text(size)} in memory, {bytes_text(free_memory())} free"
    yield f"{path}: {kind}, {len(obs):,} cells x {len(var):,} genes, {memory}"
    for name, matrix in layers.items():
        yield f"  {name}: {_kind_of(matrix)}"
    for slot in ("obsm", "obsp", "uns"):
        if names[slot]:
            yield f"  {slot}: {names_text(names[slot])}"
    for name in obs.columns:
        yield f"  obs/{name}: {_column(obs[name])}"
    if len(var.columns):
        yield f"  var: {names_text(list(map(str, var.columns)))}"


def facts_of_this_machine() -> Iterator[str]:
    """Versions, devices, threads, memory and folders, as a bug report needs them."""
    import jax

    from .. import __version__

    yield f"diffbio {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"executable: {sys.executable}"
    for device in jax.devices():
        yield f"device: {device.platform} {device.device_kind}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"processors: {usable} usable of {os.cpu_count()}; memory free: {bytes_text(free_memory())}"
    folder = jax.config.jax_compilation_cache_dir
    state = (
        "off" if not folder else f"{folder} ({'writable' if os.access(folder, os.W_OK) else 'NOT writable'})"
    )
    yield f"compilation cache: {state}"
    shown = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_", "DIFFBIO_"))
    ]
    yield f"environment: {', '.join(shown) or 'nothing set'}"
    yield "packages: " + ", ".join(_packages())


def _packages() -> Iterator[str]:
    names = {"jaxlib", "pandas"} | {
        _bare(line) for line in requires("diffbio") or [] if "extra ==" not in line
    }
    for name in sorted(names):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} MISSING"


def _bare(requirement: str) -> str:
    return requirement.split(";")[0].split("[")[0].rstrip("<>=!~0123456789.,* ").strip()


def _kind_of(matrix: Any) -> str:
    """Whether the first cells of a matrix hold counts."""
    first = matrix
    if isinstance(matrix, DiskMatrix):
        rows = matrix.read(0, min(FIRST_CELLS, matrix.shape[0]))
        stored = (
            f"{'dense' if matrix.encoding == 'dense' else matrix.encoding.upper()}, {matrix.dtype}, on disk"
        )
        first = rows if isinstance(rows, np.ndarray) else _csr(rows, matrix.shape[1])
    else:
        stored = f"{type(matrix).__name__}, {matrix.dtype}"
        first = matrix[:FIRST_CELLS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            seen = check_counts(first)
        except DiffBioError as error:
            what = str(error).removeprefix("counts: ").partition(" (")[0].partition(";")[0]
            return f"{stored}; not counts: {what}"
    share = seen.n_nonzero / (seen.n_cells * seen.n_genes)
    return f"{stored}; counts, largest {seen.maximum:g}, {share:.1%} not zero (first {seen.n_cells:,} cells)"


def _csr(rows: Any, n_columns: int) -> Any:
    from scipy import sparse

    return sparse.csr_matrix(
        (rows.values, rows.columns, rows.starts), shape=(len(rows.starts) - 1, n_columns)
    )


def _column(column: Any) -> str:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        values = column.to_numpy(dtype=float)
        if not np.isfinite(values).any():
            return "numbers, none finite"
        return f"{column.dtype}, {np.nanmin(values):.4g} to {np.nanmax(values):.4g}"
    sizes = column.astype(str).value_counts()
    missing = int(column.isna().sum())
    shown = [f"{name} ({size:,})" for name, size in sizes.items()]
    return f"{len(sizes)} values: {names_text(shown)}" + (f"; {missing:,} missing" if missing else "")


def names_text(names: list[str]) -> str:
    """The first names, printable and not too long, and how many there are."""
    shown = ", ".join(
        "".join(c if c.isprintable() else "?" for c in name)[:60] for name in names[:MOST_NAMES]
    )
    return shown + (f", ... ({len(names):,} in all)" if len(names) > MOST_NAMES else "")


def bytes_text(n: int) -> str:
    """A size in MB or GB."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
