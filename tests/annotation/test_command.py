"""`diffbio annotate` and `diffbio models`: files, options, exit codes."""

import anndata as ad
import pytest
from toy_cells import toy_cells

from diffbio.cli import run_command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reference, a query, and a model trained by the command."""
    folder = tmp_path_factory.mktemp("files")
    adata = toy_cells(200)
    adata[:120].write_h5ad(folder / "ref.h5ad")
    adata[120:].write_h5ad(folder / "query.h5ad")
    wanted = ["--reference", folder / "ref.h5ad", "--labels-key", "cell_type", "--epochs", "3"]
    more = ["--save-model", folder / "model", "--figures", folder / "figures"]
    assert annotated(folder, "first.h5ad", *wanted, *more) == 0
    return folder


def annotated(folder, output, *options):
    return run_command(["annotate", *map(str, (folder / "query.h5ad", "-o", folder / output, *options, "--quiet"))])


def test_a_reference_gives_types_figures_and_a_model(files):
    found = ad.read_h5ad(files / "first.h5ad")
    assert (found.obs["diffbio_cell_type"].astype(str) == found.obs["cell_type"].astype(str)).mean() > 0.9
    assert found.uns["diffbio"]["annotate"]["scores"]["cells"] == 80
    figures = {path.name for path in (files / "figures").iterdir()}
    assert figures == {"types_and_labels.png", "confidence.png", "markers.png", "report.html"}
    assert "macro-F1" in (files / "figures" / "report.html").read_text()


def test_a_saved_model_annotates_a_file_left_on_disk(files, capsys):
    assert annotated(files, "second.h5ad", "--model", files / "model", "--stream", "--majority-voting") == 0
    first, second = (ad.read_h5ad(files / name) for name in ("first.h5ad", "second.h5ad"))
    assert list(first.obs["diffbio_cell_type"]) == list(second.obs["diffbio_cell_type"])
    assert "diffbio_cell_type_voted" in second.obs
    assert "80 cells, 3 types, mode celltypist" in capsys.readouterr().out


def test_markers_in_a_file_annotate(files):
    text = "type 0: [gene0, gene1, gene2]\ntype 1: [gene3, gene4]\n"
    (files / "markers.yaml").write_text(text)
    options = ("--markers", files / "markers.yaml", "--other", "rest", "--epochs", "1")
    assert annotated(files, "third.h5ad", *options) == 0
    called = ad.read_h5ad(files / "third.h5ad").obs["diffbio_cell_type"]
    assert set(called) <= {"type 0", "type 1", "rest"}


def test_models_are_listed_and_described(files, capsys):
    assert run_command(["models", str(files)]) == 0
    listed = capsys.readouterr().out
    assert "mode celltypist; 3 types: type 0, type 1, type 2; 50 genes; trained on 120 cells" in listed
    assert run_command(["models", str(files / "model")]) == 0
    assert "labels of obs['cell_type']" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--model", "nothing"], 4, "no model folder"),
        (["--labels-key", "typo"], 3, "no column 'typo'"),
        (["--mode", "cellassign"], 2, "needs markers"),
        (["--markers", "nothing.yaml"], 3, "nothing.yaml"),
        ([], 2, "pass labels_key"),
    ],
)
def test_wrong_arguments_are_named(files, capsys, options, code, said):
    assert annotated(files, "never.h5ad", *options) == code
    assert said in capsys.readouterr().err
    assert not (files / "never.h5ad").exists()


def test_nothing_is_replaced_without_force(files, capsys):
    model = ("--model", files / "model")
    assert annotated(files, "first.h5ad", *model) == 5
    assert annotated(files, "fourth.h5ad", *model, "--save-model", files / "model") == 5
    assert "exists" in capsys.readouterr().err
    assert annotated(files, "first.h5ad", *model, "--force") == 0
