"""Where training reads its cells from: arrays in memory, or a file larger than memory."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from scipy import sparse

from ..errors import DataError, DataWarning, MissingKeyError
from .batches import in_memory, nbytes, rows_of
from .file_source import FileSource
from .guard import check_h5ad, check_zarr, open_zarr, opened, sniff
from .matrix import DiskMatrix, encoding
from .names import batch_codes
from .read import quiet, read

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from .batches import Batch


def as_source(
    data: Source | Mapping[str, Any] | AnnData | str | Path,
    *,
    cell_keys: Collection[str],
    constant_keys: Collection[str] = (),
    mapping: Mapping[str, str] | None = None,
    genes: NDArray[np.integer] | None = None,
) -> Source:
    """Turn what a user has into a `Source`.

    Parameters
    ----------
    data
        A `Source` (returned as it is), a dict of arrays or scipy sparse matrices, an AnnData (in memory or
        backed), or the path of a file. The matrices of a .h5ad or .zarr stay on disk; 10x files, and matrices
        stored by column, are loaded.
    cell_keys
        Keys whose first axis is cells; those that `data` does not have are left out.
    constant_keys
        Keys without a cell axis (`ambient_profile`), added to every batch.
    mapping
        For AnnData and files: key -> place, such as {"counts": "layers/counts", "batch_labels": "obs/batch"}.
        Places: "X", "raw/X", "layers/<name>", "obsm/<name>", "obs/<column>" for cells and "var/<column>",
        "varm/<name>", "uns/<name>" for constants. Default {"counts": "X"}.
    genes
        Indices of the genes to keep, in the order wanted (AnnData and files only); None keeps all.

    Raises
    ------
    DataError : lengths differ, an array is not numeric, or a sparse matrix is damaged.
    MissingKeyError : a place named in `mapping` does not exist.
    """
    if isinstance(data, str | Path):
        return _path_source(Path(data), mapping or {"counts": "X"}, cell_keys, constant_keys, genes)
    if isinstance(data, Mapping):
        cells = {key: data[key] for key in cell_keys if data.get(key) is not None}
        constants = {key: data[key] for key in constant_keys if data.get(key) is not None}
        return ArraySource(cells, constants)
    if isinstance(data, Source):
        return data
    if not hasattr(data, "obs"):
        msg = (
            f"as_source: got {type(data).__name__}; pass a dict of arrays, an AnnData, or the path of a file"
        )
        raise DataError(msg)
    return _anndata_source(data, mapping or {"counts": "X"}, cell_keys, constant_keys, genes)


def chunks(source: Source, size: int) -> Iterator[Batch]:
    """Yield all cells in their order, `size` at a time; the last batch is shorter."""
    for start in range(0, source.n_cells, size):
        yield source.take(np.arange(start, min(start + size, source.n_cells)))


def counts_of(data: AnnData | str | Path | Any, *, layer: str | None = None) -> Any:
    """Return the counts (cells, genes) of `data`: in memory they are not copied, on disk they stay there.

    Parameters
    ----------
    data
        An AnnData (in memory or backed), a path, or a matrix, which is returned as it is.
    layer
        Name in `layers`; None is X.

    Returns
    -------
    An array, a scipy sparse matrix, or a `DiskMatrix`: what `check_counts` and `highly_variable_genes` take.
    """
    place = "X" if layer is None else f"layers/{layer}"
    if isinstance(data, str | Path):
        source = as_source(data, cell_keys=("counts",), mapping={"counts": place})
        if isinstance(source, FileSource):
            return source.matrices["counts"]
        return cast("ArraySource", source).cells["counts"]
    if not hasattr(data, "obs"):
        return data
    if data.isbacked and not data.is_view:
        return DiskMatrix(data.file._file, place, where=str(data.filename))
    found = _lookup(data, "counts", place)
    unread = _on_disk(found, place)
    return found if unread is None else unread


def _selected(
    mapping: Mapping[str, str], cell_keys: Collection[str], constant_keys: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    places = {key: place.strip("/") for key, place in mapping.items()}
    cells = {key: place for key, place in places.items() if key in cell_keys}
    constants = {key: place for key, place in places.items() if key in constant_keys}
    return cells, constants


def _lookup(adata: AnnData, key: str, place: str) -> Any:
    """Return the element of `adata` at `place`."""
    slot, _, name = place.partition("/")
    if place == "X":
        return adata.X
    if place == "raw/X":
        if adata.raw is None:
            msg = f"{key}: mapped to raw/X, but adata.raw is None; pass the place of the counts"
            raise MissingKeyError(msg)
        return adata.raw.X
    if slot not in ("layers", "obsm", "obs", "var", "varm", "uns"):
        msg = f"{key}: mapped to {place!r}; expected X, raw/X, or a name in layers, obsm, obs, var, varm, uns"
        raise DataError(msg)
    held = getattr(adata, slot)
    if name not in held:
        others = ", ".join(str(k) for k in held if k is not None) or "nothing"  # anndata keeps X at layers[None]
        msg = f"{key}: mapped to {place!r}, but adata.{slot} holds {others}"
        raise MissingKeyError(msg)
    return held[name]


def _on_disk(value: Any, place: str, columns: NDArray[np.integer] | None = None) -> DiskMatrix | None:
    """Return a matrix that an AnnData holds unread, as `anndata.io.sparse_dataset` and zarr give it; else None."""
    element = getattr(value, "group", None)  # of a sparse_dataset
    if element is None and type(value).__module__.partition(".")[0] in ("zarr", "h5py"):
        element = value
    if element is None:
        return None
    return DiskMatrix({place: element}, place, columns=columns, where=str(getattr(element, "store", "a file")))


def _column(key: str, column: Any, name: str, categories: dict[str, tuple[str, ...]]) -> NDArray[Any]:
    """Return an obs column as numbers; names (and every `..._labels`) become codes, noted in `categories`."""
    import pandas as pd

    series = pd.Series(column)
    if pd.api.types.is_numeric_dtype(series) and not key.endswith("labels"):
        return series.to_numpy()
    codes, names = batch_codes(series.to_frame(name), name)
    categories[key] = tuple(names)
    return codes


def _per_gene(place: str) -> bool:
    return place.split("/")[0] in ("X", "layers", "var", "varm")


def _anndata_source(
    adata: AnnData,
    mapping: Mapping[str, str],
    cell_keys: Collection[str],
    constant_keys: Collection[str],
    genes: NDArray[np.integer] | None,
) -> Source:
    if adata.isbacked:
        if adata.is_view:
            msg = "AnnData is a view of a file on disk; call .to_memory(), or write the selection to a file"
            raise DataError(msg)
        path = Path(cast("Any", adata.filename))
        return _file_source(path, mapping, cell_keys, constant_keys, genes, adata.file._file, adata)
    categories: dict[str, tuple[str, ...]] = {}
    cell_places, constant_places = _selected(mapping, cell_keys, constant_keys)
    cells: dict[str, Any] = {}
    matrices: dict[str, DiskMatrix] = {}
    for key, place in cell_places.items():
        value = _lookup(adata, key, place)
        subset = genes if _per_gene(place) else None
        if place.startswith("obs/"):
            cells[key] = _column(key, value, place[4:], categories)
        elif (matrix := _on_disk(value, place, subset)) is not None:
            matrices[key] = matrix
        else:
            cells[key] = value if subset is None else value[:, subset]
    constants = _constants(adata, constant_places, genes)
    if matrices:
        return FileSource(matrices, cells, constants, categories=categories)
    return ArraySource(cells, constants, categories=categories)


def _constants(
    adata: AnnData, places: Mapping[str, str], genes: NDArray[np.integer] | None
) -> dict[str, Any]:
    constants: dict[str, Any] = {}
    for key, place in places.items():
        value = np.asarray(_lookup(adata, key, place))
        constants[key] = value[genes] if genes is not None and _per_gene(place) else value
    return constants


def _path_source(
    path: Path,
    mapping: Mapping[str, str],
    cell_keys: Collection[str],
    constant_keys: Collection[str],
    genes: NDArray[np.integer] | None,
) -> Source:
    kind = sniff(path)
    if kind not in ("h5ad", "zarr"):
        return _anndata_source(read(path), mapping, cell_keys, constant_keys, genes)
    store: Any
    if kind == "h5ad":
        check_h5ad(path, backed=True)
        store = opened(path)
    else:
        check_zarr(path, backed=True)
        store = open_zarr(path)
    places = _selected(mapping, cell_keys, constant_keys)[0].values()
    if any(place in store and encoding(store[place]) == "csc" for place in places):
        warnings.warn(f"{path.name} is stored by column (CSC): loaded into memory", DataWarning, stacklevel=3)
        return _anndata_source(read(path), mapping, cell_keys, constant_keys, genes)
    return _file_source(path, mapping, cell_keys, constant_keys, genes, store)


def _file_source(
    path: Path,
    mapping: Mapping[str, str],
    cell_keys: Collection[str],
    constant_keys: Collection[str],
    genes: NDArray[np.integer] | None,
    store: Mapping[str, Any],
    adata: AnnData | None = None,
) -> FileSource:
    """Open the matrices of `mapping` on disk and read its columns into memory.

    Columns come from `adata` when it is given, since the user may have changed them after opening the file.
    """
    from anndata import AnnData as InMemory
    from anndata.io import read_elem

    cell_places, constant_places = _selected(mapping, cell_keys, constant_keys)
    if adata is None:
        wanted = {place.split("/")[0] for place in (*cell_places.values(), *constant_places.values())}
        slots = [slot for slot in ("obs", "var", "varm", "uns") if slot in wanted and slot in store]
        with quiet():
            adata = InMemory(**{slot: cast("Any", read_elem(store[slot])) for slot in slots})
    categories: dict[str, tuple[str, ...]] = {}
    matrices: dict[str, DiskMatrix] = {}
    cells: dict[str, Any] = {}
    for key, place in cell_places.items():
        if place.startswith("obs/"):
            cells[key] = _column(key, _lookup(adata, key, place), place[4:], categories)
        else:
            subset = genes if _per_gene(place) else None
            matrices[key] = DiskMatrix(store, place, columns=subset, where=path.name)
    return FileSource(
        matrices, cells, _constants(adata, constant_places, genes), categories=categories, store=store
    )


@runtime_checkable
class Source(Protocol):
    """Cells that can be taken a batch at a time.

    `take(rows)` gives a dict of arrays: cell keys with `len(rows)` rows in that order, matrices dense
    float32, labels int32; constant keys whole. `order(rng, rows)` gives those rows in a random order that is
    cheap to read: take it part after part. `categories` holds the names behind the codes of a column.
    """

    n_cells: int
    keys: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]

    @property
    def nbytes_in_memory(self) -> int:
        """Bytes of memory held."""
        ...

    def take(self, rows: NDArray[np.integer]) -> Batch:
        """Return the cells `rows` as a dict of arrays."""
        ...

    def order(self, rng: np.random.Generator, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return `rows` in a random order."""
        ...


