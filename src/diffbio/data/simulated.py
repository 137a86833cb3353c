"""Simulated cells as AnnData, in memory or written to disk piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import ConfigError, OutputError
from ..scratch import remove, scratch_beside
from .disk import opened_for_writing
from .guard import trust
from .names_digest import seal
from .plain import plain
from .read import quiet
from .stream import RowStream, write_stream
from .write import _add, _swap_folder, _sync, check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from pandas import DataFrame

ENTRIES = 1 << 22  # counts that are made at a time


class Simulator(Protocol):
    """What makes cells: `diffbio.operators.singlecell.DifferentiableSimulator`."""

    config: Any

    def pieces(self, n_cells: int, *, chunk: int = ..., seed: int | None = ...) -> Iterator[dict[str, np.ndarray]]:
        """Cells 0 to n_cells in pieces of `chunk`."""
        ...


def simulated(
    simulator: Simulator,
    n_cells: int | None = None,
    *,
    seed: int | None = None,
    gene_names: Sequence[str] | None = None,
) -> AnnData:
    """Simulate cells into an AnnData in memory; `write_simulated` says what it holds.

    Parameters
    ----------
    simulator
        A `DifferentiableSimulator`.
    n_cells
        None is the one of its settings.
    seed
        None is the data set that the simulator gives when it is called in eval mode.
    gene_names
        None is gene_0, gene_1, ...

    Raises
    ------
    ConfigError : n_cells is below 1, or gene_names has another length than the simulator has genes.
    """
    from anndata import AnnData
    from scipy import sparse

    n_cells = _checked(simulator, n_cells, gene_names)
    rows: list[Any] = []
    found: dict[str, list[np.ndarray]] = {}
    for piece in simulator.pieces(n_cells, chunk=_chunk(simulator, None), seed=seed):
        rows.append(sparse.csr_matrix(piece.pop("counts").astype(np.float32)))
        _note(found, piece)
    obs, var = _tables(simulator, found, gene_names)
    with quiet():
        return AnnData(sparse.vstack(rows, format="csr"), obs=obs, var=var)


def write_simulated(
    simulator: Simulator,
    path: str | Path,
    *,
    n_cells: int | None = None,
    chunk: int | None = None,
    seed: int | None = None,
    gene_names: Sequence[str] | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Simulate cells and write them piece by piece as CSR: memory holds one piece of the counts, and all of obs.

    X holds the counts. obs: `group` ("group_0" or "path_0", ...), `batch`, `doublet`, `library_size` (expected total)
    and, with paths, `path_position` from 0 to 1. var: `gene_mean`, and for every group `de_factor_<k>`, for every batch
    of several `batch_factor_<b>`. The cells do not depend on `chunk`.

    Parameters
    ----------
    simulator
        A `DifferentiableSimulator`.
    path
        A new .h5ad or .zarr.
    n_cells
        None is the one of the simulator's settings.
    chunk
        Cells made at a time; None is about 4 million counts.
    seed
        None is the data set that the simulator gives when it is called in eval mode.
    gene_names
        None is gene_0, gene_1, ...
    overwrite
        Replace an existing file of that name.
    record
        How the cells were made, plain values: written to `uns["diffbio"]["simulate"]`.

    Raises
    ------
    ConfigError : a size is below 1, or gene_names has another length than the simulator has genes.
    OutputError : the file cannot be written; one that was there before is intact.
    """
    n_cells = _checked(simulator, n_cells, gene_names, chunk)
    path = check_output(path, overwrite)
    scratch = scratch_beside(path)
    try:
        if path.suffix == ".h5ad":
            with opened_for_writing(scratch, "w") as (file, disk):
                _write(file, simulator, n_cells, chunk, seed, gene_names, record, disk.check)
                seal(file)
            _sync(scratch)
            scratch.replace(path)
            trust(path)
        else:
            import zarr

            store = zarr.open_group(str(scratch), mode="w")
            _write(store, simulator, n_cells, chunk, seed, gene_names, record, lambda: None)
            _swap_folder(scratch, path)
        _sync(path.parent)
    except OSError as error:
        msg = f"cannot be written ({type(error).__name__}); {path}; make room or choose another folder"
        raise OutputError(msg) from error
    finally:
        remove(scratch)
    return path


