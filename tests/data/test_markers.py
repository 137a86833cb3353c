import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffbio.data.markers import as_markers, marker_matrix, read_markers
from diffbio.errors import DataError, DataWarning, InputFileError

PBMC = {"B cell": ["MS4A1", "CD79A"], "T cell": ["CD3D", "CD3E"], "NK/T": ["CD3D", "GNLY"]}
GENES = ["CD3D", "CD3E", "CD79A", "GNLY", "LYZ", "MS4A1"]
LONG = "cell_type,gene\nB cell,MS4A1\nB cell,CD79A\nT cell,CD3D\nT cell,CD3E\nNK/T,CD3D\nNK/T,GNLY\n"
MATRIX = ",B cell,T cell,NK/T\nMS4A1,1,0,0\nCD79A,1,0,0\nCD3D,0,1,1\nCD3E,0,1,0\nGNLY,0,0,1\n"
GMT = "B cell\t\tMS4A1\tCD79A\nT cell\thttp://x\tCD3D\tCD3E\t\nNK/T\tna\tCD3D\tGNLY\n"
YAML = "B cell: [MS4A1, CD79A]\nT cell:\n  - CD3D\n  - CD3E\nNK/T: [CD3D, GNLY]\n"


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "text"), [
    ("m.csv", LONG),
    ("m.csv", "\ufeff" + LONG.replace("\n", "\r\n")),  # as spreadsheets write it
    ("m.csv", LONG.replace(",", ";").replace("cell_type", "Cell Type").replace("gene", "Marker")),
    ("m.csv", "rank,symbol,name\n" + "".join(f"1,{g},{t}\n" for t, genes in PBMC.items() for g in genes)),
    ("m.csv", "type,genes\n" + "".join(f'{t},"{", ".join(genes)}"\n' for t, genes in PBMC.items())),
    ("m.tsv", LONG.replace(",", "\t")),
    ("m.csv", MATRIX),
    ("m.csv", MATRIX.replace("1", "1.0").replace("MS4A1.0", "MS4A1").replace(",0", ",0.0")),
    ("m.csv", MATRIX.replace(",0", ",FALSE").replace(",1", ",TRUE")),
    ("m.tsv", MATRIX.replace(",", "\t")),
    ("m.gmt", GMT),
    ("m.yaml", YAML),
    ("m.yml", "# blood\n" + YAML),
    ("m.json", json.dumps(PBMC)),
    ("m", LONG), ("m.txt", MATRIX), ("m.txt", MATRIX.replace(",", "\t")), ("m.txt", LONG.replace(",", "\t")),
    ("m.txt", GMT), ("m.txt", YAML), ("m.txt", json.dumps(PBMC)),
])  # fmt: skip
def test_every_form_says_the_same(tmp_path, name, text):
    found = read_markers(written(tmp_path, name, text))
    assert found == PBMC
    assert list(found) == list(PBMC)  # the order is kept
    assert as_markers(str(tmp_path / name)) == PBMC


