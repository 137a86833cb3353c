"""Writes results beside the data they came from: a new file, complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from scipy import sparse

from ..errors import DataError, DiffBioError, OutputError
from ..scratch import ASIDE, remove, remove_stale, scratch_beside
from .disk import opened_for_writing
from .guard import sniff, trust
from .matrix import frame_length
from .names_digest import seal
from .plain import plain, to_numpy
from .read import quiet, read
from .stream import RowStream, write_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from anndata import AnnData

# Where `write_results` puts what a pipeline returns.
PLACES = {
    "latent": "obsm/X_diffbio_latent",
    "corrected_embeddings": "obsm/X_diffbio_harmony",
    "embedding": "obsm/X_diffbio_umap",
    "embeddings_2d": "obsm/X_diffbio_umap",
    "cluster_assignments": "obsm/diffbio_cluster_prob",
    "contamination_fraction": "obs/diffbio_ambient_fraction",
    "normalized": "layers/diffbio_normalized",
    "decontaminated_counts": "layers/diffbio_decontaminated",
    "imputed_counts": "layers/diffbio_imputed",
    "pseudotime": "obs/diffbio_pseudotime",
    "doublet_scores": "obs/diffbio_doublet_score",
    "cell_type_probabilities": "obsm/diffbio_cell_type_prob",
}
SLOTS = ("obs", "obsm", "obsp", "var", "varm", "layers", "uns")


def check_output(path: str | Path, overwrite: bool = False, *, n_bytes: int = 0) -> Path:  # noqa: FBT001, FBT002
    """Make sure that `path` can be written, before the work that makes its content.

    Parameters
    ----------
    path
        A name ending in .h5ad or .zarr.
    overwrite
        Allow a file (for .zarr a zarr folder) of that name.
    n_bytes
        Space that will be needed.

    Raises
    ------
    OutputError : another ending, a symbolic link, an existing file, no such folder, a folder that cannot be
        written to, or too little space.
    """
    path = Path(path)
    if path.suffix not in (".h5ad", ".zarr"):
        _refuse("name must end in .h5ad or .zarr", path, "choose such a name")
    try:
        remove_stale(path.parent, path.name)
        if path.is_symlink():
            _refuse("is a symbolic link", path, "name the file itself")
        if path.exists():
            _check_existing(path, overwrite=overwrite)
        if not path.parent.is_dir():
            _refuse("its folder does not exist", path, f"make it first: mkdir -p {path.parent}")
        probe = scratch_beside(path)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()
        free = shutil.disk_usage(path.parent).free
    except OutputError:
        raise
    except OSError as error:
        _refuse(f"cannot be written ({os.strerror(error.errno or 0)})", path, "choose another folder", error)
    if n_bytes > free:
        _refuse(f"needs {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", path, "make room on the disk")
    return path


def write_results(
    data: str | Path | AnnData, path: str | Path, results: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Write `data` with `results` added to a new .h5ad or .zarr; X and everything else stays as it was.

    A .h5ad to .h5ad (or .zarr to .zarr) is copied as a file and added to, so memory does not grow with X. The
    file is written under another name in the same folder, synced and renamed: whoever reads `path` finds the
    old content or all of the new. Numbers are stored with checksums (Fletcher32 in HDF5, crc32c in zarr).

    Parameters
    ----------
    data
        The input file, or an AnnData, which is not changed.
    path
        Where to write; checked with `check_output`.
    results
        place -> value, the place being "<slot>/<name>" with slot obs, obsm, obsp, var, varm, layers or uns
        ("uns/diffbio/pipeline" for nested ones), or a key of `PLACES` (`latent`, `embeddings_2d`, ...).
        Values: arrays (numpy, jax), sparse matrices, data frames, `RowStream` for a layer that is computed
        chunk by chunk, and plain Python values in uns. `cluster_assignments` also gives
        `obs["diffbio_cluster"]` and `obs["diffbio_cluster_max_prob"]`.
    overwrite
        Replace an existing file of that name.

    Returns
    -------
    The path written.

    Raises
    ------
    OutputError : cannot be written, the disk is full; a file that was there before is intact.
    DataError : a result does not have one row per cell (or gene), or its place is not allowed.
    """
    path = check_output(path, overwrite)
    elements = _elements(results)
    scratch = scratch_beside(path)
    try:
        _base(data, scratch, path.suffix)
        with _open_for_adding(scratch, path.suffix) as (store, check):
            lengths = {"obs": frame_length(store["obs"]), "var": frame_length(store["var"])}
            for place, value in elements.items():
                _check_length(place, value, lengths)
                _add(store, place, value, check)
                check()
            if path.suffix == ".h5ad":
                seal(store)
        if path.suffix == ".h5ad":
            _sync(scratch)
            scratch.replace(path)
            trust(path)
        else:
            _swap_folder(scratch, path)
        _sync(path.parent)
    except DiffBioError:
        raise
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as either
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "no space left on the disk" if full else f"cannot be written ({type(error).__name__})"
        _refuse(what, path, "make room or choose another folder; nothing was changed", error)
    finally:
        remove(scratch)
    return path


