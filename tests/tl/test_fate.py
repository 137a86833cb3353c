"""`tl.fate`, `tl.driver_genes`, `tl.gene_trends` and their figures, on a fork of cells."""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from diffbio import pl, tl
from diffbio.errors import ConfigError, DataError, DataWarning, MissingKeyError

FORK = {"left": [f"c{i}" for i in range(3)], "right": [f"c{i}" for i in range(60, 63)]}


def fork(seed=0):
    """120 cells: a trunk that parts in two; genes 0 and 1 rise on one side, gene 2 along the trunk."""
    rng = np.random.default_rng(seed)
    side, t = np.repeat([0, 1], 60), np.concatenate([np.linspace(1, 0, 60)] * 2)
    past = np.maximum(t - 0.4, 0)
    points = np.column_stack([np.minimum(t, 0.4), past * (1 - side), past * side]) * 10
    points = np.hstack([points, np.zeros((120, 2))]) + 0.1 * rng.normal(size=(120, 5))
    rates = np.column_stack([1 + 40 * past * (1 - side), 1 + 40 * past * side, 1 + 20 * t, np.ones(120)])
    rates = np.hstack([rates, np.full((120, 8), 10.0)])
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)))
    adata.obs_names = [f"c{i}" for i in range(120)]
    adata.var_names = [f"gene{g}" for g in range(12)]
    adata.obsm["X_points"] = points.astype(np.float32)
    adata.obs["diffbio_pseudotime"] = t
    adata.obs["type"] = pd.Categorical(np.where(t < 0.4, "stem", np.where(side == 0, "left", "right")))
    return adata


@pytest.fixture(scope="module")
def fated():
    adata = fork()
    tl.fate(adata, terminal_states=FORK, kernel="pseudotime", use_rep="X_points", n_neighbors=8)
    tl.driver_genes(adata)
    tl.gene_trends(adata, ["gene0", "gene1", "gene2"], n_points=20)
    return adata


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_given_ends(fated, tmp_path):
    fates = fated.obsm["diffbio_fate_prob"]
    assert list(fates.columns) == ["left", "right"]
    np.testing.assert_allclose(fates.sum(axis=1), 1.0, atol=1e-6)
    assert (fates.loc[FORK["left"], "left"] == 1).all()
    kind = fated.obs["type"]
    assert fates.loc[kind == "left", "left"].mean() > 0.9
    assert fates.loc[kind == "right", "right"].mean() > 0.9
    assert 0.2 < fates.loc[kind == "stem", "left"].mean() < 0.8
    assert fated.obs["diffbio_macrostate"].value_counts().to_dict() == {"left": 3, "right": 3}
    assert fated.uns["diffbio"]["fate"]["params"]["kernel"] == "pseudotime"
    fated.write_h5ad(tmp_path / "fated.h5ad")
    again = anndata.read_h5ad(tmp_path / "fated.h5ad")
    pd.testing.assert_frame_equal(again.obsm["diffbio_fate_prob"], fates)
    pd.testing.assert_frame_equal(again.varm["diffbio_driver_genes"], fated.varm["diffbio_driver_genes"])
    np.testing.assert_array_equal(again.uns["diffbio_gene_trends"]["mean"], fated.uns["diffbio_gene_trends"]["mean"])
    assert len(pl.gene_trends(again)) == 3


def test_found_ends_get_names():
    adata = fork()
    found = tl.fate(
        adata, kernel={"pseudotime": 0.5, "connectivity": 0.5}, scheme="soft", n_macrostates=3, n_terminal=2, n_cells=5,
        groupby="type", use_rep="X_points", n_neighbors=8, copy=True,
    )  # fmt: skip
    assert "diffbio_fate_prob" not in adata.obsm
    assert set(found.obsm["diffbio_fate_prob"].columns) == {"left", "right"}
    assert set(found.obsm["diffbio_macrostate_prob"].columns) == {"left", "right", "stem"}
    record = found.uns["diffbio"]["diffbio_fate"]
    assert len(record["stability"]) == 3
    assert (found.obs["diffbio_macrostate"].value_counts() == 5).all()
    # without a number: the largest gap
    tl.fate(adata, use_rep="X_points", n_neighbors=8, stability_threshold=0.5, n_cells=5)
    assert adata.obsm["diffbio_fate_prob"].shape[1] >= 2


