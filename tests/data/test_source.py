import threading
import time

import anndata as ad
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from diffbio.data import ArraySource, FileSource, Source, as_source, chunks, counts_of
from diffbio.errors import DataError, DataWarning, InputFileError, MissingKeyError
from diffbio.math.sparse import SparseRows

KEYS = ("counts", "batch_labels", "ambient_profile")
MAPPING = {"counts": "X", "batch_labels": "obs/batch", "ambient_profile": "var/ambient"}


def source_of(data, **changes):
    return as_source(data, cell_keys=KEYS[:2], constant_keys=KEYS[2:], **({"mapping": MAPPING} | changes))


def same(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype, key
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    n_cells=st.integers(1, 150),
    n_genes=st.integers(1, 40),
    subset=st.booleans(),
)
def test_every_layout_gives_the_same_batches(tmp_path_factory, make, seed, n_cells, n_genes, subset):
    adata = make(n_cells, n_genes, seed)
    adata.obs["batch"] = "ab"[n_cells % 2]  # constant: the warning is expected below
    rng = np.random.default_rng(seed)
    genes = rng.permutation(n_genes)[: max(1, n_genes // 2)] if subset else None
    rows = rng.integers(0, n_cells, 70)
    folder = tmp_path_factory.mktemp("layouts")
    adata.write_h5ad(folder / "csr.h5ad", compression="gzip")
    adata.write_zarr(folder / "csr.zarr")
    dense = adata.copy()
    dense.X = adata.X.toarray()
    dense.write_h5ad(folder / "dense.h5ad")
    csc = adata.copy()
    csc.X = adata.X.tocsc()
    whole = adata.copy()
    whole.X = adata.X.astype(np.int64)
    backed = ad.read_h5ad(folder / "csr.h5ad", backed="r")
    with pytest.warns(DataWarning):
        reference = source_of(adata, genes=genes).take(rows)
    assert reference["counts"].dtype == np.float32
    for data in (dense, csc, whole, backed, *sorted(folder.iterdir())):
        with pytest.warns(DataWarning):
            source = source_of(data, genes=genes)
        assert isinstance(source, Source)
        same(reference, source.take(rows))
        np.testing.assert_array_equal(
            np.concatenate([part["counts"] for part in chunks(source, 32)]),
            adata.X.toarray() if genes is None else adata.X.toarray()[:, genes],
        )


def test_a_dict_of_arrays(small):
    counts = small.X.toarray().astype(np.int64)
    data = {
        "counts": counts,
        "batch_labels": np.arange(90) % 3,
        "neighbor_indices": np.zeros((90, 5), np.int64),
        "pseudotime": np.linspace(0, 1, 90),
        "mask": np.ones((90, 2), bool),
        "library_size": None,
        "extra": "not asked for",
        "ambient_profile": np.ones(30) / 30,
    }
    cell_keys = set(data) - {"extra", "ambient_profile"}
    source = as_source(data, cell_keys=cell_keys, constant_keys={"ambient_profile"})
    batch = source.take(np.array([5, 5, 0]))
    types = {key: value.dtype.name for key, value in batch.items()}
    assert types == {
        "counts": "float32",
        "batch_labels": "int32",
        "neighbor_indices": "int32",
        "pseudotime": "float32",
        "mask": "bool",
        "ambient_profile": "float32",
    }
    np.testing.assert_array_equal(batch["counts"], counts[[5, 5, 0]])
    assert batch["ambient_profile"].shape == (30,)
    assert as_source(source, cell_keys=()) is source


def test_labels_are_codes_with_names(small):
    source = source_of(small)
    codes = source.take(np.arange(90))["batch_labels"]
    assert source.categories == {"batch_labels": ("a", "b", "c")}
    assert [source.categories["batch_labels"][code] for code in codes] == small.obs["batch"].tolist()


def test_repeated_entries_add_up_and_the_caller_keeps_his_matrix():
    values, columns, starts = np.array([1.0, 2.0, 4.0]), np.array([1, 1, 0]), np.array([0, 2, 3])
    matrix = sparse.csr_matrix((values, columns, starts), shape=(2, 3))
    batch = ArraySource({"counts": matrix}).take(np.array([0, 1]))
    np.testing.assert_array_equal(batch["counts"], [[0, 3, 0], [4, 0, 0]])
    assert matrix.nnz == 3


def test_file_order_reads_each_block_once(tmp_path, make):
    adata = make(1000, 20)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:  # without chunks, which would set the size of blocks
        for part in ("data", "indices"):
            values = file["X"][part][:]
            del file["X"][part]
            file["X"].create_dataset(part, data=values)
    source = source_of(tmp_path / "a.h5ad")
    source = FileSource(source.matrices, block_rows=16, group_rows=128)
    order = source.order(np.random.default_rng(1), np.arange(1000))
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, source.order(np.random.default_rng(1), np.arange(1000)))
    reference = ArraySource({"counts": adata.X})
    for start in range(0, 1000, 50):
        rows = order[start : start + 50]
        same(reference.take(rows), source.take(rows))
    assert source.block_rows == 16
    assert source.n_block_reads == -(-1000 // 16)
    # rows of one batch come from all over the file
    assert len(np.unique(order[:50] // source.block_rows)) > 0.5 * source.blocks_per_group
    assert source.nbytes_in_memory < 0.5 * adata.X.nnz * 8


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_order_of_some_rows(h5ad, small, kind):
    source = source_of(h5ad if kind == "file" else small)
    rows = np.array([3, 80, 17, 4])
    order = source.order(np.random.default_rng(0), rows)
    np.testing.assert_array_equal(np.sort(order), np.sort(rows))


def test_file_source_from_several_threads(h5ad, small):
    source = FileSource(source_of(h5ad).matrices, block_rows=8, group_rows=16)
    reference = ArraySource({"counts": small.X})
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            rows = rng.integers(0, 90, 20)
            if not np.array_equal(source.take(rows)["counts"], reference.take(rows)["counts"]):
                failures.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_matrix_stored_by_column_is_loaded(tmp_path, small):
    reference = source_of(small).take(np.arange(90))
    small.X = small.X.tocsc()
    small.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.warns(DataWarning, match=r"by column \(CSC\): loaded"):
        source = source_of(tmp_path / "csc.h5ad")
    same(reference, source.take(np.arange(90)))


def test_layers_obsm_and_columns(h5ad, small):
    mapping = {"counts": "layers/double", "embeddings": "obsm/X_pca", "library_size": "obs/size"}
    for data in (h5ad, small):
        batch = as_source(data, cell_keys=mapping, mapping=mapping).take(np.array([7]))
        np.testing.assert_array_equal(batch["counts"], 2 * small.X[[7]].toarray())
        np.testing.assert_array_equal(batch["embeddings"], small.obsm["X_pca"][[7]])
        assert batch["library_size"] == small.obs["size"].iloc[7]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_place_that_is_not_there(h5ad, small, kind):
    data = h5ad if kind == "file" else small
    with pytest.raises(MissingKeyError, match="double" if kind == "memory" else "layers"):
        source_of(data, mapping={"counts": "layers/raw"})
    with pytest.raises(MissingKeyError, match="batch, size, note"):
        source_of(data, mapping={"counts": "X", "batch_labels": "obs/plate"})


def test_arrays_that_do_not_fit():
    with pytest.raises(DataError, match="counts has 3, batch_labels has 4"):
        ArraySource({"counts": np.ones((3, 2)), "batch_labels": np.zeros(4, int)})
    with pytest.raises(DataError, match="no number"):
        ArraySource({"batch_labels": np.array(["a", "b"])})
    with pytest.raises(DataError, match="no array with a cell axis"):
        as_source({}, cell_keys={"counts"})
    with pytest.raises(DataError, match="got int"):
        as_source(3, cell_keys={"counts"})
    matrix = sparse.csr_matrix(np.eye(3))
    matrix.indices[1] = 9
    with pytest.raises(DataError, match="column index outside"):
        ArraySource({"counts": matrix})


def test_view_of_a_backed_file_says_what_to_do(h5ad):
    with pytest.raises(DataError, match="to_memory"):
        source_of(ad.read_h5ad(h5ad, backed="r")[:5])


def test_rows_outside_the_file(h5ad):
    with pytest.raises(IndexError, match=r"\[0, 90\)"):
        source_of(h5ad).take(np.array([90]))


def test_counts_of_leaves_data_where_it_is(h5ad, small):
    assert counts_of(small) is small.X
    assert counts_of(small, layer="double") is small.layers["double"]
    for data in (h5ad, ad.read_h5ad(h5ad, backed="r")):
        assert counts_of(data).shape == (90, 30)
        assert not isinstance(counts_of(data), np.ndarray)


def test_a_batch_is_quick():
    matrix = sparse.random(5000, 2000, density=0.1, format="csr", dtype=np.float32, random_state=0)
    source = ArraySource({"counts": matrix})
    rng = np.random.default_rng(0)
    best = np.inf
    for _ in range(100):
        rows = rng.integers(0, 5000, 128)
        start = time.perf_counter()
        source.take(rows)
        best = min(best, time.perf_counter() - start)
    assert best < 0.5e-3  # the fastest of many: other processes cannot spoil it


def test_a_file_gives_sparse_batches_that_are_the_dense_ones(h5ad, small):
    source = as_source(h5ad, cell_keys={"counts"})
    for rows in (np.arange(7), np.array([5, 0, 5, 11])):
        batch = source.take_sparse(rows)["counts"]
        dense = batch.dense() if isinstance(batch, SparseRows) else batch
        np.testing.assert_array_equal(dense, source.take(rows)["counts"])
    shapes = {source.take_sparse(np.arange(i, i + 8))["counts"].values.shape for i in range(4)}
    assert len(shapes) == 1  # one program serves them all
    source.close()


def test_damage_met_while_streaming_is_the_files_fault(tmp_path, make):
    make(400, 60).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as store:
        where = store["X/data"].id.get_chunk_info(0).byte_offset
    raw = bytearray((tmp_path / "a.h5ad").read_bytes())
    raw[where + 20] ^= 255
    (tmp_path / "a.h5ad").write_bytes(raw)
    source = as_source(tmp_path / "a.h5ad", cell_keys={"counts"})
    with pytest.raises(InputFileError, match="damaged: make a fresh copy"):
        source.take(np.arange(400))
    source.close()


@pytest.mark.parametrize("genes", [None, np.arange(9)])
def test_parts_of_a_batch_of_a_file_are_the_batch(h5ad, small, genes):
    file, memory = source_of(h5ad, genes=genes), source_of(small, genes=genes)
    rows = np.random.default_rng(0).permutation(small.n_obs)[:24]
    wanted = memory.take(rows)
    for source in (file, memory):
        parts = [source.take_blocks(rows, 4, mine) for mine in (range(1), range(1, 4))]
        # without reading it, nobody can tell how many entries of some genes another process has
        assert isinstance(parts[0]["counts"], SparseRows) == (genes is None or source is memory)
        kinds = [np.asarray(p["counts"].index).shape[1:] for p in parts if isinstance(p["counts"], SparseRows)]
        assert len(set(kinds)) < 2  # one capacity
        whole = source.take_blocks(rows, 4, range(4))
        counts = whole["counts"].dense() if isinstance(whole["counts"], SparseRows) else whole["counts"]
        np.testing.assert_array_equal(counts, wanted["counts"])
        for key in KEYS[1:2]:
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), wanted[key])
        np.testing.assert_array_equal(parts[0][KEYS[2]], wanted[KEYS[2]])