def add_results(adata: AnnData, results: Mapping[str, Any]) -> None:
    """Add `results` (as for `write_results`, without `RowStream`) to an AnnData in memory."""
    lengths = {"obs": adata.n_obs, "var": adata.n_vars}
    elements = _elements(results)
    for place, value in elements.items():
        _check_length(place, value, lengths)
    for place, value in elements.items():
        slot, *names = place.split("/")
        held = getattr(adata, slot)
        for name in names[:-1]:
            held = held.setdefault(name, {})
        held[names[-1]] = value


def cluster_columns(assignments: Any) -> dict[str, Any]:
    """Return `obs` columns for soft assignments (cells, clusters): a categorical of str, and its weight."""
    import pandas as pd

    weights = to_numpy(assignments)
    names = [str(cluster) for cluster in range(weights.shape[1])]
    return {
        "obs/diffbio_cluster": pd.Categorical.from_codes(weights.argmax(axis=1).tolist(), pd.Index(names)),
        "obs/diffbio_cluster_max_prob": weights.max(axis=1),
    }


def _refuse(what: str, path: Path, how: str, cause: BaseException | None = None) -> Any:
    msg = f"{what}; {path}; {how}"
    raise OutputError(msg) from cause


def _check_existing(path: Path, *, overwrite: bool) -> None:
    if not overwrite:
        _refuse("exists", path, "choose another name, or pass overwrite=True (--force)")
    is_zarr = path.is_dir() and bool({"zarr.json", ".zgroup"} & {entry.name for entry in path.iterdir()})
    if path.is_dir() if path.suffix == ".h5ad" else not is_zarr:
        _refuse(f"exists and is no {path.suffix} data", path, "choose another name")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_folder(scratch: Path, path: Path) -> None:
    """Put folder `scratch` at `path`; if that fails the old folder comes back."""
    for folder, _, files in scratch.walk():
        for name in files:
            _sync(folder / name)
    aside = path.with_name(scratch.name + ASIDE)
    existed = path.exists()
    if existed:
        path.rename(aside)
    try:
        scratch.rename(path)
    except OSError:
        if existed:
            aside.rename(path)
        raise
    remove(aside)


