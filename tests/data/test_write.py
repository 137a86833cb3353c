import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio.data import RowStream, add_results, check_output, provenance, read, write, write_results
from diffbio.errors import DataError, OutputError


class ForeignArray:
    """Stands for an array of another library, such as jax."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape = self.values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)


def soft(n_cells=90, n_clusters=12):
    return np.random.default_rng(0).dirichlet(np.ones(n_clusters), n_cells).astype(np.float32)


def results():
    return {
        "latent": ForeignArray(soft()),
        "cluster_assignments": soft(),
        "contamination_fraction": np.linspace(0, 1, 90, dtype=np.float32),
        "obs/flag": np.arange(90) % 2 == 0,
        "obsm/fate": pd.DataFrame(soft(90, 2), columns=["a", "b"], index=[f"cell{i}" for i in range(90)]),
        "obsp/graph": sparse.csr_matrix(np.eye(90, dtype=np.float32)),
        "var/score": np.arange(30.0),
        "layers/diffbio_normalized": np.ones((90, 30), np.float32),
        "uns/diffbio/pipeline": {
            "none": None,
            "a/b": [1, 2],
            "mixed": [1, "x"],
            "deep": {"x": np.float32(1)},
        },
    }


def everything(adata):
    """Digest of all that the input held."""
    digest = hashlib.sha256()
    for matrix in (adata.X, adata.layers["double"]):
        for part in (matrix.data, matrix.indices, matrix.indptr):
            digest.update(np.ascontiguousarray(part).tobytes())
    digest.update(adata.obsm["X_pca"].tobytes())
    digest.update(adata.obs[["batch", "size", "note"]].to_csv().encode())
    digest.update(adata.var[["ambient"]].to_csv().encode())
    return digest.hexdigest() + adata.uns["old"]["kept"]


def no_scratch(folder):
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("given", ["h5ad", "zarr", "memory", "backed", "view"])
def test_round_trip(tmp_path, small, h5ad, given, suffix):
    before = everything(small)
    small.write_zarr(tmp_path / "small.zarr")
    data = {
        "h5ad": h5ad,
        "zarr": tmp_path / "small.zarr",
        "memory": small,
        "backed": ad.read_h5ad(h5ad, backed="r"),
        "view": small[:, :],
    }[given]
    path = write_results(data, tmp_path / f"out{suffix}", results())
    out = read(path)
    assert everything(out) == before == everything(small)
    assert "X_diffbio_latent" not in small.obsm
    np.testing.assert_array_equal(out.obsm["X_diffbio_latent"], soft())
    np.testing.assert_array_equal(out.obsm["diffbio_cluster_prob"], soft())
    assert out.obs["diffbio_cluster"].tolist() == [str(k) for k in soft().argmax(axis=1)]
    assert out.obs["diffbio_cluster"].cat.categories.tolist() == [str(k) for k in range(12)]
    np.testing.assert_array_equal(out.obs["diffbio_cluster_max_prob"], soft().max(axis=1))
    assert out.obs.columns.tolist()[:3] == ["batch", "size", "note"]
    assert out.obs["flag"].dtype == bool
    assert out.obsm["fate"].columns.tolist() == ["a", "b"]
    assert out.obsp["graph"].nnz == 90
    assert out.var["score"].tolist() == list(range(30))
    entry = out.uns["diffbio"]["pipeline"]
    assert entry["none"] == "none"
    assert entry["a|b"].tolist() == [1, 2]
    assert entry["mixed"] == '[1, "x"]'
    assert entry["deep"] == {"x": 1.0}
    no_scratch(tmp_path)


def test_a_second_function_adds_to_the_first(tmp_path, h5ad):
    path = write_results(h5ad, tmp_path / "a.h5ad", {"uns/diffbio/one": {"x": 1}, "latent": soft()})
    write_results(path, path, {"uns/diffbio/two": {"x": 2}, "latent": soft() * 2}, overwrite=True)
    out = read(path)
    assert set(out.uns["diffbio"]) == {"one", "two"}
    np.testing.assert_array_equal(out.obsm["X_diffbio_latent"], soft() * 2)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("columns", [None, np.array([7, 2, 29])])
def test_a_layer_written_as_it_is_computed(tmp_path, small, suffix, columns):
    small.write_zarr(tmp_path / "small.zarr")
    values = np.random.default_rng(0).poisson(1.0, (90, 30 if columns is None else 3)).astype(np.float32)
    stream = RowStream((ForeignArray(values[i : i + 40]) for i in range(0, 90, 40)), columns)
    path = write_results(small, tmp_path / f"out{suffix}", {"normalized": stream})
    layer = read(path).layers["diffbio_normalized"]
    if columns is None:
        np.testing.assert_array_equal(layer, values)
    else:
        assert layer.format == "csr"
        assert layer.nnz == np.count_nonzero(values)
        np.testing.assert_array_equal(layer[:, columns].toarray(), values)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"latent": soft(89)}, "has 89 rows, the data has 90 cells"),
        ({"var/score": np.ones(90)}, "the data has 30 genes"),
        ({"layers/n": np.ones((90, 3))}, r"shape \(90, 3\), expected \(90, 30\)"),
        ({"X": np.ones((90, 30))}, "no place"),
        ({"raw/X": np.ones((90, 30))}, "no place"),
        ({"obsm/a/b": soft()}, "no place"),
        ({"unheard_of": soft()}, "no place"),
        ({"normalized": RowStream([np.ones((80, 30))])}, "80 rows"),
        ({"normalized": RowStream([np.ones((100, 30))])}, "100 rows"),
        ({"normalized": RowStream([np.ones((90, 4))])}, r"chunk has shape \(90, 4\)"),
    ],
)
def test_results_that_do_not_fit(tmp_path, h5ad, result, said):
    with pytest.raises(DataError, match=said):
        write_results(h5ad, tmp_path / "out.h5ad", result)
    assert not (tmp_path / "out.h5ad").exists()
    no_scratch(tmp_path)


def test_add_results_in_memory(small):
    before = everything(small)
    add_results(small, results())
    assert everything(small) == before
    assert isinstance(small.obsm["X_diffbio_latent"], np.ndarray)
    assert small.obs["diffbio_cluster"].dtype == "category"
    assert small.uns["diffbio"]["pipeline"]["deep"] == {"x": 1.0}
    with pytest.raises(DataError, match="89 rows"):
        add_results(small, {"obs/fine": np.ones(90), "latent": soft(89)})
    assert "fine" not in small.obs


def test_arrays_of_other_libraries_in_the_input(tmp_path, small):
    jax = pytest.importorskip("jax")
    small.obsm["X_jax"] = jax.numpy.ones((90, 2))
    small.uns["jax"] = {"x": jax.numpy.arange(3)}
    out = read(write_results(small, tmp_path / "a.h5ad", {}))
    np.testing.assert_array_equal(out.obsm["X_jax"], np.ones((90, 2)))
    np.testing.assert_array_equal(out.uns["jax"]["x"], [0, 1, 2])


def test_numbers_are_stored_with_checksums(tmp_path, h5ad):
    path = write_results(h5ad, tmp_path / "a.h5ad", {"latent": soft()})
    with h5py.File(path) as file:
        dataset = file["obsm/X_diffbio_latent"]
        assert dataset.fletcher32
        offset = dataset.id.get_chunk_info(0).byte_offset + 20
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)
    with pytest.raises(Exception, match="damaged"):
        read(path)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_output_is_checked_first(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    assert check_output(path) == path
    assert not path.exists()
    no_scratch(tmp_path)
    with pytest.raises(OutputError, match=r"GB are free"):
        check_output(path, n_bytes=10**18)
    with pytest.raises(OutputError, match="folder does not exist"):
        check_output(tmp_path / "none" / path.name)
    with pytest.raises(OutputError, match="must end in"):
        check_output(tmp_path / "out.csv")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="symbolic link"):
        check_output(path, overwrite=True)
    path.unlink()
    path.mkdir()
    (path / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"exists; .*overwrite=True"):
        check_output(path)
    with pytest.raises(OutputError, match="exists and is no"):
        check_output(path, overwrite=True)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def deny(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", deny)  # root may write everywhere, so chmod would test nothing
    with pytest.raises(OutputError, match="Permission denied") as caught:
        check_output(tmp_path / "out.h5ad")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed: No space left on device")],
)
@pytest.mark.parametrize("step", ["_base", "_add"])
def test_full_disk(tmp_path, small, monkeypatch, suffix, error, step):
    path = write_results(small, tmp_path / f"out{suffix}", {"latent": soft()})
    before = everything(read(path))

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(write, step, full)
    with pytest.raises(OutputError, match=r"no space left on the disk; .*; make room"):
        write_results(small, path, {"latent": soft() * 2}, overwrite=True)
    monkeypatch.undo()
    out = read(path)
    assert everything(out) == before
    np.testing.assert_array_equal(out.obsm["X_diffbio_latent"], soft())
    no_scratch(tmp_path)


WRITER = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from diffbio.data import write_results
from diffbio.errors import OutputError
source, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:  # a file that cannot grow, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_results(source, path, {"latent": np.random.default_rng(0).random((90, 5000))}, overwrite=True)
    except OutputError as error:
        print(error.exit_code)
    sys.exit()
step = 0
while True:
    step += 1
    write_results(source, path, {"latent": np.full((90, 500), float(step))}, overwrite=True)
    print(step, flush=True)
"""


