import numpy as np
import pytest
from toy_cells import toy_cells

from diffbio.data import highly_variable_genes, write_results
from diffbio.data.tables import should_stream, tables_of
from diffbio.errors import ConfigError, DataWarning, MissingKeyError
from diffbio.pipelines import SingleCellPipelineConfig
from diffbio.pipelines.run import Analysis, RunSettings, _pipeline_for, known_settings, prepare, sorted_out


def test_settings_go_where_they_belong():
    run, pipeline, training = sorted_out({"batch_key": "b", "hidden_dims": [8], "max_epochs": 3, "seed": 4})
    assert run == RunSettings(batch_key="b", seed=4)
    assert pipeline == {"hidden_dims": (8,)}
    assert training == {"max_epochs": 3}
    assert set(SingleCellPipelineConfig.__dataclass_fields__) - set(known_settings()) == {"n_genes", "n_batches"}
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        sorted_out({"batchsize": 3})
    with pytest.raises(ConfigError, match="validation must be float, got True"):
        sorted_out({"validation": True})


def test_genes_are_chosen_batch_by_batch_and_the_soup_sums_to_one():
    adata = toy_cells(200, 60)
    prepared = prepare(adata, RunSettings(batch_key="batch", n_top_genes=20))
    codes = adata.obs["batch"].cat.codes.to_numpy()
    wanted = highly_variable_genes(adata.X, n_top_genes=20, batch_labels=codes)["highly_variable"].to_numpy()
    np.testing.assert_array_equal(prepared.genes, np.flatnonzero(wanted))
    batch = prepared.source.take(np.arange(5))
    np.testing.assert_array_equal(batch["counts"], adata.X[:5].toarray()[:, wanted])
    np.testing.assert_array_equal(batch["batch_labels"], codes[:5])
    np.testing.assert_allclose(batch["ambient_profile"].sum(), 1, rtol=1e-6)
    assert prepared.skipped == {}
    assert prepared.batches == ["donor 0", "donor 1"]


def test_a_stage_that_cannot_run_says_why():
    adata = toy_cells(10)
    del adata.var["ambient_profile"]
    with pytest.warns(DataWarning, match="holds one value, 'same'"):
        prepared = prepare(adata, RunSettings(batch_key="one"))
    pipeline = _pipeline_for(prepared, {"enable_clustering": False}, RunSettings())
    assert prepared.skipped == {
        "batch correction": "obs['one'] holds one batch",
        "ambient removal": "no ambient profile is known: var has no column 'ambient_profile', and none was named",
        "UMAP": "a neighbourhood is 15 cells, and there are 10",
        "clustering": "switched off",
    }
    parts = (pipeline.ambient_removal, pipeline.batch_correction, pipeline.dim_reduction, pipeline.clustering)
    assert parts == (None,) * 4


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_file_left_on_disk_gives_the_same_cells(tmp_path, suffix):
    adata = toy_cells()
    path = write_results(adata, tmp_path / f"cells{suffix}", {})
    settings = RunSettings(batch_key="batch", n_top_genes=20)
    here, there = prepare(adata, settings), prepare(path, settings)
    rows = np.array([3, 77, 5])
    for key, value in here.source.take(rows).items():
        np.testing.assert_array_equal(value, there.source.take(rows)[key])
    assert here.counts == there.counts


def test_clusters_without_cells_are_noted():
    analysis = Analysis(None, None, None, {"warnings": np.array(["an older one"])})
    analysis._look_for_small(np.eye(5)[[0, 0, 1, 1, 2, 2, 3]])
    assert analysis.notes == ["2 of 5 clusters have less than 2 cells; ask for fewer (n_clusters)"]
    assert list(analysis.record["warnings"]) == ["an older one", *analysis.notes]
    fine = Analysis(None, None, None, {"warnings": np.array([])})
    fine._look_for_small(np.eye(2)[[0, 0, 1, 1]])
    assert fine.notes == []


@pytest.mark.parametrize(("shift", "noted"), [(0.0, False), (2.0, False), (50.0, True)])
def test_batches_that_stay_apart_are_noted(shift, noted):
    rng = np.random.default_rng(0)
    batches = np.arange(400) % 2
    embedding = (rng.normal(size=(400, 5)) + shift * batches[:, None] * [1, 0, 0, 0, 0]).astype(np.float32)
    analysis = Analysis(None, None, None, {"warnings": np.array([])})
    analysis._look_for_unmixed(embedding, batches)
    assert bool(analysis.notes) == bool(len(analysis.record["warnings"])) == noted
    if noted:
        (note,) = analysis.notes
        assert "stay apart after the correction: 0.0% of the neighbours of a cell are of another batch" in note
        assert "it would be 50%" in note
    for few in (1, 2):
        analysis._look_for_unmixed(embedding[:few], batches[:few])


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_layer_that_is_not_there(tmp_path, on_disk):
    adata = toy_cells()
    path = write_results(adata, tmp_path / "none.h5ad", {})
    with pytest.raises(MissingKeyError, match=r"layers has no 'raw'; there are none, or leave the layer out to use X"):
        prepare(path if on_disk else adata, RunSettings(layer="raw"))
    adata.layers["counts"] = adata.layers["spliced"] = adata.X
    path = write_results(adata, tmp_path / "two.h5ad", {})
    with pytest.raises(MissingKeyError, match=r"it has counts, spliced; name one of them \(--layer\)"):
        prepare(path if on_disk else adata, RunSettings(layer="raw"))


def test_tables_and_size_of_a_file(tmp_path, monkeypatch):
    adata = toy_cells()
    adata.obsm["X_some"] = np.zeros((120, 2))
    path = write_results(adata, tmp_path / "cells.h5ad", {})
    tables = tables_of(path)
    assert list(tables.obs.columns) == ["batch", "cell_type", "one", "depth"]
    assert list(tables.var.index) == list(adata.var_names)
    assert tables.names["obsm"] == ["X_some"]
    assert tables.n_bytes > adata.X.data.nbytes
    assert not should_stream(path)
    monkeypatch.setattr("diffbio.data.tables.free_memory", lambda: 3 * tables.n_bytes)
    assert should_stream(path)


def test_the_soup_is_read_from_all_droplets(tmp_path):
    adata = toy_cells(40, 20)
    profile = adata.var.pop("ambient_profile").to_numpy()
    raw = toy_cells(300, 20, seed=1)[:, ::-1].copy()
    raw.obs_names = [f"droplet{i}" for i in range(300)]
    raw.X = np.random.default_rng(0).poisson(40 * profile[::-1], (300, 20)).astype(np.float32)
    path = write_results(raw, tmp_path / "raw.h5ad", {})
    prepared = prepare(adata, RunSettings(raw=str(path), n_top_genes=12))
    soup = prepared.source.take(np.arange(2))["ambient_profile"]
    np.testing.assert_allclose(soup, profile[prepared.genes] / profile[prepared.genes].sum(), atol=0.02)
    np.testing.assert_allclose(prepared.soup.profile.sum(), 1.0)
    assert "ambient removal" not in prepared.skipped
    with pytest.raises(ConfigError, match="give one of them"):
        RunSettings(raw="raw.h5", ambient_profile="soup")