def _elements(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return place -> value in types that anndata can write."""
    elements: dict[str, Any] = {}
    for key, value in results.items():
        place = PLACES.get(key, key).strip("/")
        slot, *names = place.split("/")
        if slot not in SLOTS or not names or (slot != "uns" and len(names) > 1) or not all(names):
            msg = f"{key}: no place for a result; use <slot>/<name> with one of {', '.join(SLOTS)}"
            raise DataError(msg)
        if key == "cluster_assignments":
            elements |= cluster_columns(value)
        elements[place] = value if isinstance(value, RowStream) else plain(value)
    return elements


def _base(data: str | Path | AnnData, scratch: Path, suffix: str) -> None:
    """Write `data` without results to `scratch`."""
    if isinstance(data, str | Path):
        source = Path(data)
        if sniff(source) == suffix[1:] and not _is_old_layout(source, suffix):
            if suffix == ".h5ad":
                shutil.copyfile(source, scratch)
            else:
                shutil.copytree(source, scratch)
            return
        _write_adata(read(source), scratch, suffix)
        return
    if data.isbacked and not data.is_view and suffix == ".h5ad":
        from anndata.io import write_elem

        shutil.copyfile(cast("Any", data.filename), scratch)
        with _open_for_adding(scratch, suffix) as (file, _):
            for slot in ("obs", "var", "obsm", "varm", "uns"):  # these live in memory, and may have changed
                held = getattr(data, slot)
                write_elem(file, slot, held if slot in ("obs", "var") else plain(dict(held)))
        return
    if data.isbacked:
        with quiet():
            data = data.to_memory()
    _write_adata(_writable(data), scratch, suffix)


def _is_old_layout(path: Path, suffix: str) -> bool:
    """Tell whether obs is one compound dataset (anndata before 0.7), to which no column can be added."""
    if suffix != ".h5ad":
        return False
    import h5py

    with h5py.File(path, "r") as file:
        return not (isinstance(file.get("obs"), h5py.Group) and isinstance(file.get("var"), h5py.Group))


def _writable(adata: AnnData) -> AnnData:
    """Return `adata`, or a copy in which arrays of other libraries (jax) are numpy."""
    slots = ("layers", "obsm", "varm", "obsp", "varp")
    foreign = [
        (slot, key) for slot in slots for key, value in getattr(adata, slot).items() if _is_foreign(value)
    ]
    if not (foreign or _is_foreign(adata.X) or adata.is_view or _holds_foreign(adata.uns)):
        return adata
    with quiet():
        adata = adata.copy()
    if _is_foreign(adata.X):
        adata.X = np.asarray(adata.X)
    for slot, key in foreign:
        getattr(adata, slot)[key] = np.asarray(getattr(adata, slot)[key])
    for key, value in list(adata.uns.items()):
        if _holds_foreign(value):
            adata.uns[key] = plain(value)
    return adata


def _is_foreign(value: Any) -> bool:
    known = ("numpy", "scipy", "pandas", "h5py", "zarr", "dask", "anndata", "awkward", "builtins")
    return type(value).__module__.split(".")[0] not in known and hasattr(value, "__array__")


def _holds_foreign(value: Any) -> bool:
    if hasattr(value, "values") and hasattr(value, "items") and not hasattr(value, "columns"):
        return any(_holds_foreign(inner) for inner in value.values())
    return _is_foreign(value)


def _write_adata(adata: AnnData, scratch: Path, suffix: str) -> None:
    with quiet():
        if suffix == ".h5ad":
            from anndata.io import write_elem

            with opened_for_writing(scratch, "w") as (file, _):
                write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip"})
                if adata.raw is None:
                    file.pop("raw", None)  # a null there is news to older readers
        else:
            adata.write_zarr(scratch, convert_strings_to_categoricals=False)


@contextlib.contextmanager
def _open_for_adding(scratch: Path, suffix: str) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Yield the open store, and a function that raises if the disk is full already."""
    if suffix == ".h5ad":
        with opened_for_writing(scratch, "r+") as (file, disk):
            yield file, disk.check
        return
    import zarr

    group = zarr.open_group(str(scratch), mode="r+", use_consolidated=False)
    consolidated = zarr.open_group(str(scratch), mode="r").metadata.consolidated_metadata is not None
    yield group, lambda: None  # zarr says so itself
    if consolidated:  # else readers would not see what was added
        with quiet():  # "not part of the specification": anndata writes it too
            zarr.consolidate_metadata(str(scratch))


def _check_length(place: str, value: Any, lengths: Mapping[str, int]) -> None:
    slot = place.split("/")[0]
    axis = {"obs": "obs", "obsm": "obs", "obsp": "obs", "layers": "obs", "var": "var", "varm": "var"}.get(
        slot
    )
    if axis is None or isinstance(value, RowStream):
        return
    length = value.shape[0] if hasattr(value, "shape") else len(value)
    if length != lengths[axis]:
        kind = "cells" if axis == "obs" else "genes"
        msg = f"{place}: has {length} rows, the data has {lengths[axis]} {kind}; give one row for each"
        raise DataError(msg)
    if slot == "layers" and value.shape != (lengths["obs"], lengths["var"]):
        expected = (lengths["obs"], lengths["var"])
        msg = f"{place}: has shape {value.shape}, expected {expected}; put a subset of genes in obsm"
        raise DataError(msg)


def _add(store: Any, place: str, value: Any, check: Callable[[], None]) -> None:
    """Write one element into an open .h5ad or .zarr, replacing one of that name."""
    from anndata.io import write_elem

    slot, *names = place.split("/")
    group = store
    for part in [slot, *names[:-1]]:
        if part not in group:
            group.create_group(part).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        group = group[part]
    name = names[-1]
    if isinstance(value, RowStream):
        shape = (frame_length(store["obs"]), frame_length(store["var"]))
        chunks = (chunk for chunk in value.chunks if not check())  # type: ignore[func-returns-value]
        write_stream(group, name, value._replace(chunks=chunks), shape, place)
        return
    filters: dict[str, Any] = {}
    numeric = isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "biuf"
    if type(store).__module__.startswith("h5py") and (numeric or sparse.issparse(value)):
        filters = {"compression": "gzip", "fletcher32": True}
    write_elem(group, name, value, dataset_kwargs=filters)
    if slot in ("obs", "var"):
        order = [str(column) for column in group.attrs["column-order"]]
        if name not in order:
            listed = [*order, name]
            is_h5 = type(store).__module__.startswith("h5py")
            group.attrs["column-order"] = np.array(listed, dtype=object) if is_h5 else listed