def test_a_column_and_velocities_give_the_same_form():
    adata = fork()
    adata.obs["end"] = adata.obs["diffbio_pseudotime"].gt(0.95).map({True: "end", False: None})
    points = adata.obsm["X_points"]
    near = np.argsort(((points[:, None] - points) ** 2).sum(axis=2), axis=1)[:, 1:9]
    rows = np.repeat(np.arange(120), 8)
    ahead = np.sign(
        adata.obs["diffbio_pseudotime"].to_numpy()[near.ravel()] - adata.obs["diffbio_pseudotime"].to_numpy()[rows]
    )
    adata.obsp["diffbio_velocity_graph"] = sparse.csr_matrix((ahead + 1e-3, (rows, near.ravel())), shape=(120, 120))
    tl.fate(adata, terminal_states="end", kernel="velocity")
    np.testing.assert_allclose(adata.obsm["diffbio_fate_prob"].to_numpy(), 1.0, atol=1e-6)


def test_what_fate_refuses():
    adata = fork()
    settings = {"use_rep": "X_points", "n_neighbors": 8}
    for ends, error, said in (
        ({}, DataError, "is empty"),
        ({"left": []}, DataError, "'left' has no cell"),
        ({"left": ["c0"], "right": ["c1", "nobody"]}, DataError, "not there, such as 'nobody'"),
        ({"left": ["c0"], "right": ["c1", "c0"]}, DataError, "cell 'c0' is in the terminal states 'left' and 'right'"),
        ("nothing", MissingKeyError, "obs has no column 'nothing'"),
    ):
        with pytest.raises(error, match=said):
            tl.fate(adata, terminal_states=ends, **settings)
    with pytest.raises(ConfigError, match="kernel must be one of"):
        tl.fate(adata, kernel="magic", **settings)
    with pytest.raises(ConfigError, match="kernel must be a name"):
        tl.fate(adata, kernel=["connectivity"], **settings)
    for dead in ({"scheme": "soft"}, {"pseudotime_key": "other"}, {"velocity_key": "other"}):
        with pytest.raises(ConfigError, match=f"{next(iter(dead))} does nothing"):
            tl.fate(adata, terminal_states=FORK, **dead, **settings)
    with pytest.raises(ConfigError, match="use_rep does nothing"):
        tl.fate(adata, terminal_states=FORK, kernel="velocity", use_rep="X_points")
    for bad in ({"n_cells": 0}, {"n_terminal": 0}, {"stability_threshold": 5.0}):
        with pytest.raises(ConfigError, match="must be"):
            tl.fate(adata, **bad, **settings)
    with pytest.raises(ConfigError, match="n_neighbors is 300"):
        tl.fate(adata, terminal_states=FORK, use_rep="X_points", n_neighbors=300)
    with pytest.raises(DataError, match="every cell holds a terminal state"):
        tl.fate(adata, terminal_states="type", **settings)
    with pytest.raises(ConfigError, match="n_macrostates does nothing"):
        tl.fate(adata, terminal_states=FORK, n_macrostates=3, **settings)
    with pytest.raises(MissingKeyError, match=r"call tl\.velocity"):
        tl.fate(adata, terminal_states=FORK, kernel="velocity")
    del adata.obs["diffbio_pseudotime"]
    with pytest.raises(MissingKeyError, match=r"call tl\.pseudotime"):
        tl.fate(adata, terminal_states=FORK, kernel="pseudotime", **settings)
    for function in (tl.driver_genes, lambda a: tl.gene_trends(a, ["gene0"]), pl.fate, pl.driver_genes, pl.gene_trends):
        with pytest.raises(MissingKeyError, match=r"call tl\."):
            function(adata)


