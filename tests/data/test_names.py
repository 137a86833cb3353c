import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio.data import align_genes, batch_codes, check_names, encode_with, label_codes
from diffbio.errors import DataError, DataWarning, MissingKeyError


def obs(**columns):
    return pd.DataFrame(columns, index=[f"cell{i}" for i in range(len(next(iter(columns.values()))))])


def test_codes_follow_the_categories_or_the_alphabet():
    codes, names = batch_codes(obs(b=["y", "x", "y", "x"]), "b")
    assert (codes.tolist(), names, codes.dtype) == ([1, 0, 1, 0], ["x", "y"], np.int32)
    ordered = pd.Categorical(["y", "x", "y", "x"], categories=["z", "y", "x"])
    assert batch_codes(obs(b=ordered), "b")[1] == ["y", "x"]
    assert batch_codes(obs(b=[10, 2, 10, 2]), "b")[1] == ["2", "10"]


def test_no_such_column():
    with pytest.raises(MissingKeyError, match="it has donor, plate") as caught:
        batch_codes(obs(donor=[1], plate=[2]), "batch")
    assert isinstance(caught.value, KeyError)
    with pytest.raises(MissingKeyError, match="it has donor"):
        label_codes(obs(donor=[1]), "batch")


@pytest.mark.parametrize("missing", [None, np.nan])
def test_cells_without_a_batch(missing):
    with pytest.raises(DataError, match=r"1 of 3 cells have no value, the first is cell 1 \('cell1'\)"):
        batch_codes(obs(b=["x", missing, "y"]), "b")
    with pytest.raises(DataError, match="2 of 2 cells"):
        batch_codes(obs(b=[missing, missing]), "b")


def test_one_batch_and_a_batch_per_cell():
    with pytest.warns(DataWarning, match="one value, 'x'"):
        codes, _ = batch_codes(obs(b=["x", "x"]), "b")
    assert codes.tolist() == [0, 0]
    with pytest.raises(DataError, match="each of the 3 cells has a value of its own; name another column: donor"):
        batch_codes(obs(b=["x", "y", "z"], donor=["1", "1", "2"]), "b")
    with pytest.warns(DataWarning, match="1 of 2 batches have a single cell, such as 'y'"):
        batch_codes(obs(b=["x", "y", "x"]), "b")
    with pytest.warns(DataWarning, match="one value"):
        batch_codes(obs(b=["x"]), "b")


def test_labels_partly_known():
    column = ["T", "B", "Unknown", "T", None, "B"]
    codes, names = label_codes(obs(label=column), "label")
    assert (codes.tolist(), names) == ([1, 0, -1, 1, -1, 0], ["B", "T"])


@pytest.mark.parametrize(
    ("column", "said"), [(["Unknown", None], "no known label"), (["T", "T", "NA"], "one class, 'T'")]
)
def test_labels_that_teach_nothing(column, said):
    with pytest.raises(DataError, match=said):
        label_codes(obs(label=column), "label")


def test_a_class_of_one_cell():
    with pytest.warns(DataWarning, match="1 classes have a single cell, such as 'B'"):
        label_codes(obs(label=["T", "T", "B"]), "label")


def test_names_a_model_does_not_know():
    assert encode_with(["b", "a"], ["a", "b"]).tolist() == [1, 0]
    with pytest.raises(DataError, match="'c' not known to the model, which was trained with 'a', 'b'"):
        encode_with(["a", "c"], ["a", "b"])


def test_repeated_names():
    with pytest.raises(DataError, match=r"1 gene names .* 'a'; call adata.var_names_make_unique"):
        check_names(var_names=["a", "b", "a"])
    with pytest.warns(DataWarning, match="2 cell names occur more than once"):
        check_names(obs_names=["a", "a", "a"])
    check_names(obs_names=["a", "b"], var_names=["a", "b"])


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_genes_in_the_order_of_the_model(layout):
    x = np.arange(12.0).reshape(3, 4)
    alignment = align_genes(["d", "a", "extra", "b"], ["a", "b", "d"])
    assert alignment.columns.tolist() == [1, 3, 0]
    result = alignment.apply(layout(x))
    np.testing.assert_array_equal(result.toarray() if sparse.issparse(result) else result, x[:, [1, 3, 0]])
    with pytest.warns(DataWarning, match=r"1 of the model's 5 genes are missing .*\['c'\]"):
        alignment = align_genes(["d", "a", "b", "e"], ["a", "c", "b", "d", "e"])
    result = alignment.apply(layout(x))
    result = result.toarray() if sparse.issparse(result) else result
    np.testing.assert_array_equal(result, np.insert(x[:, [1, 2, 0, 3]], 1, 0, axis=1))


def test_too_many_genes_missing():
    with pytest.raises(DataError, match="2 of the model's 4 genes are missing"):
        align_genes(["a", "b"], ["a", "b", "c", "d"])
