"""`diffbio gradients`: a pipeline is trained or read, and told part by part."""

import pandas as pd
import pytest
from branching_cells import branching_cells

from diffbio.cli import run_command
from diffbio.data import write_results


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    adata = branching_cells()
    adata.obs["batch"] = ["a", "b"] * (adata.n_obs // 2)
    return str(write_results(adata, tmp_path_factory.mktemp("cells") / "cells.h5ad", {}))


def test_a_trained_and_a_saved_pipeline_are_measured(cells, tmp_path, capsys):
    figures = tmp_path / "figures"
    line = ["gradients", cells, "--batch-key", "batch", "--quiet"]
    assert run_command([*line, "--epochs", "1", "--figures", str(figures)]) == 0
    table = pd.read_csv(figures / "gradients.csv", index_col=0)
    assert list(table.index) == ["vae_normalizer", "batch_correction", "dim_reduction", "clustering"]
    assert (table["gain"] > 0).all()
    assert (figures / "gradients.png").stat().st_size > 10_000
    assert "vae_normalizer" in capsys.readouterr().out
    model = str(tmp_path / "model")
    line_of_run = ["run", cells, "-o", str(tmp_path / "out.h5ad"), "--batch-key", "batch", "--epochs", "1", "--quiet"]
    assert run_command([*line_of_run, "--save-model", model]) == 0
    assert run_command([*line, "--model", model]) == 0
    assert run_command(["gradients", cells, "--batch-key", "nonsense"]) != 0
    assert "nonsense" in capsys.readouterr().err
