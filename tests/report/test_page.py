import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_pl import annotated, results
from toy_cells import toy_cells

from diffbio.errors import OutputError
from diffbio.report.figures import figures_of, save_figures
from diffbio.report.page import assessment, notes_of, page, text, write_report

EVIL = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title></script>",
    "javascript:alert(1)", "\u202eevil\x00", "x" * 10_000, "=cmd()", "{{7*7}}", "&lt;b&gt;",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


class Reader(HTMLParser):
    """Collects tags and attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def read_page(html):
    reader = Reader()
    reader.feed(html)
    return reader


def test_the_page_is_complete_in_itself():
    reader = read_page(page(results()))
    assert "script" not in reader.tags
    assert reader.tags.count("img") >= 5  # three maps, sizes, ambient, training
    for tag, name, value in reader.attributes:
        assert name not in {"href", "srcset", "action"}
        assert not name.startswith("on")
        if name == "src":
            assert tag == "img"
            assert value.startswith("data:image/png;base64,")
    policy = next(
        value for tag, name, value in reader.attributes if name == "content" and "default-src" in value
    )
    assert policy.startswith("default-src 'none'")


def test_what_did_not_run_comes_before_everything_else():
    html = page(results())
    assert html.index("Not run: ambient removal: no profile") < html.index("<h2>")
    assert html.index("Warning: one &lt;b&gt;thing&lt;/b&gt;") < html.index("<h2>")


def test_names_from_a_hostile_file_stay_text():
    adata = results()
    evil = np.array(EVIL, dtype=object)
    adata.obs["cell_type"] = evil[np.arange(120) % len(evil)]
    adata.obs = adata.obs.rename(columns={"cell_type": EVIL[0]})
    adata.uns["diffbio"]["pipeline"]["params"] = {"label_key": EVIL[0], **{name: name for name in EVIL}}
    adata.uns["diffbio"]["pipeline"] |= {"warnings": evil, "input": EVIL[1], "versions": {EVIL[2]: EVIL[0]}}
    adata.uns["diffbio"][EVIL[0]] = {"params": {EVIL[1]: EVIL[2]}, "skipped": EVIL[0]}
    html = page(adata)
    clean = read_page(page(results()))
    assert set(read_page(html).tags) <= set(clean.tags) | {"details", "summary"}
    assert {a[:2] for a in read_page(html).attributes} == {a[:2] for a in clean.attributes}
    assert "\u202e" not in html
    assert "\x00" not in html
    assert max(map(len, re.findall("x+", re.sub('base64,[^"]*', "", html)))) <= 300
    write = results()
    write.uns["diffbio"] = "a text where a dict should be"
    assert "no results" in page(write)


def test_a_file_without_results_says_so():
    assert notes_of(toy_cells()) == ["This file holds no results of diffbio."]
    assert "<h2>Maps" not in page(toy_cells())


def test_text_keeps_what_readers_need():
    assert text("naïve CD4⁺ <T>") == "naïve CD4⁺ &lt;T&gt;"
    assert text(0.123456789) == "0.123457"
    assert text(np.array([128, 64])) == "128, 64"


def test_the_curves_are_judged():
    adata = results()
    history = adata.uns["diffbio"]["pipeline"]["history"]
    assert assessment(adata) == [
        "vae: the validation loss was still falling at the end; more epochs may help."
    ]
    history["validation_loss"][:20] = np.r_[np.linspace(9, 6, 5), np.linspace(6, 8, 15)]
    assert assessment(adata) == ["vae: the validation loss rose after epoch 5, whose weights were kept."]
    history["skipped_steps"] = np.r_[1.0, np.zeros(24)]
    assert assessment(adata)[0].startswith("vae: 1 steps with an infinite gradient")


def test_files_appear_whole_or_not_at_all(tmp_path):
    paths = save_figures(results(), tmp_path)
    assert {p.name for p in paths} >= {"umap_diffbio_cluster.png", "umap_batch.png", "training.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    first = write_report(results(), tmp_path / "r.html").read_bytes()
    assert (
        first == write_report(results(), tmp_path / "r.html").read_bytes()
    )  # the same results, the same page
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(results(), tmp_path / "no" / "r.html")
    assert not list(tmp_path.glob(".*"))


def words(html):
    return re.sub(r"<[^>]+>", " ", re.sub('base64,[^"]*', "", html))


def test_an_annotation_has_its_numbers_and_figures():
    adata = annotated()
    said = words(page(adata))
    assert "Cell types" in said
    n_unassigned = int((adata.obs["diffbio_cell_type"] == "unassigned").sum())
    assert 0 < n_unassigned < 30
    assert f"{120 - n_unassigned} of 120 cells" in said
    assert f"{n_unassigned} cells ({n_unassigned / 120:.1%})" in said
    assert f"{adata.obs['diffbio_confidence'].mean():.3f}" in said
    accuracy = (adata.obs["diffbio_cell_type"].astype(str) == adata.obs["truth"]).mean()
    assert f"accuracy {accuracy:.3f}, macro-F1 " in said
    assert "over 120 labelled cells; unassigned ones count as wrong" in said
    assert "trained on these labels" not in said
    names = set(figures_of(adata))
    assert names == {"types_and_labels", "confidence", "markers"}
    adata.uns["diffbio"]["annotate"]["params"] |= {"reference": "none", "mode": "scanvi"}
    assert "trained on these labels: this is no measure" in words(page(adata))
    adata.obs["truth"] = [f"{name} (Smith 2020)" for name in adata.obs["truth"]]
    assert "labels that are no types" in words(page(adata))


def test_an_annotation_without_labels_or_markers():
    adata = annotated()
    adata.obs["truth"] = "Unknown"
    adata.uns["diffbio"]["annotate"] = {"params": "a text"}
    assert set(figures_of(adata)) == {"confidence"}
    assert "agreement with" not in words(page(adata))
    del adata.obs["diffbio_confidence"]
    assert set(figures_of(adata)) == set()
    adata.obs["diffbio_cell_type_voted"] = "type 0"
    assert "changed by majority voting" in words(page(adata))
    assert "Cell types" not in page(annotated()[:0].copy())


def test_an_annotation_after_a_pipeline_colours_the_map():
    adata = results()
    adata.uns["diffbio"] |= annotated().uns["diffbio"]
    adata.obs["diffbio_cell_type"], adata.obs["diffbio_confidence"] = "type 0", 0.5
    names = set(figures_of(adata))
    assert {"umap_diffbio_cell_type", "types_and_labels", "confidence", "markers", "cluster_sizes"} <= names


def test_hostile_names_of_types_stay_text():
    adata = annotated()
    evil = np.array(EVIL, dtype=object)
    adata.obs["diffbio_cell_type"] = evil[np.arange(120) % len(evil)]
    adata.obs["truth"] = evil[(np.arange(120) // 2) % len(evil)]
    adata.obs = adata.obs.rename(columns={"truth": EVIL[0]})
    record = adata.uns["diffbio"]["annotate"]
    record["params"] = {"labels_key": EVIL[0], "mode": EVIL[1], "reference": EVIL[2], "model": evil}
    record |= {"input": EVIL[0], "types": evil, "marker_types": evil[[0, 1]], "versions": {EVIL[1]: EVIL[2]}}
    record["marker_genes"] = np.array(["gene1", EVIL[3]], dtype=object)
    html = page(adata)
    clean = read_page(page(annotated()))
    assert set(read_page(html).tags) <= set(clean.tags) | {"details", "summary"}
    assert {a[:2] for a in read_page(html).attributes} == {a[:2] for a in clean.attributes}
    assert "\u202e" not in html
    assert "\x00" not in html


def test_the_figures_of_a_file_on_disk_are_those_in_memory(tmp_path):
    from anndata.io import read_h5ad

    from diffbio.report.figures import drawing, png

    adata = annotated()
    adata.write_h5ad(tmp_path / "out.h5ad")
    backed = read_h5ad(tmp_path / "out.h5ad", backed="r")
    with drawing():
        for name, figure in figures_of(backed).items():
            assert png(figure) == png(figures_of(adata)[name]), name
