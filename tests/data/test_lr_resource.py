"""Resources of ligand-receptor pairs."""

import sys

import pandas as pd
import pytest

from diffbio.data.lr_resource import pair_columns, read_pairs
from diffbio.errors import ConfigError, DataError, InputFileError, MissingKeyError


def test_tables_lists_and_files_are_read(tmp_path):
    species = ["human", "mouse", "human"]
    table = pd.DataFrame({"species": species, "ligand": ["A", "a", "A"], "receptor": ["B_C", "b", "B_C"]})
    assert read_pairs(table, species="human").to_numpy().tolist() == [["A", "B_C"]]
    assert read_pairs([("A", "B")]).to_numpy().tolist() == [["A", "B"]]
    table.to_csv(tmp_path / "pairs.csv", index=False)
    assert len(read_pairs(tmp_path / "pairs.csv")) == 2
    assert len(read_pairs(str(tmp_path / "pairs.csv"))) == 2
    with pytest.raises(InputFileError, match="no file"):
        read_pairs(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"rat.*human, mouse"):
        read_pairs(table, species="rat")
    with pytest.raises(MissingKeyError, match="no column 'receptor'"):
        read_pairs(table.drop(columns="receptor"))
    with pytest.raises(DataError, match="without a name"):
        read_pairs([("A", None)])
    with pytest.raises(DataError, match="got int"):
        read_pairs(3)


def test_complexes_are_split_and_pairs_without_their_genes_left_out():
    found = pair_columns(read_pairs([("A", "B_C"), ("A", "D"), ("X_1", "B")]), ["C", "A", "B", "X_1"])
    assert found.columns.tolist() == [[[1, -1], [2, 0]], [[3, -1], [2, -1]]]
    assert found.left_out == 1
    assert found.table["receptor"].tolist() == ["B_C", "B"]
    with pytest.raises(DataError, match=r"join the subunits.*by '_'"):
        pair_columns(read_pairs([("A", "B+C")]), ["A", "B", "C"])
    with pytest.raises(DataError, match=r"none of its 1 pairs.*lacks a, b"):
        pair_columns(read_pairs([("a", "b")]), ["A", "B"])


def test_liana_is_asked_for_by_name_and_missed_with_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "liana", None)
    with pytest.raises(ConfigError, match="pip install liana"):
        read_pairs("consensus")
    with pytest.raises(ConfigError, match="not installed"):
        read_pairs(None)
