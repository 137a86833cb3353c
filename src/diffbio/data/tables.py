"""The tables of a data set whose matrices stay where they are, and how much memory it would take."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputFileError
from .guard import check_h5ad, check_zarr, free_memory, open_zarr, opened, sniff
from .read import quiet, read

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

SLOTS = ("layers", "obsm", "obsp", "varm", "varp", "uns")
SHARE_OF_MEMORY = 0.25  # of what is free, that a whole file may take


class Tables(NamedTuple):
    """`obs` and `var` of a data set, and the names in its other slots.

    `n_bytes` is what all of it takes in memory; `kind` is None for an AnnData.
    """

    obs: "pd.DataFrame"
    var: "pd.DataFrame"
    names: dict[str, list[str]]
    n_bytes: int
    kind: str | None


def tables_of(data: "AnnData | str | Path") -> Tables:
    """Reads the tables of an AnnData or a file; a 10x file is read whole.

    Raises:
        InputFileError: the file is no single-cell data.
    """
    if not isinstance(data, str | Path):
        return _of_anndata(data, None)
    path = Path(data)
    kind = sniff(path)
    if kind not in ("h5ad", "zarr"):
        return _of_anndata(read(path), kind)
    from anndata.io import read_elem

    (check_h5ad if kind == "h5ad" else check_zarr)(path, backed=True)
    store: Any = opened(path) if kind == "h5ad" else open_zarr(path)
    try:
        missing = [slot for slot in ("obs", "var") if slot not in store]
        if missing:
            msg = f"holds no {' and no '.join(missing)}; {path}; write the AnnData again"
            raise InputFileError(msg)
        with quiet():
            obs, var = (_frame(read_elem(store[slot])) for slot in ("obs", "var"))
        names = {slot: sorted(map(str, store[slot])) if slot in store else [] for slot in SLOTS}
        return Tables(obs, var, names, _claimed(store), kind)
    finally:
        if kind == "h5ad":
            store.close()


def should_stream(path: str | Path) -> bool:
    """Whether a file is so large that its matrices had better stay on disk: over a quarter of free memory."""
    kind = sniff(Path(path))
    if kind not in ("h5ad", "zarr"):
        return False
    store: Any = opened(Path(path)) if kind == "h5ad" else open_zarr(Path(path))
    try:
        return _claimed(store) > SHARE_OF_MEMORY * free_memory()
    finally:
        if kind == "h5ad":
            store.close()


def _of_anndata(adata: Any, kind: str | None) -> Tables:
    names = {slot: [str(name) for name in getattr(adata, slot) if name is not None] for slot in SLOTS}
    parts = [adata.X, *adata.layers.values()] if not adata.isbacked else []
    n_bytes = sum(_n_bytes(part) for part in parts if part is not None)
    return Tables(adata.obs, adata.var, names, n_bytes, kind)


def _n_bytes(matrix: Any) -> int:
    if hasattr(matrix, "indptr"):
        return int(matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes)
    return int(getattr(matrix, "nbytes", 0))


def _frame(table: Any) -> Any:
    """A table of anndata before 0.7 is a record array, whose first field is the index."""
    if hasattr(table, "columns"):
        return table
    import pandas as pd

    records = pd.DataFrame(table)
    return records.set_index(records.columns[0])


def _claimed(store: Any) -> int:
    members = [store[name] for name in store]
    return sum(int((m.size or 0) * m.dtype.itemsize) if hasattr(m, "dtype") else _claimed(m) for m in members)
