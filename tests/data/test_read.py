import gzip

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse
from scipy.io import mmwrite

from diffbio.data import read
from diffbio.errors import DataWarning, InputFileError


def write_10x_v3(path, matrix, symbols, types=None):
    columns = sparse.csc_matrix(matrix.T)  # genes x cells, by column
    types = types or ["Gene Expression"] * len(symbols)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(columns, name).astype(np.int32 if name == "data" else np.int64)
        group["shape"] = np.array(columns.shape, np.int32)
        group["barcodes"] = np.array([f"cell{i}-1" for i in range(matrix.shape[0])], "S")
        features = group.create_group("features")
        features["name"] = np.array(symbols, "S")
        features["id"] = np.array([f"ENSG{j}" for j in range(len(symbols))], "S")
        features["feature_type"] = np.array(types, "S")


def write_10x_v2(path, matrix, symbols, genomes=("hg19",)):
    columns = sparse.csc_matrix(matrix.T)
    with h5py.File(path, "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(columns, name)
            group["shape"] = np.array(columns.shape)
            group["barcodes"] = np.array([f"cell{i}-1" for i in range(matrix.shape[0])], "S")
            group["gene_names"] = np.array(symbols, "S")
            group["genes"] = np.array([f"ENSG{j}" for j in range(len(symbols))], "S")


def write_10x_mtx(folder, matrix, symbols, *, version=3, prefix=""):
    folder.mkdir()
    ending = ".gz" if version == 3 else ""
    opener = gzip.open if version == 3 else open
    with opener(folder / f"{prefix}matrix.mtx{ending}", "wb") as file:
        mmwrite(file, sparse.coo_matrix(matrix.T.astype(np.int64)))
    kind = "\tGene Expression" if version == 3 else ""
    features = [f"ENSG{j}\t{symbol}{kind}\n" for j, symbol in enumerate(symbols)]
    name = "features" if version == 3 else "genes"
    for table, lines in ((name, features), ("barcodes", [f"cell{i}-1\n" for i in range(matrix.shape[0])])):
        with opener(folder / f"{prefix}{table}.tsv{ending}", "wt") as file:
            file.writelines(lines)


def names(n):
    return [f"gene{j}" for j in range(n)]


WRITERS = {
    "10x v3": lambda path, adata: write_10x_v3(path, adata.X, names(30)),
    "10x v2": lambda path, adata: write_10x_v2(path, adata.X, names(30)),
    "mtx v3": lambda path, adata: write_10x_mtx(path, adata.X, names(30)),
    "mtx v2": lambda path, adata: write_10x_mtx(path, adata.X, names(30), version=2),
    "mtx with a prefix": lambda path, adata: write_10x_mtx(path, adata.X, names(30), prefix="GSM1_"),
    "h5ad": lambda path, adata: adata.write_h5ad(path),
    "zarr": lambda path, adata: adata.write_zarr(path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_by_its_content(tmp_path, small, kind):
    path = tmp_path / "named badly.txt"
    WRITERS[kind](path, small)
    adata = read(path)
    np.testing.assert_array_equal(adata.X.toarray(), small.X.toarray())
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.var_names.tolist() == names(30)
    assert adata.obs_names[3].startswith("cell3")
    if "h5ad" not in kind and "zarr" not in kind:
        assert adata.var["gene_ids"].tolist() == [f"ENSG{j}" for j in range(30)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # anndata 0.13 writes version 2 with regret
def test_zarr_version_2(tmp_path, small):
    with ad.settings.override(zarr_write_format=2, auto_shard_zarr_v3=False):
        small.write_zarr(tmp_path / "two.zarr")
    assert (tmp_path / "two.zarr" / ".zgroup").exists()
    np.testing.assert_array_equal(read(tmp_path / "two.zarr").X.toarray(), small.X.toarray())


def test_an_anndata_passes_through(small):
    assert read(small) is small


def test_backed(h5ad, small):
    adata = read(h5ad, backed=True)
    assert adata.isbacked
    np.testing.assert_array_equal(adata.to_memory().X.toarray(), small.X.toarray())


def test_backed_needs_h5ad(tmp_path, small):
    small.write_zarr(tmp_path / "a.zarr")
    with pytest.raises(InputFileError, match="can be backed, this is zarr"):
        read(tmp_path / "a.zarr", backed=True)


def test_10x_symbols_are_made_unique(tmp_path, small):
    write_10x_v3(tmp_path / "a.h5", small.X, ["CD4", "CD4", "CD4", *names(27)])
    with pytest.warns(DataWarning, match="2 gene symbols"):
        adata = read(tmp_path / "a.h5")
    assert adata.var_names[:3].tolist() == ["CD4", "CD4-1", "CD4-2"]


def test_10x_features_that_are_not_genes(tmp_path, small):
    types = ["Gene Expression"] * 28 + ["Antibody Capture"] * 2
    write_10x_v3(tmp_path / "a.h5", small.X, names(30), types)
    with pytest.warns(DataWarning, match="2 features that are not genes"):
        adata = read(tmp_path / "a.h5")
    np.testing.assert_array_equal(adata.X.toarray(), small.X.toarray()[:, :28])


def test_10x_two_genomes(tmp_path, small):
    write_10x_v2(tmp_path / "a.h5", small.X, names(30), genomes=("hg19", "mm10"))
    with pytest.raises(InputFileError, match=r"2 genomes \(hg19, mm10\)"):
        read(tmp_path / "a.h5")


def damage_mtx(folder, how):
    matrix = folder / "matrix.mtx"
    text = matrix.read_text()
    lines = text.splitlines(keepends=True)
    sizes = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    if how == "barcodes missing":
        (folder / "barcodes.tsv").unlink()
    elif how == "another size":
        (folder / "barcodes.tsv").write_text("cell0\n")
    elif how == "too many entries claimed":
        lines[sizes] = "30 90 99999999\n"
        matrix.write_text("".join(lines))
    elif how == "index outside":
        lines[sizes + 1] = "31 1 5\n"
        matrix.write_text("".join(lines))
    elif how == "cut short":
        matrix.write_text(text[: len(text) // 2])
    elif how == "cut short, gzipped":
        (folder / "matrix.mtx.gz").write_bytes(gzip.compress(text.encode())[:300])
        matrix.unlink()
    elif how == "two matrices":
        (folder / "other_matrix.mtx").write_text(text)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("barcodes missing", "barcodes.tsv is missing"),
        ("another size", "90, but there are 30 features and 1 barcodes"),
        ("too many entries claimed", "claims 99,999,999 entries"),
        ("index outside", "damaged"),
        ("cut short", "damaged"),
        ("cut short, gzipped", "damaged"),
        ("two matrices", "several matrices"),
    ],
)
def test_damaged_10x_folder(tmp_path, small, how, said):
    folder = tmp_path / "run"
    write_10x_mtx(folder, small.X, names(30), version=2)
    damage_mtx(folder, how)
    with pytest.raises(InputFileError, match=said) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("indptr", lambda old: old[::-1].copy(), "indptr starts at"),
        ("indices", lambda old: old + 20, "column index"),
        ("shape", lambda old: old + 1, "indptr has"),
    ],
)
def test_damaged_10x_h5(tmp_path, small, part, value, said):
    write_10x_v3(tmp_path / "a.h5", small.X, names(30))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        new = value(file["matrix"][part][:])
        del file["matrix"][part]
        file["matrix"][part] = new
    with pytest.raises(InputFileError, match=said):
        read(tmp_path / "a.h5")


def test_real_files(data_dir):
    for name, shape in {"kang_pbmc_ifnb": (1556, 1267), "pbmc_raw_droplets_toy": (1289, 226)}.items():
        adata = read(data_dir / f"{name}.h5ad")
        assert adata.shape == shape
        assert adata.X.format == "csr"
