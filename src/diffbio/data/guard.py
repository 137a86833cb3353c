"""What a file really holds, and whether it is safe to read: looked at before anything is computed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from ..errors import DeviceMemoryError, InputFileError
from .matrix import check_indptr, encoding, frame_length, stored_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    import h5py
    import zarr

type Kind = Literal["h5ad", "zarr", "10x_h5", "10x_mtx"]

MAX_DEPTH = 32
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# One byte of deflate stands for at most 1032; other filters repeat further. Small arrays are let through.
MAX_EXPANSION = 1032
HARMLESS_BYTES = 64 << 20
PROBE = Path(__file__).with_name("probe.py")
CRASHES = {-getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGXCPU")}

MAGIC = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstandard archive",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a Parquet table",
    b"RDX": "an R data file",
    b"%PDF": "a PDF document",
    b"%%MatrixMarket": "a Matrix Market file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"SQLite": "an SQLite database",
    b"<": "an HTML or XML document",
}


def sniff(path: Path) -> Kind:
    """Tell by its content what `path` is.

    Raises
    ------
    InputFileError : missing, unreadable, empty, truncated, or of another type, which is named.
    """
    try:
        if not path.exists():
            _refuse("no such file", path, "check the name")
        if path.is_dir():
            return _sniff_folder(path)
        if not path.is_file():
            _refuse("is no regular file", path, "pass a .h5ad or 10x .h5 file, a .zarr or a 10x folder")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        _refuse(f"cannot be opened ({os.strerror(error.errno or 0)})", path, "check its permissions", error)
    if not head:
        _refuse("file is truncated: have 0, expected at least 96 bytes", path, "copy or download it again")
    if HDF5_SIGNATURE.startswith(head[:8]) or _superblock_offset(path) is not None:
        return _sniff_hdf5(path)
    _refuse(f"is {_describe(head)}, not single-cell data", path, "pass a .h5ad, .zarr, 10x .h5 or 10x folder")


def free_memory() -> int:
    """Return the bytes this process can still allocate: of the machine, its control group and its limits."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    limit = address_space()
    if limit is not None:
        with contextlib.suppress(OSError):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limits.append(limit - used)
    return max(0, min(limits))


def address_space() -> int | None:
    """Return the bytes that this process may address at most (`ulimit -v`); None is no limit."""
    try:
        import resource
    except ImportError:
        return None
    soft = int(resource.getrlimit(resource.RLIMIT_AS)[0])
    return None if soft == resource.RLIM_INFINITY else soft


def require_memory(n_bytes: int, what: str, where: str) -> None:
    """Raise `DeviceMemoryError` unless `n_bytes` can be allocated."""
    free = free_memory()
    if n_bytes > free:
        msg = (
            f"{what} needs {_size(n_bytes)} of memory, {_size(free)} are free; {where}; "
            "pass the path itself to stream it from disk, or select genes first"
        )
        raise DeviceMemoryError(msg)


def check_hdf5(path: Path) -> None:
    """Refuse an HDF5 file that is truncated, links out of itself, or claims more than it holds."""
    check_complete(path)
    with opened(path) as file:
        for name, member in walk(file, path):
            claimed_bytes(name, member, path)


def check_complete(path: Path) -> None:
    """Raise `InputFileError` if `path` is shorter than the end-of-file address in its HDF5 superblock."""
    have = path.stat().st_size
    need = _end_of_file(path)
    if need is None or have < need:
        expected = "at least 96" if need is None else need
        _refuse(
            f"file is truncated: have {have}, expected {expected} bytes", path, "copy or download it again"
        )


def opened(path: Path) -> h5py.File:
    """Open an HDF5 file for reading; `InputFileError` if the library cannot, or if it crashes on this file."""
    import h5py

    probe(path)
    try:
        return h5py.File(path, "r")
    except Exception as error:
        _refuse("is a damaged HDF5 file, or another program is writing it", path, "make a fresh copy", error)


def probe(path: Path) -> None:
    """Raise `InputFileError` if libhdf5 crashes or hangs on `path`: `probe.py` reads it in a process of its own.

    Each state of a file is probed once; files that diffbio wrote itself are not (`trust`).
    """
    state = _state(path)
    if state in _healthy or not sys.executable:
        return
    command = [sys.executable, "-S", "-P", "-W", "ignore", str(PROBE), str(path)]
    # the modules that this process sees, without what `site` adds; numpy needs no threads to read a file
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        code = subprocess.run(command, env=env, capture_output=True, check=False).returncode
    except OSError:  # no process can be started here: go on without
        return
    if code in CRASHES:
        how = "does not come to an end with" if code == -signal.SIGXCPU else "crashes on"
        _refuse(f"is damaged: the HDF5 library {how} it", path, "make a fresh copy")
    trust(path)


def trust(path: Path) -> None:
    """Take a file, as it is now, for healthy: it was probed, or written by this process."""
    _healthy.add(_state(path))


def _state(path: Path) -> tuple[int, ...]:
    info = path.stat()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


