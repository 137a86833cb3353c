"""`diffbio trajectory`: one line from counts to velocity, pseudotime, fates, trends and transport, with figures."""

import numpy as np
import pytest
from branching_cells import branching_cells
from scipy.stats import spearmanr

from diffbio.cli import run_command
from diffbio.data import read, write_results

ENDS = ["--terminal-type", "late A", "--terminal-type", "late B"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Cells of a process that divides, with a map, so that none is trained here."""
    adata = branching_cells()
    adata.obsm["X_umap"] = np.column_stack([adata.obs["time"], adata.obs["branch"] * adata.obs["time"]])
    return write_results(adata, tmp_path_factory.mktemp("process") / "cells.h5ad", {})


def run(*line):
    return run_command(["trajectory", *map(str, line)])


def test_everything_in_one_line(cells, tmp_path, capsys):
    out, figures = tmp_path / "out.h5ad", tmp_path / "figures"
    settings = ["--velocity", "steady_state", "--time-key", "day"]
    assert run(cells, "-o", out, "--root-type", "early", *ENDS, *settings, "--figures", figures) == 0
    said = capsys.readouterr()
    adata = read(out)
    assert spearmanr(adata.obs["diffbio_pseudotime"], adata.obs["time"]).statistic > 0.85
    between = (adata.obs["time"] > 0.5) & (adata.obs["time"] < 0.75)
    fates = adata.obsm["diffbio_fate_prob"]
    assert list(fates.columns) == ["late A", "late B"]
    assert (fates.to_numpy()[between].argmax(axis=1) == adata.obs["branch"][between]).mean() > 0.9
    assert adata.layers["diffbio_velocity"].shape == adata.shape
    assert "diffbio_ot" in adata.uns
    drawn = {"pseudotime", "fate", "driver_genes", "gene_trends", "velocity", "ot_trajectory"}
    assert drawn <= {path.stem for path in figures.glob("*.png")}
    page = (figures / "report.html").read_text()
    assert all(title in page for title in ("Pseudotime", "Fates", "RNA velocity", "Transport from day to day"))
    assert "late A" in said.out
    assert "pseudotime ..." in said.err


def test_results_of_an_earlier_run_do_not_stay(cells, tmp_path):
    first, second = tmp_path / "first.h5ad", tmp_path / "second.h5ad"
    settings = ["--root-type", "early", "--quiet", "--velocity"]
    assert run(cells, "-o", first, *settings, "steady_state", *ENDS) == 0
    assert run(first, "-o", second, *settings, "none", "--terminal-type", "late A") == 0
    adata = read(second)
    assert list(adata.obsm["diffbio_fate_prob"].columns) == ["late A"]
    assert "diffbio_driver_genes" not in adata.varm
    assert "diffbio_gene_trends" not in adata.uns
    assert adata.uns["diffbio"]["fate"]["params"]["kernel"] == "pseudotime"


def test_ends_are_looked_for_and_their_absence_is_said(cells, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    assert run(cells, "-o", out, "--root-cell", "cell0", "--velocity", "none", "--kernel", "pseudotime", "--quiet") == 0
    said = capsys.readouterr().out
    adata = read(out)
    assert "diffbio_pseudotime" in adata.obs
    assert ("diffbio_fate_prob" in adata.obsm) == ("no fates" not in said)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ([], 2, "--root-type"),
        (["--root-type", "early", "--root-cell", "cell0"], 2, "leave one of them out"),
        (["--time-key", "day", "--method", "palantir"], 2, "--method is for pseudotime"),
        (["--root-type", "early", "--n-macrostates", "2", *ENDS], 2, "--n-macrostates"),
        (["--root-type", "nobody", "--velocity", "none"], 3, "there are early"),
        (["--root-type", "early", "--velocity", "none", "--label-key", "kind"], 3, "kind"),
        (["--root-type", "early", "--velocity", "none", "--kernel", "velocity"], 2, "--velocity none"),
        (["--root-cell", "cell0", "--velocity", "none", "--terminal-type", "nobody"], 3, "there are early"),
        (["--root-type", "early", "--gene", "nothing"], 3, "--gene nothing"),
        (["--root-cell", "nobody"], 3, "--root-cell"),
        (["--root-type", "early", "--method", "dtp"], 2, "dpt or palantir"),
        (["--root-type", "early", "--use-rep", "X_none"], 3, "--use-rep"),
        (["--root-cell", "cell0", "--label-key", "kind"], 3, "--label-key"),
        (["--time-key", "day", "--velocity", "dynamical"], 2, "--velocity is for"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(line, code, words, cells, tmp_path, capsys):
    assert run(cells, "-o", tmp_path / "out.h5ad", "--quiet", *line) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()