def test_file_that_cannot_grow(tmp_path, h5ad):
    path = tmp_path / "out.h5ad"
    shutil.copy(h5ad, path)
    before = path.read_bytes()
    limit = len(before) + 50_000
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(h5ad), str(path), str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "5", done.stderr[-1500:]
    assert path.read_bytes() == before
    no_scratch(tmp_path)


def test_killed_while_writing(tmp_path, h5ad):
    path = tmp_path / "out.h5ad"
    command = [sys.executable, "-c", WRITER, str(h5ad), str(path), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(3):
            child.stdout.readline()
        time.sleep(0.0137)
        child.kill()
    latent = read(path).obsm["X_diffbio_latent"]
    assert latent.min() == latent.max() >= 3


def test_two_writers(tmp_path, h5ad):
    path, failures = tmp_path / "out.h5ad", []

    def work(value):
        try:
            for _ in range(5):
                write_results(h5ad, path, {"latent": np.full((90, 50), value)}, overwrite=True)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    latent = read(path).obsm["X_diffbio_latent"]
    assert latent.min() == latent.max()
    no_scratch(tmp_path)


def test_old_layout(tmp_path, small):
    """anndata before 0.7 stored obs and var as compound arrays, to which no column can be added."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        for slot, names in (("obs", small.obs_names), ("var", small.var_names)):
            table = np.zeros(len(names), dtype=[("index", "S10"), ("n", "f8")])
            table["index"] = names.to_numpy().astype("S10")
            file[slot] = table
        group = file.create_group("X")
        group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": np.array(small.shape)})
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(small.X, part)
    out = read(write_results(path, tmp_path / "new.h5ad", {"latent": soft()}))
    np.testing.assert_array_equal(out.X.toarray(), small.X.toarray())
    assert out.obs_names.tolist() == small.obs_names.tolist()


def test_memory_does_not_grow_with_x(tmp_path, make):
    import tracemalloc

    adata = make(20_000, 30)
    adata.write_h5ad(tmp_path / "a.h5ad")
    del adata
    latent = np.zeros((20_000, 2), np.float32)
    tracemalloc.start()
    write_results(tmp_path / "a.h5ad", tmp_path / "b.h5ad", {"latent": latent})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # X and its layer are 3 MB in memory each


def test_provenance_can_be_written(tmp_path, h5ad):
    entry = provenance(
        params={"batch_key": None, "n": 3}, seed=1, data=h5ad, seconds=2.0, skipped=["harmony"], warnings=[]
    )
    out = read(write_results(h5ad, tmp_path / "a.h5ad", {"uns/diffbio/pipeline": entry}))
    assert not out.unwriteable()
    stored = out.uns["diffbio"]["pipeline"]
    assert stored["params"] == {"batch_key": "none", "n": 3}
    assert stored["skipped"].tolist() == ["harmony"]
    assert len(stored["warnings"]) == len(stored["unfitted"]) == 0
    assert stored["input_sha256"] == hashlib.sha256(Path(h5ad).read_bytes()).hexdigest()
