import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from toy_cells import toy_cells

from diffbio import pl, pp
from diffbio.errors import MissingKeyError


def results(n_cells=120, n_clusters=4):
    """What a run leaves behind, made up."""
    adata = toy_cells(n_cells)
    rng = np.random.default_rng(0)
    codes = rng.integers(n_clusters, size=n_cells)
    adata.obs["diffbio_cluster"] = pd.Categorical.from_codes(codes, [str(k) for k in range(n_clusters)])
    adata.obs["diffbio_cluster_max_prob"] = np.full(n_cells, 0.9)
    adata.obs["diffbio_ambient_fraction"] = rng.uniform(0, 0.2, n_cells)
    adata.obsm["X_diffbio_umap"] = (
        np.eye(n_clusters)[codes][:, :2] * 9 + rng.normal(size=(n_cells, 2))
    ).astype("f4")
    adata.obsm["X_diffbio_latent"] = rng.normal(size=(n_cells, 5)).astype("f4")
    adata.obsm["X_diffbio_harmony"] = rng.normal(size=(n_cells, 5)).astype("f4")
    history = {
        "stage": np.array(["vae"] * 20 + ["umap"] * 5), "epoch": np.r_[np.arange(20.0), np.arange(5.0)],
        "loss": np.r_[np.linspace(9, 5, 20), np.linspace(2, 1, 5)],
        "validation_loss": np.r_[np.linspace(9, 6, 20), np.full(5, np.nan)],
    }  # fmt: skip
    adata.uns["diffbio"] = {
        "pipeline": {
            "params": {"batch_key": "batch", "label_key": "cell_type"}, "history": history,
            "skipped": np.array(["ambient removal: no profile"]), "warnings": np.array(["one <b>thing</b>"]),
        },
    }  # fmt: skip
    return adata


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_a_map_is_as_wide_whatever_the_legend_takes():
    adata = results()
    adata.obs["many"] = [f"a population with a long name {i % 30}" for i in range(120)]
    for column in ("one", "diffbio_cluster", "many", "depth"):
        ax = pl.embed(adata, color=column)
        ax.figure.draw_without_rendering()
        assert ax.get_window_extent().width / ax.figure.dpi == pytest.approx(pl.MAP_WIDTH, rel=0.02), column


def test_every_tool_has_a_figure():
    adata = results()
    pp.highly_variable(adata, n_top_genes=10)
    pp.normalize(adata)
    for name in ("vae", "integrate", "embed", "cluster", "ambient", "highly_variable", "normalize"):
        assert isinstance(getattr(pl, name)(adata), mpl.axes.Axes), name
    axes = pl.pipeline(adata)
    assert len(axes) == 2 + 1 + 2  # clusters and batches, sizes, two stages
    axes[0].figure.canvas.draw()


def test_a_map_has_every_cell_once_and_a_legend_of_sizes():
    adata = results()
    ax = pl.embed(adata, color="cell_type")
    drawn = np.vstack([collection.get_offsets() for collection in ax.collections])
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, adata.obsm["X_diffbio_umap"].tolist()))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f"type {k} (40)" for k in range(3)]
    assert all(collection.get_rasterized() for collection in ax.collections)


def test_numbers_get_a_scale_and_missing_values_a_name():
    adata = results()
    assert pl.embed(adata, color="depth").figure.axes[1].get_label() == "<colorbar>"
    adata.obs["some"] = adata.obs["cell_type"].where(np.arange(120) > 30)
    legend = pl.embed(adata, color="some").get_legend()
    assert "not known (31)" in [text.get_text() for text in legend.get_texts()]


def test_categories_beyond_the_palette_are_gathered():
    adata = results()
    adata.obs["many"] = [f"name number {i}" for i in range(120)]
    texts = [text.get_text() for text in pl.embed(adata, color="many").get_legend().get_texts()]
    assert len(texts) == 2 * len(pl.PALETTE)
    assert texts[-1] == "other (81)"


def test_a_name_stands_above_cells_that_it_would_hide():
    xy = np.vstack([np.random.default_rng(0).normal(size=(40, 2)), np.full((20, 2), 6.0), [[3, 3]]])
    ax = plt.figure().subplots()
    pl.scatter(ax, xy, np.array(["0"] * 40 + ["1"] * 21))
    assert [text.xyann for text in ax.texts] == [(0, 0), (0, 9)]


def test_cluster_sizes_add_up():
    adata = results()
    ax = pl.cluster(adata)
    heights = sum(bar.get_height() for bar in ax.patches)
    assert heights == adata.n_obs
    assert ax.get_title() == "cluster sizes by batch"
    assert ax.get_ylim()[1] > 1.1 * max(bar.get_y() + bar.get_height() for bar in ax.patches)
    adata.obs["batch"] = np.where(adata.obs["diffbio_cluster"] == "0", "first", "others")  # no cluster has both
    ax = pl.cluster(adata)
    assert ax.get_ylim()[1] > 1.1 * max(bar.get_y() + bar.get_height() for bar in ax.patches)


def test_names_from_a_file_cannot_break_a_figure():
    adata = results()
    adata.obs["odd"] = np.where(np.arange(120) < 60, "$\\frac{1", "x\x00y\u202e" + "z" * 500)
    pl.embed(adata, color="odd").figure.canvas.draw()


def test_what_is_missing_is_named():
    adata = toy_cells()
    with pytest.raises(MissingKeyError, match="X_diffbio_umap"):
        pl.embed(adata)
    with pytest.raises(MissingKeyError, match="no training history"):
        pl.training(adata, "vae")
    with pytest.raises(MissingKeyError, match="'nothing'; it has batch"):
        pl.embed(results(), color="nothing")
    assert pl.stages_of(adata) == []


def test_colours_differ_for_eyes_without_red_or_green_cones():
    """Machado, Oliveira & Fernandes 2009, severity 1; distances in Lab."""
    rgb = np.array([mpl.colors.to_rgb(c) for c in pl.PALETTE[:10]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    protan = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    for eye in (np.eye(3), np.array(protan), np.array(deutan)):
        lab = to_lab(np.clip(linear @ eye.T, 0, 1))
        gaps = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(10, 1)]
        assert gaps.min() > 10


def to_lab(linear):
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    xyz = linear @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)