def _write(
    store: Any, simulator: Simulator, n_cells: int, chunk: int | None, seed: int | None,
    gene_names: Sequence[str] | None, record: Mapping[str, Any] | None, check: Callable[[], None],
) -> None:  # fmt: skip
    """Write all of an AnnData into an open, empty store."""
    from anndata.io import write_elem

    found: dict[str, list[np.ndarray]] = {}

    def counts() -> Iterator[np.ndarray]:
        for piece in simulator.pieces(n_cells, chunk=_chunk(simulator, chunk), seed=seed):
            check()
            yield piece.pop("counts")
            _note(found, piece)

    n_genes = simulator.config.n_genes
    store.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for slot in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        write_elem(store, slot, {})
    write_stream(store, "X", RowStream(counts(), np.arange(n_genes)), (n_cells, n_genes), "X")
    obs, var = _tables(simulator, found, gene_names)
    with quiet():
        write_elem(store, "obs", obs)
        write_elem(store, "var", var)
        if record is not None:
            _add(store, "uns/diffbio/simulate", plain(dict(record)), check)


def _note(found: dict[str, list[np.ndarray]], piece: dict[str, np.ndarray]) -> None:
    for name, value in piece.items():
        found.setdefault(name, []).append(value)


def _tables(
    simulator: Simulator, found: dict[str, list[np.ndarray]], gene_names: Sequence[str] | None
) -> tuple[DataFrame, DataFrame]:
    """Return obs and var out of what was noted."""
    import pandas as pd

    def categories(name: str, what: str, size: int) -> Any:
        codes = np.concatenate(found[name]).astype(int)
        return pd.Categorical.from_codes(codes.tolist(), pd.Index([f"{what}_{k}" for k in range(size)]))

    config = simulator.config
    kind = "group" if config.path_from is None else "path"
    obs = {
        "group": categories("group_labels", kind, config.n_groups),
        "batch": categories("batch_labels", "batch", config.n_batches),
        "doublet": np.concatenate(found["doublets"]),
        "library_size": np.concatenate(found["library_size"]),
    }
    if "path_position" in found:
        obs["path_position"] = np.concatenate(found["path_position"])
    var = {"gene_mean": found["gene_means"][0]}
    var |= {f"de_factor_{k}": row for k, row in enumerate(found["de_factors"][0])}
    if config.n_batches > 1:
        var |= {f"batch_factor_{b}": row for b, row in enumerate(found["batch_factors"][0])}
    names = [f"gene_{j}" for j in range(config.n_genes)] if gene_names is None else [str(name) for name in gene_names]
    cells = [f"cell_{i}" for i in range(len(obs["library_size"]))]
    return pd.DataFrame(obs, index=pd.Index(cells)), pd.DataFrame(var, index=pd.Index(names))


def _chunk(simulator: Simulator, chunk: int | None) -> int:
    return max(1, ENTRIES // simulator.config.n_genes) if chunk is None else chunk


def _checked(
    simulator: Simulator, n_cells: int | None, gene_names: Sequence[str] | None, chunk: int | None = None
) -> int:
    config = simulator.config
    n_cells = config.n_cells if n_cells is None else n_cells
    if n_cells < 1 or (chunk is not None and chunk < 1):
        msg = f"simulated: n_cells and chunk must be at least 1, got {n_cells} and {chunk}."
        raise ConfigError(msg)
    if gene_names is not None and len(gene_names) != config.n_genes:
        msg = f"simulated: gene_names has {len(gene_names)} names, but config.n_genes is {config.n_genes}."
        raise ConfigError(msg)
    return n_cells
