import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import sparse

from diffbio.data import as_source, guard, probe, read, write_results
from diffbio.errors import DataWarning, DeviceMemoryError, InputFileError


def refused(path, said, error=InputFileError):
    with pytest.raises(error, match=said) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.count(";") >= 2  # what; where; how to fix
    assert "HDF5 error" not in message
    assert "Unable to" not in message
    return message


def test_missing_file(tmp_path):
    refused(tmp_path / "none.h5ad", "no such file")


def test_other_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, "neither zarr nor 10x: it holds notes.txt")


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5ad")
    refused(tmp_path / "pipe.h5ad", "no regular file")


def test_unreadable_file(h5ad, monkeypatch):
    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(h5ad), "open", deny)  # root may read everything, so chmod would test nothing
    refused(h5ad, "cannot be opened")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"gene,cell1,cell2\nCD4,1,2\n", "comma-separated"),
        (b"gene\tcell1\n", "tab-separated"),
        (b"hello there\n", "text file"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "zip"),
        (b"\x80\x04\x95", "pickle"),
        (b"\x93NUMPY\x01", "NumPy"),
        (b"%%MatrixMarket matrix\n", "Matrix Market"),
        (b"RDX3\n", "R data"),
        (b"<html>", "HTML"),
        (bytes(range(256)), "unknown binary"),
    ],
)
def test_other_content_is_named(tmp_path, content, named):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(content)
    refused(path, named)


@pytest.mark.parametrize(
    ("member", "named"), [("mod", "MuData"), ("row_attrs", "loom"), ("weights", "it holds weights")]
)
def test_other_hdf5_is_named(tmp_path, member, named):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file.create_group(member)
    refused(tmp_path / "a.h5ad", named)


@pytest.mark.parametrize("fraction", [0, 1e-6, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["small", "pbmc3k"])
def test_truncated(tmp_path, h5ad, request, name, fraction):
    content = (h5ad if name == "small" else request.getfixturevalue("data_dir") / "pbmc3k.h5ad").read_bytes()
    path = tmp_path / "cut.h5ad"
    path.write_bytes(content[: int(len(content) * fraction)])
    have = path.stat().st_size
    expected = len(content) if have >= 48 else "at least 96"
    refused(path, f"file is truncated: have {have}, expected {expected} bytes")


def test_user_block(tmp_path, h5ad):
    with (
        h5py.File(tmp_path / "a.h5ad", "w", userblock_size=1024, libver="latest") as file,
        h5py.File(h5ad) as old,
    ):
        for name in old:
            old.copy(name, file)
    read(tmp_path / "a.h5ad")
    content = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "a.h5ad").write_bytes(content[:-9])
    refused(tmp_path / "a.h5ad", f"truncated: have {len(content) - 9}, expected {len(content)} bytes")


def link_external(file, other):
    del file["obsm"]["X_pca"]
    file["obsm"]["X_pca"] = h5py.ExternalLink(str(other), "/obsm/X_pca")


def link_top(file, other):
    del file["X"]
    file["X"] = h5py.ExternalLink(str(other), "/X")


def link_soft(file, other):
    file["obsm"]["again"] = h5py.SoftLink("/obsm/X_pca")


def link_cycle(file, other):
    file["uns"]["old"]["loop"] = file["uns"]


def link_deep(file, other):
    group = file["uns"]
    for _ in range(40):
        group = group.create_group("deeper")


def external_storage(file, other):
    del file["obsm"]["X_pca"]
    file["obsm"].create_dataset("X_pca", (90, 4), "f4", external=[(str(other), 0, 1440)])


def virtual(file, other):
    layout = h5py.VirtualLayout((90, 4), "f4")
    layout[:] = h5py.VirtualSource(str(other), "obsm/X_pca", (90, 4))
    file["obsm"].create_virtual_dataset("elsewhere", layout)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (link_external, "link to another file"),
        (link_top, "link to another file"),
        (link_soft, "soft link"),
        (link_cycle, "cycle"),
        (link_deep, "more than 32 deep"),
        (external_storage, "in another file"),
        (virtual, "in another file"),
    ],
)
def test_links(tmp_path, h5ad, change, said):
    other = tmp_path / "other.h5ad"
    shutil.copy(h5ad, other)
    with h5py.File(h5ad, "r+") as file:
        change(file, other)
    refused(h5ad, said)
    with pytest.raises(InputFileError, match=said):
        as_source(h5ad, cell_keys=("counts",))


