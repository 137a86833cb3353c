"""Cells that a fitted pipeline has not seen."""

import numpy as np
import pytest
from scipy import sparse
from toy_cells import toy_cells

from diffbio import tl
from diffbio.cli import run_command
from diffbio.data import read, write_results
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError, ModelFileError
from diffbio.pipelines.single_cell import create_single_cell_pipeline

SMALL = {"n_clusters": 3, "latent_dim": 4, "hidden_dims": (16, 8), "max_epochs": 2, "n_top_genes": 40}
KEYS = ("X_diffbio_latent", "X_diffbio_harmony", "X_diffbio_umap", "diffbio_cluster_prob")


@pytest.fixture(scope="module")
def fitted():
    cells = toy_cells()
    return cells, tl.pipeline(cells, batch_key="batch", **SMALL)


@pytest.fixture
def bare(fitted):
    fresh = toy_cells()
    assert (fresh.X != fitted[0].X).nnz == 0
    return fresh


def same(found, wanted, rows=slice(None)):
    for key in KEYS:
        np.testing.assert_allclose(found.obsm[key], wanted.obsm[key][rows], rtol=1e-4, atol=1e-5)


def test_cells_come_out_as_they_did(fitted, bare):
    wanted, model = fitted
    tl.project(bare, model, batch_key="batch")
    same(bare, wanted)
    np.testing.assert_allclose(
        bare.layers["diffbio_decontaminated"].toarray(), wanted.layers["diffbio_decontaminated"].toarray(), rtol=1e-4
    )
    assert list(bare.obs["diffbio_cluster"]) == list(wanted.obs["diffbio_cluster"])


def test_genes_and_batches_go_by_name(fitted, bare):
    wanted, model = fitted
    rng = np.random.default_rng(0)
    genes, rows = rng.permutation(bare.n_vars), np.flatnonzero(bare.obs["batch"] == "donor 1")
    some = bare[rows, genes].copy()  # its only batch has code 1 in the pipeline
    tl.project(some, model, batch_key="batch")
    same(some, wanted, rows)


@pytest.mark.parametrize("on_disk", [False, True])
def test_missing_genes_count_as_zero(fitted, bare, tmp_path, on_disk):
    _, model = fitted
    lost = list(model.genes[:4])
    without = bare[:, ~bare.var_names.isin(lost)].copy()
    empty = bare.copy()
    empty.X = sparse.csr_matrix(empty.X.multiply(~empty.var_names.isin(lost)))
    for cells in (without, empty):
        soup = cells.var["ambient_profile"].to_numpy(copy=True)
        soup[cells.var_names.isin(lost)] = 0
        cells.var["ambient_profile"] = soup / soup.sum()
    with pytest.warns(DataWarning, match="4 of 50 genes have no count"):
        tl.project(empty, model, batch_key="batch")
    if on_disk:
        model.save(tmp_path / "model")
        write_results(without, tmp_path / "cells.h5ad", {})
        arguments = ["project", tmp_path / "cells.h5ad", "-o", tmp_path / "out.h5ad", "--model", tmp_path / "model"]
        assert run_command([*map(str, arguments), "--stream", "--batch-key", "batch"]) == 0
        without = read(tmp_path / "out.h5ad")
    else:
        with pytest.warns(DataWarning, match="4 of the model's 40 genes are missing and taken as zero"):
            tl.project(without, model, batch_key="batch")
    same(without, empty)
    assert without.layers["diffbio_decontaminated"].shape == without.shape


def test_what_does_not_fit_is_refused(fitted, bare, tmp_path):
    _, model = fitted
    with pytest.raises(ConfigError, match="knows the batches donor 0, donor 1; name the column"):
        tl.project(bare, model)
    with pytest.raises(MissingKeyError, match="obs has no column 'donor'; it has batch"):
        tl.project(bare, model, batch_key="donor")
    bare.obs["other"] = "donor 7"
    with pytest.raises(DataError, match=r"obs\['other'\]: 'donor 7' not known to the model"):
        tl.project(bare, model, batch_key="other")
    few = bare[:, :20].copy()
    few.var["ambient_profile"] = 1 / 20
    with pytest.raises(DataError, match="of the model's 40 genes are missing"):
        tl.project(few, model, batch_key="batch")
    with pytest.raises(ModelFileError, match="no model folder"):
        tl.project(bare, tmp_path / "nothing", batch_key="batch")
    with pytest.raises(ModelFileError, match="is untrained"):
        tl.project(bare, create_single_cell_pipeline(n_genes=50))
    del bare.var["ambient_profile"]
    with pytest.raises(MissingKeyError, match="var needs the profile of the soup"):
        tl.project(bare, model, batch_key="batch")
    assert not any(key in bare.obsm for key in KEYS)


def test_on_the_command_line(tmp_path, capsys):
    cells, model = tmp_path / "cells.h5ad", tmp_path / "model"
    write_results(toy_cells(), cells, {})
    settings = {**SMALL, "hidden_dims": list(SMALL["hidden_dims"])}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    fit = ["run", cells, "-o", tmp_path / "out.h5ad", "--config", tmp_path / "run.yaml", "--batch-key", "batch"]
    assert run_command([*map(str, fit), "--save-model", str(model), "--quiet"]) == 0
    assert str(model) in capsys.readouterr().out
    assert run_command([*map(str, fit), "--save-model", str(model), "--quiet", "-o", str(tmp_path / "b.h5ad")]) == 5
    assert "choose another folder, or pass --force" in capsys.readouterr().err

    project = ["project", cells, "-o", tmp_path / "new.h5ad", "--model", model, "--batch-key", "batch"]
    assert run_command([*map(str, project), "--label-key", "cell_type", "--figures", str(tmp_path / "drawn")]) == 0
    assert "clusters against cell_type" in capsys.readouterr().out
    same(read(tmp_path / "new.h5ad"), read(tmp_path / "out.h5ad"))
    assert "<h1>diffbio report: cells.h5ad" in (tmp_path / "drawn" / "report.html").read_text()
    assert run_command([*map(str, project), "--batch-key", "cell_type", "--force"]) == 3
    assert "not known to the model" in capsys.readouterr().err
    assert run_command([*map(str, project[:5]), str(cells), "--force"]) == 4
