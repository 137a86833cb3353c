"""Sparse batches become the dense ones they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from diffbio.data.device_source import DeviceSource
from diffbio.data.source import ArraySource
from diffbio.math.sparse import SparseRows

MATRIX = sparse.random_array((30, 11), density=0.3, format="csr", rng=np.random.default_rng(0), dtype=np.float32)


def test_dense_again():
    source = ArraySource({"counts": MATRIX})
    for rows in (np.array([3, 1, 29, 0]), np.arange(30), np.array([7])):
        batch = source.take_sparse(rows)["counts"]
        assert isinstance(batch, SparseRows)
        np.testing.assert_array_equal(batch.dense(), MATRIX.toarray()[rows])


def test_batches_of_one_length_share_one_program():
    source = ArraySource({"counts": MATRIX})
    traces = []
    run = jax.jit(lambda batch: (traces.append(0), batch.dense())[1])
    for seed in range(5):
        rows = np.random.default_rng(seed).choice(30, 8, replace=False)
        np.testing.assert_array_equal(run(source.take_sparse(rows)["counts"]), MATRIX.toarray()[rows])
    assert len(traces) == 1


def test_full_rows_repeated_come_dense():
    matrix = sparse.csr_array(np.vstack([np.ones((1, 5)), np.zeros((9, 5))]).astype(np.float32))
    batch = ArraySource({"counts": matrix}).take_sparse(np.zeros(4, int))["counts"]
    np.testing.assert_array_equal(batch, np.ones((4, 5)))


def test_empty_matrix():
    batch = ArraySource({"counts": sparse.csr_array((4, 5), dtype=np.float32)}).take_sparse(np.arange(3))["counts"]
    np.testing.assert_array_equal(batch.dense(), np.zeros((3, 5)))


def test_values_at_entries_and_row_sums_leave_the_padding_out():
    rng = np.random.default_rng(1)
    rows = np.array([2, 5, 9])
    batch = ArraySource({"counts": MATRIX}).take_sparse(rows)["counts"]
    assert len(batch.values) > MATRIX[rows].nnz  # there is padding
    dense, per_column = rng.normal(size=(3, 11)), rng.normal(size=11)
    there = MATRIX[rows].toarray() != 0
    np.testing.assert_allclose(batch.row_sums(batch.at_entries(jnp.asarray(dense))), (dense * there).sum(1), rtol=1e-5)
    np.testing.assert_allclose(batch.row_sums(batch.at_entries(jnp.asarray(per_column))), there @ per_column, rtol=1e-5)
    assert batch.at_entries(jnp.float32(3.0)) == 3.0
    np.testing.assert_allclose(batch.map(jnp.sqrt).dense(), np.sqrt(MATRIX[rows].toarray()), rtol=1e-6)


def test_fuller_batches_than_usual_stay_sparse():
    lengths = np.r_[np.full(500, 2), np.full(500, 40)]
    matrix = sparse.csr_array(np.arange(50) < lengths[:, None], dtype=np.float32)
    source = ArraySource({"counts": matrix})
    usual, full = (source.take_sparse(rows)["counts"] for rows in (np.arange(0, 1000, 8), np.arange(800, 925)))
    assert len(usual.values) < len(full.values)
    np.testing.assert_array_equal(full.dense(), matrix[800:925].toarray())


def test_blocks_are_the_batch_in_parts():
    source, rng = ArraySource({"counts": MATRIX, "labels": np.arange(30)}), np.random.default_rng(2)
    rows = rng.permutation(30)[:12]
    taken = source.take_sparse(rows)["counts"], source.take_blocks(rows, 3, range(3))["counts"]
    whole, blocks = jax.tree.map(jnp.asarray, taken)
    assert blocks.index.shape[0] == 3
    np.testing.assert_array_equal(blocks.dense(), MATRIX.toarray()[rows])
    np.testing.assert_allclose(blocks.row_sums(blocks.values), whole.row_sums(whole.values), rtol=1e-6)
    for shape in ((12, 11), (11,)):
        array = jnp.asarray(rng.normal(size=shape))

        def of_array(array, x):
            return (x.row_sums(x.at_entries(array) * x.values) ** 2).sum()

        (value, gradient), again = (jax.value_and_grad(of_array)(array, x) for x in (blocks, whole))
        np.testing.assert_allclose(value, again[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, again[1], rtol=1e-4)


def test_every_part_of_a_batch_has_the_same_capacity():
    source = ArraySource({"counts": MATRIX, "labels": np.arange(30)})
    rows = np.random.default_rng(3).permutation(30)[:12]
    whole = source.take_blocks(rows, 3, range(3))
    parts = [source.take_blocks(rows, 3, range(i, i + 1)) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([p["counts"].index for p in parts]), whole["counts"].index)
    np.testing.assert_array_equal(np.concatenate([p["labels"] for p in parts]), rows)
    assert {p["counts"].shape for p in parts} == {(12, 11)}


def test_rows_of_a_matrix_on_the_device_are_those_of_the_host():
    source = ArraySource({"counts": MATRIX, "labels": np.arange(30)})
    on_device = DeviceSource(source)
    for seed in range(4):
        rows = np.random.default_rng(seed).permutation(30)[:8]
        host, device = source.take_sparse(rows), on_device.take_sparse(rows)
        taken = jax.jit(lambda batch: batch.taken())(device["counts"])
        np.testing.assert_array_equal(taken.index, host["counts"].index)
        np.testing.assert_array_equal(taken.values, host["counts"].values)
        assert taken.shape == host["counts"].shape
        np.testing.assert_array_equal(device["labels"], host["labels"])


def test_rows_repeated_come_from_the_host():
    matrix = sparse.csr_array(np.vstack([np.ones((1, 5)), np.zeros((9, 5))]).astype(np.float32))
    batch = DeviceSource(ArraySource({"counts": matrix})).take_sparse(np.zeros(4, int))["counts"]
    np.testing.assert_array_equal(batch, np.ones((4, 5)))