def replace(group, name, change):
    values = change(group[name][:])
    attributes = dict(group[name].attrs)
    del group[name]
    group[name] = values
    group[name].attrs.update(attributes)


def at(index, value):
    def change(values):
        values[index] = value
        return values

    return change


@pytest.mark.parametrize("place", ["X", "layers/double"])
@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("indptr", at(5, 10**6), "indptr decreases at row 5"),
        ("indptr", at(0, 1), "indptr starts at 1"),
        ("indptr", at(-1, 10**6), "indptr ends at 1000000"),
        ("indptr", lambda v: v[:-1], "indptr has 90 entries for 90 rows"),
        ("indices", at(3, 30), "column index 30"),
        ("indices", at(3, -1), "column index -1"),
        ("indices", lambda v: v[:-1], "indices for"),
    ],
)
def test_damaged_sparse_matrix(h5ad, place, part, change, said):
    with h5py.File(h5ad, "r+") as file:
        replace(file[place], part, change)
    refused(h5ad, said)
    with pytest.raises(InputFileError, match=said):
        as_source(h5ad, cell_keys=("counts",), mapping={"counts": place}).take(np.arange(90))


@pytest.mark.parametrize("slot", ["obsm", "obsp", "uns"])
def test_damaged_sparse_matrix_elsewhere(tmp_path, small, slot):
    matrix = sparse.csr_matrix(np.eye(90, dtype=np.float32))
    getattr(small, slot)["m"] = matrix
    small.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        replace(file[slot]["m"], "indices", at(0, 10_000))
    refused(tmp_path / "a.h5ad", "column index 10000")


def test_claimed_shapes(h5ad):
    with h5py.File(h5ad, "r+") as file:
        file["X"].attrs["shape"] = np.array([2**40, 2**40])
    refused(h5ad, "indptr has 91 entries for 1099511627776 rows")


def test_shape_against_names(h5ad):
    with h5py.File(h5ad, "r+") as file:
        file["X"].attrs["shape"] = np.array([90, 2**40])
    refused(h5ad, "var has 30 entries")


@pytest.mark.parametrize("chunks", [None, (1024, 30)])
def test_a_small_file_that_claims_32_gib(h5ad, chunks):
    with h5py.File(h5ad, "r+") as file:
        file["obsm"].create_dataset("huge", (1 << 28, 32), "f4", chunks=chunks)
    refused(h5ad, "claims 34.4 GB, but 0 bytes are stored")


def test_more_than_the_memory(h5ad, monkeypatch):
    monkeypatch.setattr(guard, "free_memory", lambda: 1000)
    refused(h5ad, "of memory", DeviceMemoryError)


def test_free_memory_follows_the_limits_of_the_process():
    free = guard.free_memory()
    assert 0 < free < 2**50
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[0])
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), old[1]))
        assert guard.free_memory() <= 1 << 28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_zarr_with_a_chunk_missing(tmp_path, small):
    small.write_zarr(tmp_path / "a.zarr")
    chunk = next(
        p for p in (tmp_path / "a.zarr" / "X" / "data").rglob("*") if p.is_file() and p.name != "zarr.json"
    )
    chunk.unlink()
    refused(tmp_path / "a.zarr", "1 of 1 chunks of X/data are missing")


def test_zarr_with_a_chunk_cut_short(tmp_path, small):
    small.write_zarr(tmp_path / "a.zarr")
    chunk = next(
        p for p in (tmp_path / "a.zarr" / "X" / "data").rglob("*") if p.is_file() and p.name != "zarr.json"
    )
    chunk.write_bytes(chunk.read_bytes()[:-7])
    refused(tmp_path / "a.zarr", "damaged")


def test_zarr_without_its_metadata(tmp_path, small):
    small.write_zarr(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    refused(tmp_path / "a.zarr", "damaged zarr")


CHILD = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from diffbio.data import as_source, read
from diffbio.errors import DiffBioError
path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
content = open(path, "rb").read()
for seed in range(first, last):
    print("try", seed, flush=True)
    rng = np.random.default_rng(seed)
    flipped = bytearray(content)
    flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    target = f"{path}.flipped"
    open(target, "wb").write(flipped)
    try:
        adata = read(target)
        adata.X.sum(), adata.X.toarray(), adata.layers["double"].sum()
        as_source(target, cell_keys=("counts",)).take(np.arange(90))
        print("read", flush=True)
    except DiffBioError as error:
        assert "\\n" not in str(error)
        print("refused", flush=True)
"""


def test_flipped_bits(h5ad):
    """One bit of a file flipped: the file is refused, or read; nothing but our own errors comes out."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(h5ad), "0", "40"], capture_output=True, text=True, timeout=600, check=False
    )
    assert child.returncode == 0, (child.stdout[-200:], child.stderr[-2000:])
    printed = child.stdout.split("\n")
    assert printed.count("refused") > 0
    assert printed.count("read") > 0
    assert printed.count("refused") + printed.count("read") == 40