@pytest.mark.parametrize(("name", "text", "wanted"), [
    ("m.csv", "", "is empty"),
    ("m.csv", " \n\n", "is empty"),
    ("m.csv", "cell_type,gene\n", "has a heading but no rows"),
    ("m.csv", "cell_type,gene\nB\n", "line 2 has 1 fields, the first has 2"),
    ("m.csv", "cell_type,gene\nB,\n", "line 2 has no gene"),
    ("m.csv", "a,b\nx,y\n", "whose columns are 'a', 'b'; .*expected a table with the columns cell_type and gene"),
    ("m.csv", ",B,T\nCD3D,0.7,1\n", "table of another form"),
    ("m.csv", ",B,B\nCD3D,0,1\n", "the type 'B' is given twice"),
    ("m.csv", ",B,T\nCD3D,0,1\nCD3D,1,1\n", "the gene 'CD3D' is given twice"),
    ("m.csv", ",B,\nCD3D,0,1\n", "has a type without a name"),
    ("m.gmt", "B\t\tCD79A\nB\t\tMS4A1\n", "the type 'B' is given twice"),
    ("m.gmt", "B cell\n", "a line of one field"),
    ("m.yaml", "B: [CD79A]\nB: [MS4A1]\n", "type 'B' is given twice"),
    ("m.json", '{"B": ["CD79A"], "B": ["MS4A1"]}', "type 'B' is given twice"),
    ("m.yaml", "B: &a [CD79A]\nT: *a\n", r"\*a refers to another value"),
    ("m.yaml", "B: [CD79A, 7]\n", r"the markers of 'B' hold 7 \(int\), which is no gene name"),
    ("m.yaml", "B: [NO]\n", r"hold False \(bool\), which is no gene name; .*quotes"),
    ("m.yaml", "1: [CD79A]\n", "the type 1 is int, not text"),
    ("m.yaml", "B: CD79A\n", "are 'CD79A', not a list of genes"),
    ("m.yaml", "B: {CD79A: 1}\n", "not a list of genes"),
    ("m.yaml", "- B\n", "holds list, not types with their genes"),
    ("m.yaml", "B: [CD79A\n", "is not valid YAML"),
    ("m.yaml", "B: !!python/name:os.system\n", "is not valid YAML"),
    ("m.yaml", "[" * 5000, "is not valid YAML"),
    ("m.json", "{", "is not valid JSON"),
    ("m.json", "[" * 100_000, "is not valid JSON"),
    ("m.csv", "cell_type,gene\nB,\0\n", "is no text"),
])  # fmt: skip
def test_what_is_no_list_of_markers_is_refused(tmp_path, name, text, wanted):
    path = written(tmp_path, name, text)
    with pytest.raises(InputFileError, match=wanted) as caught:
        read_markers(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputFileError, match=r"cannot be read \(No such file"):
        read_markers(tmp_path / "no.csv")
    with pytest.raises(InputFileError, match="is a folder"):
        read_markers(tmp_path)
    packed = tmp_path / "m.csv.gz"
    packed.write_bytes(gzip.compress(LONG.encode()))
    with pytest.raises(InputFileError, match="is a gzip archive"):
        read_markers(packed)
    (tmp_path / "latin.csv").write_bytes("type,gene\nZellö,A\n".encode("latin-1"))
    with pytest.raises(InputFileError, match="no text in UTF-8"):
        read_markers(tmp_path / "latin.csv")


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=80), st.sampled_from([".csv", ".tsv", ".yaml", ".json", ".gmt", ".txt", ""]))
def test_any_text_is_read_or_refused(tmp_path_factory, text, suffix):
    path = tmp_path_factory.mktemp("m") / f"m{suffix}"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        found = read_markers(path)
    except InputFileError:
        return
    assert all(isinstance(gene, str) and gene for genes in found.values() for gene in genes)