def test_times_that_are_no_times_are_named():
    adata = fork()
    settings = {"terminal_states": FORK, "kernel": "pseudotime", "use_rep": "X_points", "n_neighbors": 8}
    adata.obs["diffbio_pseudotime"] = np.where(np.arange(120) < 3, np.inf, adata.obs["diffbio_pseudotime"])
    with pytest.warns(DataWarning, match="infinite in 3 cells"):
        tl.fate(adata, **settings)
    adata.obs["diffbio_pseudotime"] = np.inf
    with pytest.raises(DataError, match="infinite in every cell"):
        tl.fate(adata, **settings)
    adata.obs["diffbio_pseudotime"] = "early"
    with pytest.raises(DataError, match="must hold numbers"):
        tl.fate(adata, **settings)


def test_new_fates_take_the_place_of_old_results(fated):
    adata = fated.copy()
    assert "diffbio_driver_genes" in adata.varm
    tl.fate(adata, terminal_states={"left": FORK["left"]}, use_rep="X_points", n_neighbors=8)
    assert "diffbio_driver_genes" not in adata.varm
    assert "diffbio_gene_trends" not in adata.uns


def test_drivers_and_trends(fated):
    table = fated.varm["diffbio_driver_genes"]
    assert table["left_corr"].idxmax() == "gene0"
    assert table["right_corr"].idxmax() == "gene1"
    assert (table["left_ci_low"] <= table["left_corr"]).all()
    found = fated.uns["diffbio_gene_trends"]
    assert found["mean"].shape == (2, 3, 20)
    left, right = found["mean"]
    assert left[0, -1] > left[0, 0] + 1
    assert right[1, -1] > right[1, 0] + 1
    assert right[0, -1] < left[0, -1] - 1
    assert (found["low"] <= found["mean"]).all()
    late = tl.driver_genes(fated, fates=["left"], groupby="type", groups=["left", "stem"], copy=True)
    assert next(iter(late.varm["diffbio_driver_genes"].columns)) == "left_corr"
    with pytest.raises(ConfigError, match="go together"):
        tl.driver_genes(fated, groupby="type")
    with pytest.raises(MissingKeyError, match="no fate 'up'"):
        tl.driver_genes(fated, fates=["up"])
    with pytest.raises(MissingKeyError, match="no gene 'gene99'"):
        tl.gene_trends(fated, ["gene99"])


def test_figures(fated):
    (line,) = pl.fate(fated)
    assert [text.get_text() for text in line.texts] == ["left", "right"]
    fated.obsm["X_umap"] = fated.obsm["X_points"][:, :2]
    axes = pl.fate(fated, color="type")
    assert [ax.get_title() for ax in axes] == ["cells between fates", "left", "right"]
    assert len(axes[1].collections[0].get_offsets()) == 120
    assert len(pl.fate(fated, fates=["right"])) == 1
    del fated.obsm["X_umap"]
    with pytest.raises(DataError, match="one fate and no map"):
        pl.fate(fated, fates=["right"])
    with pytest.raises(MissingKeyError, match="no 'X_tsne'"):
        pl.fate(fated, basis="X_tsne")
    axes = pl.driver_genes(fated, n_genes=3)
    assert axes[0].get_yticklabels()[0].get_text() == "gene0"
    axes = pl.gene_trends(fated, genes=["gene1"], fates=["right"])
    assert [ax.get_title() for ax in axes] == ["gene1"]
    assert len(axes[0].lines) == 1
    with pytest.raises(MissingKeyError, match="no gene 'gene5'"):
        pl.gene_trends(fated, genes=["gene5"])


def test_a_polygon_of_many_fates():
    adata = fork()
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(5, 0.3), 120)
    adata.obsm["diffbio_fate_prob"] = pd.DataFrame(shares, index=adata.obs_names, columns=list("abcde"))
    (ax,) = pl.fate(adata)
    assert sorted(text.get_text() for text in ax.texts) == list("abcde")
    assert len(pl.fate(adata, fates=["a", "c", "e"])[0].texts) == 3