SILENT = """
import sys, warnings
import numpy as np
import pandas as pd
from diffbio.data import read, write_results
from diffbio.errors import DataWarning, DiffBioError
whole, path = sys.argv[1], sys.argv[1] + ".flipped.h5ad"
content, wanted = open(whole, "rb").read(), read(whole)
def same(found):
    pd.testing.assert_frame_equal(found.obs, wanted.obs)
    pd.testing.assert_frame_equal(found.var, wanted.var)
    for slot in ("obsm", "layers", "uns"):
        assert set(getattr(found, slot)) == set(getattr(wanted, slot)), slot
    np.testing.assert_array_equal(found.X.toarray(), wanted.X.toarray())
    np.testing.assert_array_equal(found.obsm["X_diffbio_umap"], wanted.obsm["X_diffbio_umap"])
    assert found.uns["diffbio"] == wanted.uns["diffbio"]
for seed in range(int(sys.argv[2])):
    rng = np.random.default_rng(seed)
    flipped = bytearray(content)
    flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    open(path, "wb").write(flipped)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read(path)
        except DiffBioError:
            print("refused")
            continue
    if any(issubclass(w.category, DataWarning) for w in told):
        print("warned")
        continue
    same(found)
    print("same")
"""


def test_no_flipped_bit_of_our_own_files_goes_unseen(tmp_path, small):
    result = {"obsm/X_diffbio_umap": np.ones((small.n_obs, 2), np.float32), "uns/diffbio": {"note": "some text"}}
    path = write_results(small, tmp_path / "own.h5ad", result)
    child = [sys.executable, "-c", SILENT, str(path), "30"]
    done = subprocess.run(child, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == 30
    assert done.stdout.count("refused") > 0


def test_names_changed_by_another_program_are_told(tmp_path, small):
    path = write_results(small, tmp_path / "own.h5ad", {})
    read(path)
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["note"] = "mine"
    with pytest.warns(DataWarning, match="names in it are not those that diffbio wrote"):
        read(path)
    write_results(path, tmp_path / "again.h5ad", {})
    read(tmp_path / "again.h5ad")


LIKE_LIBHDF5 = """
import os, resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
{}
"""


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the HDF5 library crashes on it"),
        ("os.abort()", "the HDF5 library crashes on it"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "the HDF5 library does not come to an end with it"),
    ],
)
def test_a_library_that_crashes_takes_a_child_with_it_not_the_caller(tmp_path, h5ad, monkeypatch, deed, said):
    (tmp_path / "probe.py").write_text(LIKE_LIBHDF5.format(deed))
    monkeypatch.setattr(guard, "PROBE", tmp_path / "probe.py")
    refused(h5ad, said)
    with pytest.raises(InputFileError, match=said):
        as_source(h5ad, cell_keys=("counts",))


def test_one_child_for_each_state_of_a_file(tmp_path, h5ad, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "run", lambda *a, run=subprocess.run, **k: (started.append(a), run(*a, **k))[1])
    read(h5ad)
    read(h5ad)
    assert len(started) == 1
    with h5py.File(h5ad, "r+") as file:
        file["uns/old/more"] = 3
    read(h5ad)
    assert len(started) == 2
    read(write_results(h5ad, tmp_path / "out.h5ad", {}))  # no need to doubt what was just written
    assert len(started) == 2


def test_a_machine_that_starts_no_child_reads_all_the_same(h5ad, monkeypatch):
    def deny(*_args, **_options):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", deny)
    read(h5ad)


def test_the_probe_reads_what_it_should(h5ad, monkeypatch):
    looked = []
    monkeypatch.setattr(probe, "look_at_values", lambda data: looked.append(data.name))
    with h5py.File(h5ad) as file:
        wanted: list[str] = []
        file.visititems(lambda name, member: wanted.append("/" + name) if hasattr(member, "dtype") else None)
        probe.look(file)
    assert len(wanted) > 10
    assert sorted(looked) == sorted(wanted)