class ArraySource:
    """Cells in memory.

    Parameters
    ----------
    cells
        key -> array or scipy sparse matrix whose first axis is cells. A CSR matrix or numpy array is not
        copied and never changed; other sparse layouts are converted to CSR once.
    constants
        key -> array without a cell axis, part of every batch.
    categories
        key -> names behind integer codes.
    """

    def __init__(
        self,
        cells: Mapping[str, Any],
        constants: Mapping[str, Any] | None = None,
        *,
        categories: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.cells, self.constants, self.n_cells = in_memory(cells, constants or {})
        self.keys = (*self.cells, *self.constants)
        self.categories = {key: tuple(names) for key, names in (categories or {}).items()}
        self._known_rooms: dict[tuple[str, int], tuple[int, ...]] = {}

    @property
    def nbytes_in_memory(self) -> int:
        """Bytes of all arrays held."""
        return sum(map(nbytes, (*self.cells.values(), *self.constants.values())))

    def take(self, rows: NDArray[np.integer]) -> Batch:
        """Return the cells `rows` (any order, repeats allowed) as a dict of arrays."""
        return {key: rows_of(key, value, rows) for key, value in self.cells.items()} | self.constants

    def take_sparse(self, rows: NDArray[np.integer]) -> dict[str, Any]:
        """Return as `take` does, but sparse matrices as `SparseRows`, for a program that makes them dense.

        Batches of one length have one shape, with room for what a random batch holds at most, so that one
        program serves them. Fuller ones (rows of a like depth in a row) get room for the fullest rows of the
        matrix; a batch that repeats those beyond that comes dense.
        """
        from ..math.sparse import sparse_rows

        batch: dict[str, Any] = dict(self.constants)
        for key, value in self.cells.items():
            rooms = self._rooms(key, len(rows)) if isinstance(value, sparse.csr_array) else ()
            entries = int((value.indptr[rows + 1] - value.indptr[rows]).sum()) if rooms else 0
            room = next((room for room in rooms if entries <= room), 0)
            batch[key] = sparse_rows(value, rows, room) if room else rows_of(key, value, rows)
        return batch

    def take_blocks(self, rows: NDArray[np.integer], n_blocks: int, mine: range) -> dict[str, Any]:
        """Return the blocks `mine` of `rows` cut into n_blocks equal ones; sparse matrices as blocks of `SparseRows`.

        Whether a matrix comes sparse, and with how much room, depends on all the rows: who takes other blocks of
        the same rows gets arrays of the same kind.
        """
        from ..math.sparse import in_blocks, sparse_rows

        blocks = np.split(rows, n_blocks)
        own = np.concatenate([blocks[i] for i in mine])
        batch: dict[str, Any] = dict(self.constants)
        for key, value in self.cells.items():
            rooms = self._rooms(key, len(blocks[0])) if isinstance(value, sparse.csr_array) else ()
            fullest = max(int((value.indptr[b + 1] - value.indptr[b]).sum()) for b in blocks) if rooms else 0
            room = next((room for room in rooms if fullest <= room), 0)
            parts = [sparse_rows(value, blocks[i], room) for i in mine] if room else []
            batch[key] = in_blocks(parts, n_blocks) if parts else rows_of(key, value, own)
        return batch

    def column(self, key: str) -> NDArray[Any]:
        """Return a per-cell array whole, such as `batch_labels`."""
        return rows_of(key, self.cells[key], np.arange(self.n_cells))

    def fingerprint(self) -> int:
        """A checksum of all the cells, to tell whether a run goes on with the data it began with."""
        total = 0
        for key, value in sorted(self.cells.items()):
            parts = [value.data, value.indices, value.indptr] if isinstance(value, sparse.csr_array) else [value]
            for part in parts:
                array = np.ascontiguousarray(part)
                total = zlib.crc32(memoryview(array).cast("B") if array.size else b"", zlib.crc32(key.encode(), total))
        return total

    def _rooms(self, key: str, n_rows: int) -> tuple[int, ...]:
        """Return the entries that `n_rows` rows usually and at most hold; () where int32 positions overflow."""
        from ..math.sparse import usual_and_most

        if (key, n_rows) not in self._known_rooms:
            matrix = self.cells[key]
            fits = n_rows * matrix.shape[1] < 2**31
            self._known_rooms[key, n_rows] = usual_and_most(np.diff(matrix.indptr), n_rows) if fits else ()
        return self._known_rooms[key, n_rows]

    def order(self, rng: np.random.Generator, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return a random permutation of `rows`."""
        return rng.permutation(rows)