def test_tables_and_mappings():
    frame = pd.DataFrame([(t, g) for t, genes in PBMC.items() for g in genes], columns=["type", "gene"])
    assert as_markers(frame) == PBMC
    matrix = pd.DataFrame({t: [g in genes for g in GENES] for t, genes in PBMC.items()}, index=GENES)
    found = {t: sorted(genes) for t, genes in PBMC.items()}
    for table in (matrix, matrix.astype(int), matrix.astype(float).rename_axis("gene"), matrix.reset_index()):
        assert {t: sorted(genes) for t, genes in as_markers(table).items()} == found
    assert as_markers({"B": ("CD79A", "CD79A"), "T": {"CD3E", "CD3D"}}) == {"B": ["CD79A"], "T": ["CD3D", "CD3E"]}
    for wrong, said in (
        ([("B", "CD79A")], "got list, expected a mapping"),
        ({"B": "CD79A"}, "not a list of genes"),
        ({"B": [None]}, "no gene name"),
        ({" ": ["CD79A"]}, "not text"),
        ({"B": ["CD79A"], "B ": ["CD79A"]}, "given twice"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "there twice"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            as_markers(wrong)
        assert not isinstance(caught.value, InputFileError)


def test_the_matrix_follows_the_order_of_the_data():
    found = marker_matrix(PBMC, GENES)
    assert found.types == list(PBMC)
    assert found.genes == ["CD3D", "CD3E", "CD79A", "GNLY", "MS4A1"]
    assert found.columns.tolist() == [0, 1, 2, 3, 5]
    assert found.matrix.tolist() == [[0, 0, 1, 0, 1], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]
    assert found.matrix.dtype == np.float32
    assert found.missing == {kind: [] for kind in PBMC}
    assert marker_matrix(PBMC, pd.Index(GENES)).genes == found.genes
    with_other = marker_matrix(PBMC, GENES, other="other")
    assert with_other.types == [*PBMC, "other"]
    assert not with_other.matrix[-1].any()
    assert marker_matrix({"other": [], **PBMC}, GENES, other="other").types == ["other", *PBMC]
    assert marker_matrix({"B": ["MS4A1"]}, GENES, other="rest").matrix.tolist() == [[1], [0]]


def test_missing_markers_are_named():
    markers = {"B": ["MS4A1", "CD19"], "T": ["CD3D"]}
    with pytest.warns(DataWarning, match="1 of 3 genes are not in the data and left out: CD19"):
        assert marker_matrix(markers, GENES).missing == {"B": ["CD19"], "T": []}
    with pytest.warns(DataWarning, match=r"1-Mar is what a spreadsheet makes"):
        marker_matrix({"B": ["MS4A1", "1-Mar"], "T": ["CD3D"]}, GENES)


@pytest.mark.parametrize(("markers", "other", "wanted"), [
    ({}, None, "no type is given"),
    ({"B": ["MS4A1"]}, None, "only 'B' is given; at least two"),
    ({"B": ["MS4A1"], "T": ["X"]}, None, "the type 'T' has X, none of which is in the data; add markers"),
    ({"B": ["MS4A1"], "T": []}, None, "the type 'T' has no markers; .*other='T'"),
    ({"B": ["MS4A1"], "T": ["X"], "U": ["Y"]}, None, "nor have 1 other types"),
    ({"B": ["MS4A1"], "T": ["MS4A1"]}, None, "'B' and 'T' have the same markers and cannot be told apart"),
    ({"B": ["MS4A1", "CD79A"], "T": ["CD79A", "MS4A1", "X"]}, None, "same markers in the data, which lacks X"),
    ({"B": ["MS4A1"], "T": ["CD3D"]}, "T", "'T' is for cells without markers, but has CD3D"),
    ({"B": ["X"], "T": ["Y"]}, None, "none of 2 genes is in the data; the list has X, Y, the data CD3D, CD3E"),
    ({"B": ["ENSG00000000001"], "T": ["ENSG00000000002"]}, None, "the list has Ensembl identifiers: set adata.var"),
])  # fmt: skip
def test_markers_that_no_model_can_use(markers, other, wanted):
    with pytest.raises(DataError, match=wanted):
        marker_matrix(markers, GENES, other=other)


def test_identifiers_in_the_data_are_recognised():
    with pytest.raises(DataError, match="the data has Ensembl identifiers"):
        marker_matrix(PBMC, [f"ENSG{k:011d}" for k in range(9)])
    with pytest.raises(DataError, match="more than once"):
        marker_matrix(PBMC, [*GENES, "CD3D"])


def test_names_are_compared_loosely_only_where_they_have_to_be():
    mouse = [name.capitalize() for name in GENES]
    with pytest.warns(DataWarning, match="0 of 5 genes are in the data as written; 5 compared without regard to upper"):
        found = marker_matrix(PBMC, mouse)
    assert found.columns.tolist() == [0, 1, 2, 3, 5]
    assert found.genes == ["Cd3d", "Cd3e", "Cd79a", "Gnly", "Ms4a1"]
    versions = {"B": ["ENSG00000156738.18"], "T": ["ENSG00000167286.10"]}
    with pytest.warns(DataWarning, match="without the versions"):
        assert marker_matrix(versions, ["ENSG00000167286", "ENSG00000156738.3"]).columns.tolist() == [0, 1]
    # most are there as written: a gene of another case is another gene
    with pytest.warns(DataWarning, match="1 of 3 genes are not in the data and left out: lyz"):
        marker_matrix({"B": ["MS4A1", "lyz"], "T": ["CD3D"]}, GENES)
    # two genes that differ in case only: neither is taken
    with pytest.warns(DataWarning) as seen:
        found = marker_matrix({"B": ["ms4a1", "lyz"], "T": ["cd3d"]}, [*GENES, "Lyz"])
    assert found.missing["B"] == ["lyz"]
    assert len(seen) == 2


def test_a_gene_that_marks_every_type_is_kept_with_a_warning():
    with pytest.warns(DataWarning, match="LYZ mark every type"):
        found = marker_matrix({"B": ["MS4A1", "LYZ"], "T": ["CD3D", "LYZ"]}, GENES, other="other")
    assert "LYZ" in found.genes


def test_published_markers_are_in_the_cells_they_come_from(data_dir):
    import h5py

    path = data_dir.parent / "peers" / "ref" / "cellassign_markers.csv"
    if not path.is_file():
        pytest.skip("the markers of the comparison are not here")
    with h5py.File(data_dir / "pbmc3k.h5ad") as file:
        names = file["var"][file["var"].attrs["_index"]].asstr()[:]
    found = marker_matrix(read_markers(path), names)
    assert found.matrix.shape == (9, 60)
    assert found.matrix.sum(axis=1).tolist() == [8.0] * 9
