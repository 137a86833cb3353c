"""Reads single-cell files into AnnData: h5ad, zarr, 10x .h5 and 10x folders, told apart by content."""

from __future__ import annotations

import contextlib
import gzip
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import sparse

from ..errors import DataWarning, DiffBioError, InputFileError
from .guard import (
    MAX_EXPANSION,
    check_h5ad,
    check_hdf5,
    check_zarr,
    opened,
    require_memory,
    sniff,
)
from .matrix import check_columns, check_indptr
from .names_digest import check_seal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings of anndata about itself and pandas; what a user should know is checked in our words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(path: str | Path | AnnData, *, backed: bool = False) -> AnnData:
    """Read single-cell data of any supported format.

    The type is told by content: .h5ad, .zarr (v2, v3), 10x .h5 (v2, v3), a 10x folder (`matrix.mtx`,
    `barcodes.tsv`, `genes.tsv` or `features.tsv`, gzipped or not). Links, claimed sizes and sparse
    indices are checked before anything is computed. 10x files: only "Gene Expression" features, gene symbols
    made unique, identifiers in `var["gene_ids"]`.

    Parameters
    ----------
    path
        File or folder. An AnnData is returned as it is.
    backed
        Leave the matrices of a .h5ad on disk.

    Returns
    -------
    AnnData, cells x genes.

    Raises
    ------
    InputFileError : missing, unreadable, damaged, or of another type. One line: what; where; how to fix.
    DeviceMemoryError : larger than the free memory.
    """
    if hasattr(path, "obs"):
        return cast("AnnData", path)
    path = Path(path)
    kind = sniff(path)
    if backed and kind != "h5ad":
        msg = f"only .h5ad can be backed, this is {kind}; {path}; read it whole, or convert it to .h5ad"
        raise InputFileError(msg)
    reader = {"h5ad": _read_h5ad, "zarr": _read_zarr, "10x_h5": _read_10x_h5, "10x_mtx": _read_10x_mtx}[kind]
    if backed:
        return _read_h5ad(path, backed=True)
    try:
        return reader(path)
    except (DiffBioError, Warning):  # a warning arrives here where the user turned warnings into errors
        raise
    except Exception as error:
        msg = f"is damaged: it cannot be read as {kind}; {path}; make a fresh copy"
        raise InputFileError(msg) from error


def _read_h5ad(path: Path, *, backed: bool = False) -> AnnData:
    from anndata import read_h5ad

    check_h5ad(path, backed=backed)
    try:
        check_seal(path)
        with quiet():
            adata = read_h5ad(path, backed="r" if backed else None)
    except Warning:  # where the user turned warnings into errors
        raise
    except Exception as error:
        msg = f"is damaged: it cannot be read as h5ad; {path}; make a fresh copy"
        raise InputFileError(msg) from error
    check_indices(adata, path)
    return adata


def _read_zarr(path: Path) -> AnnData:
    from anndata import read_zarr

    check_zarr(path)
    with quiet():
        adata = read_zarr(path)
    check_indices(adata, path)
    return adata


def check_indices(adata: AnnData, path: Path) -> None:
    """Raise `InputFileError` if an index of a sparse matrix in memory is outside its shape.

    scipy and jax would write or read outside the array.
    """
    for name, matrix in _sparse_matrices(adata):
        if matrix.format not in ("csr", "csc"):
            continue
        where = f"{path}, {name}"
        n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
        check_indptr(matrix.indptr, n_major, len(matrix.data), where)
        check_columns(matrix.indices, n_minor, where)


def _sparse_matrices(adata: AnnData) -> Iterator[tuple[str, Any]]:
    if not adata.isbacked:
        yield from ((name, value) for name, value in [("X", adata.X)] if sparse.issparse(value))
        if adata.raw is not None and sparse.issparse(adata.raw.X):
            yield "raw/X", adata.raw.X
    for slot in ("layers", "obsm", "varm", "obsp", "varp"):
        for key, value in getattr(adata, slot).items():
            if sparse.issparse(value):
                yield f"{slot}/{key}", value
    stack: list[tuple[str, Any]] = [("uns", adata.uns)]
    while stack:
        name, value = stack.pop()
        if sparse.issparse(value):
            yield name, value
        elif hasattr(value, "items") and not hasattr(value, "columns"):
            stack.extend((f"{name}/{key}", inner) for key, inner in value.items())


def _assemble(matrix: Any, barcodes: list[str], var: pd.DataFrame, path: Path) -> AnnData:
    """Make an AnnData of a CSR matrix (cells, features); `var` has gene_symbols, gene_ids, feature_types."""
    from anndata import AnnData
    from anndata.utils import make_index_unique

    if matrix.shape != (len(barcodes), len(var)):
        msg = (
            f"matrix is {matrix.shape} for {len(barcodes)} barcodes and {len(var)} features; {path}; "
            "copy the files again"
        )
        raise InputFileError(msg)
    genes = (var["feature_types"] == "Gene Expression").to_numpy()
    if not genes.all() and genes.any():
        _warn(f"{int((~genes).sum())} features that are not genes were left out of {path.name}")
        matrix, var = matrix[:, np.flatnonzero(genes)], var[genes]
    symbols = var.pop("gene_symbols")
    n_repeated = int(symbols.duplicated().sum())
    if n_repeated:
        _warn(f"{n_repeated} gene symbols in {path.name} occur again and were made unique (-1, -2, ...)")
    import pandas as pd

    var.index = make_index_unique(pd.Index(symbols.astype(str).to_numpy(), dtype=object))
    obs = pd.DataFrame(index=pd.Index(barcodes, dtype=object))
    small = matrix.nnz == 0 or np.abs(matrix.data).max() < 2**24
    matrix = matrix.astype(np.float32 if small else np.float64)
    with quiet():
        return AnnData(sparse.csr_matrix(matrix), obs=obs, var=var)


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)


