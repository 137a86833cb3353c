"""What `diffbio run` does before the pipeline: calling cells, quality, doublets, imputation."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from toy_cells import toy_cells

from diffbio.cli import run_command
from diffbio.cli.steps import Steps, through
from diffbio.data import read, write_results
from diffbio.errors import ConfigError

ALONE = {"on_disk": False, "quiet": True}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """200 cells, the last 12 of which have lost nine tenths of their counts."""
    adata = toy_cells(200, 120)
    counts = adata.X.toarray()
    counts[188:] = np.random.default_rng(0).binomial(counts[188:].astype(int), 0.1)
    adata.X = sparse.csr_matrix(counts)
    return write_results(adata, tmp_path_factory.mktemp("steps") / "cells.h5ad", {})


@pytest.fixture(scope="module")
def droplets(tmp_path_factory):
    """40 cells among 400 droplets of their soup."""
    adata, rng = toy_cells(40, 30), np.random.default_rng(0)
    profile = adata.var["ambient_profile"].to_numpy()
    soup = np.array([rng.multinomial(n, profile) for n in rng.integers(20, 100, 400)])
    counts = sparse.csr_matrix(np.vstack([20 * adata.X.toarray(), soup]).astype(np.float32))
    raw = ad.AnnData(counts, var=pd.DataFrame(index=adata.var_names))
    raw.obs_names = [f"droplet{i}" for i in range(440)]
    return write_results(raw, tmp_path_factory.mktemp("raw") / "raw.h5ad", {})


@pytest.mark.filterwarnings("ignore::diffbio.errors.DataWarning")
def test_flagged_cells_are_marked_or_left_out(cells):
    asked = {"quality": True, "doublets": "scrublet", "normalize": "shifted_log", "impute": "diffusion"}
    marked = through(cells, Steps(**asked), settings={"n_top_genes": 20}, **ALONE)
    assert marked.data.n_obs == 200
    flagged = ~marked.data.obs["diffbio_quality_pass"] | marked.data.obs["diffbio_predicted_doublet"]
    assert flagged[188:].mean() > 0.9
    assert flagged[:188].mean() < 0.2
    assert marked.data.obsm["diffbio_imputed"].shape == (200, 20)
    assert marked.data.layers["diffbio_normalized"].shape == (200, 120)
    assert any("--drop-flagged" in line for line in marked.lines)
    left = through(cells, Steps(quality=True, doublets="scrublet", drop_flagged=True), settings={}, **ALONE)
    assert list(left.data.obs_names) == list(marked.data.obs_names[~flagged])
    assert any(f"left out: {int(flagged.sum())} flagged" in line for line in left.lines)


def test_cells_are_called_where_only_droplets_are_given(droplets):
    found = through(None, Steps(raw=droplets), settings={}, **ALONE)
    assert list(found.data.obs_names) == [f"droplet{i}" for i in range(40)]
    assert found.lines == ["40 of 440 droplets hold a cell"]


def test_without_steps_the_file_is_left_alone(cells):
    assert through(cells, Steps(), settings={}, on_disk=True, quiet=True).data == cells


@pytest.mark.filterwarnings("ignore::diffbio.errors.DataWarning")
def test_a_run_with_raw_droplets_writes_calls_soup_and_steps(droplets, tmp_path, capsys):
    out = tmp_path / "out.h5ad"
    line = ["run", "--raw", droplets, "-o", out, "--quality", "--epochs", "1", "--n-clusters", "2", "--quiet",
            "--figures", tmp_path / "figures"]  # fmt: skip
    assert run_command(list(map(str, line))) == 0
    said = capsys.readouterr().out
    assert "40 of 440 droplets hold a cell" in said
    adata = read(out)
    assert adata.n_obs == 40
    assert {"diffbio_is_cell", "diffbio_cell_weight", "diffbio_ambient_fraction", "diffbio_cluster"} <= set(adata.obs)
    assert {"call_cells", "quality", "pipeline"} <= set(adata.uns["diffbio"])
    soup = read(droplets).X.toarray()[40:].sum(axis=0)
    np.testing.assert_allclose(adata.var["ambient_profile"], soup / soup.sum(), atol=1e-6)
    assert (tmp_path / "figures" / "quality.png").stat().st_size > 5_000
    assert "Quality of the cells" in (tmp_path / "figures" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "wanted"),
    [
        (["--drop-flagged"], 2, "needs something that flags"),
        (["--doublets", "scrublets"], 2, "'scrublet' or 'solo'"),
        (["--impute", "magic"], 2, "'diffusion' or 'transformer'"),
        (["--quality", "--stream"], 2, "in memory"),
        (["--doublet-rate", "0.1"], 2, "--doublets"),
        (["--quality", "--allow-non-integer"], 2, "whole counts"),
        (["--normalize", "log"], 2, "'pearson_residuals'"),
        (["--normalize", "cpm", "--normalized"], 2, "one layer"),
        (["--raw", "nowhere.h5"], 3, "nowhere.h5"),
        (["--raw", "raw.h5", "--ambient-profile", "soup"], 2, "give one of them"),
    ],
)
def test_steps_that_cannot_be_taken(cells, tmp_path, capsys, options, code, wanted):
    assert run_command(["run", str(cells), "-o", str(tmp_path / "out.h5ad"), *options]) == code
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.filterwarnings("ignore::diffbio.errors.DataWarning")
def test_settings_of_the_run_reach_the_steps(cells, monkeypatch):
    from diffbio import pp

    seen = {}
    for name, column in (("doublets", "diffbio_predicted_doublet"), ("impute", "unused")):

        def step(adata, name=name, column=column, **given):
            seen[name] = given
            adata.obs[column] = False

        monkeypatch.setattr(pp, name, step)
    settings = {"batch_key": "batch", "max_epochs": 3, "seed": 5, "n_top_genes": 10}
    through(cells, Steps(doublets="solo", doublet_rate=0.1, impute="diffusion"), settings=settings, **ALONE)
    assert seen["doublets"]["expected_rate"] == 0.1
    assert seen["doublets"]["max_epochs"] == 3
    assert seen["doublets"]["batch_key"] == seen["impute"]["batch_key"] == "batch"
    assert seen["doublets"]["random_state"] == seen["impute"]["random_state"] == 5
    assert seen["impute"]["progress"] is False
    through(cells, Steps(impute="transformer"), settings=settings, **ALONE)
    assert seen["impute"]["max_epochs"] == 3


def test_neither_cells_nor_droplets(tmp_path, capsys):
    assert run_command(["run", "-o", str(tmp_path / "out.h5ad")]) == 3
    assert "--raw" in capsys.readouterr().err


def test_steps_in_a_settings_file_are_checked():
    with pytest.raises(ConfigError, match="quality must be true or false"):
        Steps.among({"quality": "yes"})
    settings = {"doublets": "solo", "n_clusters": 4}
    assert Steps.among(settings) == Steps(doublets="solo")
    assert settings == {"n_clusters": 4}


def test_every_cell_flagged_is_refused(cells, monkeypatch):
    from diffbio import pp

    def all_doublets(adata, **settings):
        adata.obs["diffbio_predicted_doublet"] = True

    monkeypatch.setattr(pp, "doublets", all_doublets)
    with pytest.raises(ConfigError, match="every cell is flagged"):
        through(cells, Steps(doublets="scrublet", drop_flagged=True), settings={}, **ALONE)