_healthy: set[tuple[int, ...]] = set()


def walk(group: h5py.Group, path: Path) -> Iterator[tuple[str, h5py.Dataset | h5py.Group]]:
    """Yield (name, object) of everything in an HDF5 file, refusing links that are not plain members."""
    import h5py

    seen: set[int] = set()

    def visit(parent: h5py.Group, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
        if depth > MAX_DEPTH:
            _refuse(f"groups are nested more than {MAX_DEPTH} deep at {prefix[:60]}", path, REWRITE)
        address = h5py.h5o.get_info(parent.id).addr
        if address in seen:
            _refuse(f"links form a cycle, or name a group twice, at {prefix or '/'}", path, REWRITE)
        seen.add(address)
        for name in parent:
            where = f"{prefix}/{name}"
            link = parent.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                _refuse(f"{where} is a link to another file", path, REWRITE)
            if isinstance(link, h5py.SoftLink):
                _refuse(f"{where} is a soft link", path, REWRITE)
            member = parent[name]
            yield where, member
            if isinstance(member, h5py.Group):
                yield from visit(member, where, depth + 1)
            elif member.external or member.is_virtual:
                _refuse(f"{where} keeps its values in another file", path, REWRITE)

    try:
        yield from visit(group, "", 0)
    except InputFileError:
        raise
    except Exception as error:
        _refuse("is damaged", path, "make a fresh copy", error)


def claimed_bytes(name: str, member: h5py.Dataset | h5py.Group, path: Path) -> int:
    """Return the bytes a dataset takes in memory; refuse a claim that the bytes stored cannot expand to."""
    if not hasattr(member, "dtype"):
        return 0
    claimed = int(member.size or 0) * int(member.dtype.itemsize)
    stored = int(member.id.get_storage_size())
    expansion = {None: 1, "gzip": MAX_EXPANSION, "lzf": MAX_EXPANSION}.get(
        member.compression, 100 * MAX_EXPANSION
    )
    if claimed > HARMLESS_BYTES and claimed > stored * expansion:
        _refuse(f"{name} claims {_size(claimed)}, but {stored:,} bytes are stored", path, "make a fresh copy")
    return claimed


def check_h5ad(path: Path, *, backed: bool = False) -> None:
    """Check everything about a .h5ad that can be checked without reading its matrices.

    Links, sizes claimed against bytes stored and against free memory, and the row pointers of every sparse
    matrix. Indices are checked where they are read.
    """
    import h5py

    check_complete(path)
    with opened(path) as file:
        needed = 0
        for name, member in walk(file, path):
            if not isinstance(member, h5py.Dataset):
                if "data" in member and "indptr" in member:
                    _check_sparse(member, name, path)
                continue
            claimed = claimed_bytes(name, member, path)
            if not (backed and name.startswith(("/X", "/layers", "/raw"))):
                needed += claimed
        _check_shapes(file, path)
    require_memory(needed, "reading", str(path))


def check_zarr(path: Path, *, backed: bool = False) -> None:
    """Check a .zarr folder as `check_h5ad` does, and that no chunk of a sparse matrix is missing.

    A missing chunk reads as zeros without an error.
    """
    import zarr

    group = open_zarr(path)
    needed = 0
    for name, member in _zarr_members(group, path):
        if isinstance(member, zarr.Group):
            if "data" in member and "indptr" in member:
                _check_chunks(member, name, path)
                _check_sparse(member, name, path)
        elif not (backed and name.startswith(("X", "layers", "raw"))):
            needed += int(member.nbytes)
    _check_shapes(group, path)
    require_memory(needed, "reading", str(path))


def open_zarr(path: Path) -> zarr.Group:
    """Open a zarr folder for reading; `InputFileError` if it is damaged."""
    import zarr

    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:
        _refuse("is a damaged zarr folder", path, "make a fresh copy", error)


REWRITE = "write the file again with anndata"


def _refuse(what: str, path: Path, how: str, cause: BaseException | None = None) -> NoReturn:
    msg = f"{what}; {path}; {how}"
    raise InputFileError(msg) from cause


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes < 1e12 else f"{n_bytes / 1e12:,.1f} TB"


def _describe(head: bytes) -> str:
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    try:
        text = head[: head.rfind(b"\n") + 1 or None].decode()
    except UnicodeDecodeError:
        return "of an unknown binary type"
    first = text.partition("\n")[0]
    if "\0" in text:
        return "of an unknown binary type"
    if "\t" in first:
        return "a tab-separated table"
    return "a comma-separated table" if "," in first else "a text file"


def _superblock_offset(path: Path) -> int | None:
    """Return where the HDF5 signature is: at 0, or after a user block of 512, 1024, ... bytes."""
    size = path.stat().st_size
    offset = 0
    with path.open("rb") as file:
        while offset < min(size, 1 << 20):
            file.seek(offset)
            if file.read(8) == HDF5_SIGNATURE:
                return offset
            offset = max(512, offset * 2)
    return None


def _end_of_file(path: Path) -> int | None:
    """Return the end-of-file address of an HDF5 superblock (versions 0 to 3), None if that is cut off."""
    offset = _superblock_offset(path)
    if offset is None:
        return None
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(96)
    if len(block) < 14:
        return None
    version = block[8]
    width = block[13] if version < 2 else block[9]
    start = {0: 24, 1: 28}.get(version, 12)
    field = block[start + 2 * width : start + 3 * width]
    return int.from_bytes(field, "little") if len(field) == width else None


def _sniff_folder(path: Path) -> Kind:
    names = {entry.name for entry in path.iterdir()}
    if names & {"zarr.json", ".zgroup", ".zattrs"}:
        return "zarr"
    if any(name.endswith(("matrix.mtx", "matrix.mtx.gz")) for name in names):
        return "10x_mtx"
    shown = ", ".join(sorted(names)[:5]) or "nothing"
    _refuse(
        f"is a folder, but neither zarr nor 10x: it holds {shown}",
        path,
        "pass the file or folder of the data",
    )


def _own_members(file: h5py.File, name: str) -> set[str]:
    """Return the names inside a group, without following a link that is not a plain member."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return set()
    member = file[name]
    return set(member) if isinstance(member, h5py.Group) else set()


def _sniff_hdf5(path: Path) -> Kind:
    check_complete(path)
    with opened(path) as file:
        try:
            names = set(file)
            members = {name: _own_members(file, name) for name in names}
        except Exception as error:
            _refuse("is damaged", path, "make a fresh copy", error)
    if "barcodes" in members.get("matrix", ()):
        return "10x_h5"
    if any({"barcodes", "genes", "data"} <= inside for inside in members.values()):
        return "10x_h5"
    if {"obs", "var"} <= names or "X" in names:
        return "h5ad"
    for mark, name in {
        "mod": "a MuData file (.h5mu)",
        "row_attrs": "a loom file",
        "molecule_info": "10x molecules",
    }.items():
        if mark in names:
            _refuse(f"is {name}, which is not read", path, "convert it to .h5ad with anndata or mudata")
    shown = ", ".join(sorted(names)[:5]) or "nothing"
    _refuse(
        f"is an HDF5 file, but no AnnData or 10x matrix: it holds {shown}", path, "pass a .h5ad or 10x .h5"
    )


def _zarr_members(group: zarr.Group, path: Path) -> list[tuple[str, Any]]:
    try:
        members = list(group.members(max_depth=MAX_DEPTH + 1))
    except Exception as error:
        _refuse("is a damaged zarr folder", path, "make a fresh copy", error)
    for name, _ in members:
        if name.count("/") >= MAX_DEPTH:
            _refuse(f"groups are nested more than {MAX_DEPTH} deep at {name[:60]}", path, REWRITE)
    return members


def _check_chunks(group: Any, name: str, path: Path) -> None:
    for part in ("data", "indices", "indptr"):
        array = group[part]
        # A chunk of zeros only is not stored: for `data` that never happens, for the others in tiny arrays.
        if array.nchunks_initialized < array.nchunks and array.size and (part == "data" or array.nchunks > 1):
            missing = array.nchunks - array.nchunks_initialized
            _refuse(
                f"{missing} of {array.nchunks} chunks of {name}/{part} are missing", path, "make a fresh copy"
            )


def _check_sparse(group: Any, name: str, path: Path) -> None:
    """Check shape, row pointers and lengths of a CSR or CSC group."""
    where = f"{path}, {name}"
    kind = encoding(group)
    if kind == "dense" or "indices" not in group:
        return
    try:
        n_rows, n_columns = stored_shape(group)
        n_values, n_indices = int(group["data"].shape[0]), int(group["indices"].shape[0])
        indptr = np.asarray(group["indptr"][:])
    except Exception as error:
        _refuse(f"sparse matrix {name} is damaged", path, "make a fresh copy", error)
    if n_values != n_indices:
        _refuse(
            f"sparse matrix {name} has {n_indices} indices for {n_values} values", path, "make a fresh copy"
        )
    check_indptr(indptr, n_rows if kind == "csr" else n_columns, n_values, where)


def _check_shapes(store: Any, path: Path) -> None:
    """Check the shapes of X and the layers against the lengths of obs and var."""
    try:
        lengths = tuple(frame_length(store[slot]) if slot in store else None for slot in ("obs", "var"))
        matrices = {"X": store["X"]} if "X" in store else {}
        if "layers" in store:
            matrices |= {f"layers/{name}": store["layers"][name] for name in store["layers"]}
        shapes = {name: stored_shape(matrix) for name, matrix in matrices.items()}
    except Exception as error:
        _refuse("is a damaged AnnData file", path, "make a fresh copy", error)
    for name, shape in shapes.items():
        for length, claimed, axis in zip(lengths, shape, ("obs", "var"), strict=True):
            if length is not None and length != claimed:
                _refuse(
                    f"{name} has shape {shape}, but {axis} has {length} entries", path, "make a fresh copy"
                )