def _text(dataset: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]]


def _read_10x_h5(path: Path) -> AnnData:
    import pandas as pd

    check_hdf5(path)
    with opened(path) as file:
        if "matrix" in file:
            group = file["matrix"]
            features = group["features"]
            symbols, ids = _text(features["name"]), _text(features["id"])
            types = _text(features["feature_type"])
        else:
            genomes = [name for name in file if "barcodes" in file[name]]
            if len(genomes) != 1:
                msg = (
                    f"holds {len(genomes)} genomes ({', '.join(genomes)}); {path}; write one file per genome"
                )
                raise InputFileError(msg)
            group = file[genomes[0]]
            symbols, ids = _text(group["gene_names"]), _text(group["genes"])
            types = ["Gene Expression"] * len(ids)
        barcodes = _text(group["barcodes"])
        n_features, n_cells = (int(n) for n in group["shape"][:])
        require_memory(
            3 * sum(int(group[part].nbytes) for part in ("data", "indices", "indptr")), "reading", str(path)
        )
        indptr = group["indptr"][:]
        check_indptr(indptr, n_cells, int(group["data"].shape[0]), str(path))
        indices, values = group["indices"][:], group["data"][:]
    check_columns(indices, n_features, str(path))
    # stored by column with genes as rows, which is by row with cells as rows
    matrix = sparse.csr_array((values, indices, indptr), shape=(n_cells, n_features))
    var = pd.DataFrame({"gene_symbols": symbols, "gene_ids": ids, "feature_types": types})
    return _assemble(matrix, barcodes, var, path)


def _lines(path: Path) -> list[list[str]]:
    opener = gzip.open if path.read_bytes()[:2] == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]


def _beside(folder: Path, prefix: str, *names: str) -> Path:
    for name in names:
        for candidate in (folder / f"{prefix}{name}.tsv.gz", folder / f"{prefix}{name}.tsv"):
            if candidate.is_file():
                return candidate
    msg = f"{prefix}{names[0]}.tsv is missing beside {prefix}matrix.mtx; {folder}; copy the whole folder"
    raise InputFileError(msg)


def _read_10x_mtx(path: Path) -> AnnData:
    import pandas as pd
    from scipy.io import mmread

    found = sorted(entry for entry in path.iterdir() if entry.name.endswith(("matrix.mtx", "matrix.mtx.gz")))
    if len({entry.name.removesuffix(".gz") for entry in found}) > 1:
        msg = (
            f"holds several matrices: {', '.join(entry.name for entry in found)}; {path}; one folder for each"
        )
        raise InputFileError(msg)
    prefix = found[0].name.partition("matrix.mtx")[0]
    features = _lines(_beside(path, prefix, "features", "genes"))
    barcodes = [line[0] for line in _lines(_beside(path, prefix, "barcodes"))]
    _check_mtx(found[0], len(features), len(barcodes))
    matrix = sparse.csr_array(cast("Any", mmread(found[0], spmatrix=False)).T)
    columns = {
        "gene_symbols": [line[1] if len(line) > 1 else line[0] for line in features],
        "gene_ids": [line[0] for line in features],
        "feature_types": [line[2] if len(line) > 2 else "Gene Expression" for line in features],
    }
    return _assemble(matrix, barcodes, pd.DataFrame(columns), path)


def _check_mtx(path: Path, n_features: int, n_cells: int) -> None:
    """Compare the header of a Matrix Market file with its neighbours and its own size."""
    with path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if gzipped else path.open("rb") as file:
        header = b"%"
        while header.startswith(b"%"):
            header = file.readline(1 << 16)
    sizes: NDArray[np.int64] = np.array([int(field) for field in header.split()], np.int64)
    if sizes.tolist()[:2] != [n_features, n_cells]:
        msg = (
            f"matrix.mtx is {' x '.join(map(str, sizes[:2]))}, but there are {n_features} features and "
            f"{n_cells} barcodes; {path}; copy the whole folder again"
        )
        raise InputFileError(msg)
    n_bytes = path.stat().st_size * (MAX_EXPANSION if gzipped else 1)
    if 6 * int(sizes[2]) > n_bytes:  # the shortest entry is "1 1 1\n"
        msg = f"matrix.mtx claims {sizes[2]:,} entries, more than its bytes can hold; {path}; copy it again"
        raise InputFileError(msg)
    require_memory(40 * int(sizes[2]), "reading", str(path))
