import numpy as np
import pytest
from scipy import sparse

from diffbio.data import check_ambient_profile, check_counts, counts_of
from diffbio.errors import DataError, DataWarning

LAYOUTS = {
    "dense": np.asarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_array,
    "int64": lambda x: x.astype(np.int64),
}


def counts(n_cells=40, n_genes=12):
    rng = np.random.default_rng(0)
    return (rng.poisson(2.0, (n_cells, n_genes)) + np.eye(n_cells, n_genes) + 1).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_summary(layout):
    x = counts()
    x[:, 3] = 0
    x[5] = 0
    with pytest.warns(DataWarning) as caught:
        summary = check_counts(LAYOUTS[layout](x))
    assert summary == (40, 12, np.count_nonzero(x), x.sum(), x.max(), 1, 1)
    assert [str(w.message) for w in caught] == [
        "counts: 1 of 40 cells have no count; they stay zero",
        "counts: 1 of 12 genes have no count in any cell",
    ]


def test_a_file_on_disk_in_small_chunks(h5ad, small, monkeypatch):
    from diffbio.data import validate

    original = validate.row_chunks
    monkeypatch.setattr(validate, "row_chunks", lambda m, name: original(m, name=name, chunk_bytes=500))
    assert check_counts(counts_of(h5ad)) == check_counts(small.X)


@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, "values are NaN or infinite; the first is nan at cell 7 (c7), gene 2 (g2)"),
        (np.inf, "values are NaN or infinite; the first is inf at cell 7 (c7), gene 2 (g2)"),
        (-1, "values are negative; the first is -1 at cell 7 (c7), gene 2 (g2)"),
        (
            25.5,
            "are not integers (largest 25.5; 2 are not whole, the first is 25.5 at cell 7 (c7), gene 2 (g2))",
        ),
    ],
)
def test_bad_values_are_counted_and_placed(layout, value, said):
    x = counts()
    x[7, 2] = x[30, 1] = value
    with pytest.raises(DataError) as caught:
        check_counts(
            LAYOUTS[layout](x), obs_names=[f"c{i}" for i in range(40)], var_names=[f"g{j}" for j in range(12)]
        )
    assert said in str(caught.value)


def test_non_integer_counts_can_be_allowed():
    x = counts()
    x[0, 0] = 30.5
    with pytest.raises(DataError, match="--allow-non-integer"):
        check_counts(x)
    with pytest.warns(DataWarning, match="used as they are"):
        check_counts(x, allow_non_integer=True)


@pytest.mark.parametrize(("x", "uns"), [(np.log1p(counts()), ()), (counts() * 10.5, ("log1p",))])
def test_log_transformed_data(x, uns):
    with pytest.raises(DataError, match=r'log-transformed .* layer="counts"'):
        check_counts(x, uns=uns)


def test_whole_numbers_are_counts_whatever_uns_says():
    check_counts(counts(), uns=("log1p",))


def test_large_counts():
    x = counts().astype(np.int64)
    x[0, 0] = 2**24 + 1
    with pytest.warns(DataWarning, match=r"above 2\^24 single precision"):
        check_counts(x)
    x[0, 0] = 2**31 + 1
    with pytest.raises(DataError, match=r"above 2\^31"):
        check_counts(x)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((0, 5)), "no cells"),
        (np.zeros((5, 0)), "no genes"),
        (np.zeros((5, 4)), "all 5 x 4 values are zero; pass the layer that holds the counts"),
        (np.zeros(5), "expected (cells, genes)"),
        (None, "no matrix there"),
        (np.array([["a", "b"]]), "expected integers or floats"),
    ],
)
def test_shapes_and_types(x, said):
    with pytest.raises(DataError) as caught:
        check_counts(x)
    assert said in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 12), (40, 1), (1, 1)])
def test_one_cell_or_one_gene(shape):
    assert check_counts(counts(*shape)).n_cells == shape[0]


def test_ambient_profile():
    profile = np.array([1.0, 3.0, 0.0]) / 4
    np.testing.assert_array_equal(check_ambient_profile(profile, 3), profile.astype(np.float32))
    for wrong, said in [
        ([0.5, 0.5], "2 entries for 3 genes"),
        ([0.5, 0.5, 0.5], "sums to 1.5, not 1"),
        ([0.0, 0.0, 0.0], "sums to 0, not 1"),
        ([1.5, -0.5, 0.0], "negative at gene 1"),
        ([np.nan, 0.5, 0.5], "NaN"),
    ]:
        with pytest.raises(DataError, match=said):
            check_ambient_profile(wrong, 3)


def test_an_ambient_profile_of_more_genes_than_the_data_have_is_scaled():
    with pytest.warns(DataWarning, match="sums to 0.8: it was measured over more genes"):
        found = check_ambient_profile([0.2, 0.6, 0.0], 3)
    np.testing.assert_allclose(found, [0.25, 0.75, 0], rtol=1e-6)  # float32


def test_wrong_values_of_all_chunks_are_counted(monkeypatch):
    monkeypatch.setattr("diffbio.data.matrix.row_chunks.__kwdefaults__", {"name": "counts", "chunk_bytes": 64})
    x = np.ones((50, 4), np.float32)
    x[[3, 20, 49], 1] = np.nan
    with pytest.raises(DataError, match=r"3 values are NaN or infinite; the first is nan at cell 3, gene 1"):
        check_counts(x)
