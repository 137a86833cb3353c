import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from toy_cells import toy_cells

from diffbio import pl, pp
from diffbio.errors import DataError, MissingKeyError


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


# ---- annotation
def annotated(n_cells=120, *, types=("type 0", "type 1", "type 2"), cells=None):
    """What tl.annotate leaves behind, made up: a tenth of the calls are wrong, some cells are unassigned."""
    adata = toy_cells(n_cells) if cells is None else cells
    rng = np.random.default_rng(0)
    called = np.array([types[k] for k in np.arange(n_cells) % len(types)], dtype=object)
    adata.obs["truth"] = called
    called = np.where(rng.random(n_cells) < 0.1, types[0], called)
    called[rng.random(n_cells) < 0.1] = "unassigned"
    adata.obs["diffbio_cell_type"] = pd.Categorical(called)
    adata.obs["diffbio_confidence"] = rng.beta(8, 2, n_cells).astype("f4")
    genes = adata.var_names
    pairs = [(t, genes[(3 * k + i) % len(genes)]) for k, t in enumerate(types) for i in range(3)]
    adata.uns["diffbio"] = {"annotate": {
        "types": np.array(types, dtype=object), "marker_types": np.array([t for t, _ in pairs], dtype=object),
        "marker_genes": np.array([g for _, g in pairs], dtype=object),
        "params": {"labels_key": "truth", "reference": "ref.h5ad", "model": "none", "min_confidence": 0.4},
    }}  # fmt: skip
    return adata


def test_annotation_has_its_figures():
    adata = annotated()
    assert len(pl.annotate(adata, labels_key="truth")) == 3
    assert len(pl.annotate(adata)) == 2
    adata.obs["diffbio_cluster"] = pd.Categorical([str(k % 11) for k in range(120)])
    rows = [label.get_text() for label in pl.confidence(adata).get_yticklabels()]
    assert [row.partition(":")[0] for row in rows] == [str(k) for k in range(11)]  # 10 comes after 9
    assert "type" in rows[0]
    rows = [label.get_text() for label in pl.confidence(adata, clusters="diffbio_cell_type").get_yticklabels()]
    assert rows == ["type 0", "type 1", "type 2", "unassigned"]
    del adata.uns["diffbio"]["annotate"]["marker_genes"]
    assert len(pl.annotate(adata)) == 1
    with pytest.raises(MissingKeyError, match="names no markers"):
        pl.markers(adata)
    with pytest.raises(MissingKeyError, match="no column 'nowhere'"):
        pl.confusion(adata, "nowhere")
    with pytest.raises(MissingKeyError, match="no column 'diffbio_cell_type'"):
        pl.annotate(toy_cells())


def test_agreement_counts_what_can_be_compared():
    adata = annotated(6)
    adata.obs["diffbio_cell_type"] = ["a", "a", "b", "unassigned", "a", "b"]
    adata.obs["truth"] = pd.Categorical(["a", "b", "b", "b", None, "Unknown"])
    adata.uns["diffbio"]["annotate"]["types"] = np.array(["a", "b"], dtype=object)
    found = pl.agreement(adata, "truth")
    assert found["cells"] == 4
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["strangers"] == []
    assert not found["trained_on"]
    from sklearn.metrics import f1_score

    truth, called = ["a", "b", "b", "b"], ["a", "a", "b", "unassigned"]
    assert found["macro_f1"] == pytest.approx(f1_score(truth, called, labels=["a", "b"], average="macro"))
    adata.uns["diffbio"]["annotate"]["params"]["reference"] = "none"
    assert pl.agreement(adata, "truth")["trained_on"]
    assert "labels that training saw" in pl.confusion(adata, "truth").get_title()
    adata.obs["truth"] = "Unknown"
    with pytest.raises(DataError, match="holds no label"):
        pl.confusion(adata, "truth")


def test_the_diagonal_of_the_confusion_is_agreement():
    adata = annotated()
    ax = pl.confusion(adata, "truth")
    share = ax.images[0].get_array()
    np.testing.assert_allclose(share.sum(axis=1), 1)
    assert share.argmax(axis=1).tolist() == [0, 1, 2]
    assert ax.get_xticklabels()[-1].get_text() == "unassigned"
    adata.obs["diffbio_cell_type"] = adata.obs["diffbio_cell_type"].astype(str).replace("type 1", "type 2")
    ax = pl.confusion(adata, "truth")  # a type that no cell was called keeps its place
    assert [label.get_text() for label in ax.get_xticklabels()] == ["type 0", "type 1", "type 2", "unassigned"]
    adata = annotated()
    # other names for the same types: paired by their cells, and said to be no types
    adata.obs["upper"] = [{"type 0": "Z", "type 1": "A", "type 2": "M"}[name] for name in adata.obs["truth"]]
    ax = pl.confusion(adata, "upper")
    assert ax.images[0].get_array().argmax(axis=1).tolist() == [0, 1, 2]
    assert "3 of 3 labels are no names of types" in ax.get_title()


def test_dots_are_shares_and_means_of_log_counts():
    from diffbio.data.transform import shifted_log
    from diffbio.pl.annotation import _expression

    adata = annotated()
    codes = adata.obs["diffbio_cell_type"].cat.codes.to_numpy().astype(int)
    logged = shifted_log(adata.X, total=1e4).toarray()[:, [7, 2]]
    share = np.array([(logged[codes == k] > 0).mean(axis=0) for k in range(4)])
    mean = np.array([logged[codes == k].mean(axis=0) for k in range(4)])
    dense = adata.copy()
    dense.X = dense.X.toarray()
    for cells in (adata, dense):
        found = _expression(cells, [7, 2], codes, 4, None)
        np.testing.assert_allclose(found[0], share, rtol=1e-6)
        np.testing.assert_allclose(found[1], mean, rtol=1e-5)  # float32
    ax = pl.markers(adata, {"type 0": ["gene7", "no such gene"], "type 1": ["gene2"]})
    assert [label.get_text() for label in ax.get_xticklabels()] == ["gene7", "gene2"]
    with pytest.raises(DataError, match="none of the markers"):
        pl.markers(adata, {"type 0": ["no such gene"]})


def test_many_types_and_hard_names_are_drawn():
    names = tuple(f"a population ${'x' * k}_ with a long name / and a slash {k}" for k in range(50))
    adata = annotated(200, types=names)
    axes = pl.annotate(adata, labels_key="truth")
    axes[0].figure.draw_without_rendering()
    few = annotated(3)
    few.X = few.X * 0
    assert len(pl.annotate(few, labels_key="truth")) == 3
