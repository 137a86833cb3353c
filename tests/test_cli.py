"""The command line: exit codes and messages, then whole runs, some in processes of their own."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from toy_cells import toy_cells

import diffbio
from diffbio.cli import Terminated, explain, run_command, settings_from
from diffbio.data import read, write_results
from diffbio.errors import ConfigError, DeviceMemoryError, TrainingDivergedError

FAST = ["--epochs", "2", "--n-clusters", "3", "--quiet"]


def saved(folder, name="cells.h5ad", **changes):
    adata = toy_cells()
    for slot, value in changes.items():
        setattr(adata, slot, value)
    return write_results(adata, folder / name, {}, overwrite=True)


def failed(capsys, arguments, code):
    """Runs, checks the exit code, and returns the one line of the error."""
    assert run_command(list(map(str, arguments))) == code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in said.err
    return lines[0]


@pytest.fixture
def cells(tmp_path):
    return saved(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.h5ad"


def in_process(arguments, **options):
    command = [sys.executable, "-c", "from diffbio.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


# ---- usage and settings


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys, time; from diffbio.cli import run_command; run_command(['--help']);"
        "names = {'jax', 'flax', 'anndata', 'scanpy', 'matplotlib', 'pandas', 'numpy', 'rich'};"
        "heavy = names & set(sys.modules);"
        "assert not heavy, heavy; print(time.process_time())"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert "Exit codes: 0 done" in said[0]
    assert min(float(text.splitlines()[-1]) for text in said) < 0.3


def test_version(capsys):
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"{diffbio.__version__}\n"


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["run"], "Missing option '--output'"),
    (["project"], "Missing argument 'cells'"),
    (["run", "a.h5ad"], "Missing option '--output'"),
    (["run", "a.h5ad", "-o", "b.h5ad", "--sed", "1"], "--seed"),
    (["run", "a.h5ad", "-o", "b.h5ad", "--seed", "x"], "should be a valid integer"),
    (["rnu"], "No such command 'rnu'"),
])  # fmt: skip
def test_wrong_usage(capsys, arguments, wanted):
    assert wanted in failed(capsys, arguments, 2)


@pytest.mark.parametrize(("line", "wanted"), [
    ("n_cluster: 3", "unknown setting 'n_cluster'; did you mean 'n_clusters'?"),
    ("epochs: 3", "did you mean 'max_epochs'?"),
    ("n_clusters: ten", "n_clusters must be int, got 'ten'"),
    ("latent_dim: 0", "latent_dim must be > 0, got 0"),
    ("clustering_temperature: 0.0", "clustering_temperature must be > 0"),
    ("learning_rate: -1", "learning_rate must be > 0"),
    ("max_epochs: many", "max_epochs must be int, got 'many'"),
    ("max_epochs: 1.5", "max_epochs must be int, got 1.5"),
    ("n_genes: 7", "unknown setting 'n_genes'"),
    ("integration: combat", "integration must be one of 'harmony', 'mmd', 'wgan', 'scvi', got 'combat'"),
    ("embedding: tsne", "embedding must be one of 'umap', 'phate', got 'tsne'"),
    ("resolution: 2.0", 'resolution 2.0 is of clustering="communities"'),
    ("clustering: communities\nn_clusters: 5", "n_clusters 5 does nothing for method 'communities'; leave it out"),
    ("seed: 1\nseed: 2", "setting 'seed' is given twice"),
    ("- seed", "expected lines such as 'n_clusters: 12', got list"),
    ("seed: [1", "is not valid YAML"),
    ("n_clusters: [&a [x, x], &b [*a, *a], [*b, *b]]", "*a refers to another value; write the value out"),
    ("seed: !!python/object/apply:os.system ['true']", "is not valid YAML"),
])  # fmt: skip
def test_settings_are_checked_before_anything_runs(capsys, tmp_path, cells, out, line, wanted):
    config = tmp_path / "run.yaml"
    config.write_text(line)
    assert wanted in failed(capsys, ["run", cells, "-o", out, "--config", config], 2)
    assert not out.exists()


def test_settings_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batch_key: donör\nhidden_dims: [32, 16]\n", encoding="utf-8")
    assert settings_from(path) == {"batch_key": "donör", "hidden_dims": [32, 16]}
    path.write_text("")
    assert settings_from(path) == {}
    path.write_text("learning_rate: 1e-3")
    assert settings_from(path) == {"learning_rate": 0.001}
    path.write_text("seed: " + "[" * 5000)
    with pytest.raises(ConfigError, match="not valid YAML"):
        settings_from(path)
    path.write_text("1: 2")
    with pytest.raises(ConfigError, match="expected lines"):
        settings_from(path)


def test_a_missing_settings_file(capsys, tmp_path, cells, out):
    assert "check the name after --config" in failed(
        capsys, ["run", cells, "-o", out, "--config", tmp_path / "no.yaml"], 3
    )


# ---- bad data


def test_files_that_are_not_there_or_something_else(capsys, tmp_path, out):
    assert "no such file" in failed(capsys, ["run", tmp_path / "no.h5ad", "-o", out], 3)
    assert "folder" in failed(capsys, ["info", tmp_path], 3)
    assert "pass the file or folder of the data" in failed(capsys, ["run", tmp_path, "-o", out], 3)
    (tmp_path / "text.h5ad").write_text("gene\tcount\n")
    assert "tab-separated table" in failed(capsys, ["run", tmp_path / "text.h5ad", "-o", out], 3)
    whole = saved(tmp_path).read_bytes()
    (tmp_path / "half.h5ad").write_bytes(whole[: len(whole) // 2])
    assert f"have {len(whole) // 2}, expected {len(whole)} bytes" in failed(
        capsys, ["run", tmp_path / "half.h5ad", "-o", out], 3
    )


def test_what_cannot_be_streamed_says_so(capsys, tmp_path, out):
    (tmp_path / "10x").mkdir()
    for name in ("matrix.mtx", "barcodes.tsv", "genes.tsv"):
        (tmp_path / "10x" / name).write_text("%%MatrixMarket matrix coordinate integer general\n")
    said = failed(capsys, ["run", tmp_path / "10x", "-o", out, "--stream"], 2)
    assert "--stream: a 10x_mtx file is read whole; leave the option out, or save it as .h5ad first" in said


def nan(counts):
    counts[3, 4] = np.nan
    return counts


@pytest.mark.parametrize(("change", "wanted"), [
    (nan, "1 values are NaN or infinite; the first is nan at cell 3 (cell3), gene 4 (gene4)"),
    (lambda x: x - 1, "are negative"),
    (lambda x: x + 0.5, "--allow-non-integer"),
    (np.log1p, 'layer="counts"'),
    (lambda x: x * 1e9, "above 2^31"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["--stream", "--in-memory"])
def test_values_that_are_no_counts(capsys, tmp_path, out, change, wanted, where):
    cells = saved(tmp_path, X=sparse.csr_matrix(change(toy_cells().X.toarray())))
    assert wanted in failed(capsys, ["run", cells, "-o", out, where], 3)


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["--batch-key", "donor"], "obs has no column 'donor'; it has batch, cell_type, one, depth"),
    (["--label-key", "type"], "obs has no column 'type'"),
    (["--label-key", "one"], "one class, 'same'"),
    (["--layer", "raw"], "layers has no 'raw'; there are none, or leave the layer out to use X"),
    (["--ambient-profile", "soup"], "var has no column 'soup'; it has ambient_profile"),
])  # fmt: skip
def test_names_that_are_not_there(capsys, cells, out, arguments, wanted):
    assert wanted in failed(capsys, ["run", cells, "-o", out, *arguments], 3)


def test_no_command_shows_the_help(capsys):
    assert run_command([]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("Usage: diffbio")
    assert "error" not in said.err.splitlines()[0]


def test_more_clusters_than_cells(capsys, cells, out):
    assert "n_clusters must be at most the number of cells, 120, got 121" in failed(
        capsys, ["run", cells, "-o", out, "--n-clusters", "121"], 2
    )


def test_gene_names_twice_and_batches_unknown(capsys, tmp_path, out):
    adata = toy_cells()
    adata.var_names = ["a", *adata.var_names[1:-1], "a"]
    adata.obs["batch"] = adata.obs["batch"].where(np.arange(120) > 2)
    with pytest.warns(UserWarning, match="not unique"):
        adata.copy()
    cells = write_results(adata, tmp_path / "twice.h5ad", {})
    assert "1 gene names occur more than once, such as 'a'" in failed(capsys, ["run", cells, "-o", out], 3)
    adata.var_names = [f"g{i}" for i in range(50)]
    cells = write_results(adata, tmp_path / "unknown.h5ad", {})
    assert "3 of 120 cells have no value" in failed(capsys, ["run", cells, "-o", out, "--batch-key", "batch"], 3)


def test_a_batch_for_every_cell(capsys, tmp_path, out):
    cells = saved(tmp_path, obs=toy_cells().obs.assign(cell=np.arange(120).astype(str)))
    said = failed(capsys, ["run", cells, "-o", out, "--batch-key", "cell"], 3)
    assert "obs['cell']: each of the 120 cells has a value of its own; name another column: batch, cell_type" in said


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_cells_or_no_genes(capsys, tmp_path, out, shape):
    cells = write_results(ad.AnnData(sparse.csr_matrix(shape, dtype="f4")), tmp_path / "empty.h5ad", {})
    assert "has no " + ("cells" if shape[0] == 0 else "genes") in failed(capsys, ["run", cells, "-o", out], 3)


@pytest.mark.parametrize("where", ["--stream", "--in-memory"])
def test_nothing_but_zeros(capsys, tmp_path, out, where):
    cells = saved(tmp_path, X=sparse.csr_matrix((120, 50), dtype="f4"))
    said = failed(capsys, ["run", cells, "-o", out, where], 3)
    assert "X: all 120 x 50 values are zero; pass the layer that holds the counts (--layer)" in said
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_an_ambient_profile_that_is_none(capsys, tmp_path, out):
    adata = toy_cells()
    adata.var["ambient_profile"] *= 2
    cells = write_results(adata, tmp_path / "soup.h5ad", {})
    assert "sums to 2, not 1" in failed(capsys, ["run", cells, "-o", out], 3)


def test_a_damaged_matrix_is_refused_wherever_it_lies(capsys, cells, out):
    with h5py.File(cells, "r+") as file:
        file["X/indices"][0] = 10_000
    for where in ("--stream", "--in-memory"):
        assert "damaged" in failed(capsys, ["run", cells, "-o", out, where], 3)


# ---- output


def test_the_output_is_checked_before_training(capsys, tmp_path, cells, out, monkeypatch):
    monkeypatch.setattr("diffbio.pipelines.run.analyse", lambda *a, **k: pytest.fail("trained before checking"))
    out.write_bytes(b"something")
    assert "exists" in failed(capsys, ["run", cells, "-o", out], 5)
    assert "is the input itself" in failed(capsys, ["run", cells, "-o", cells, "--force"], 5)
    assert "must end in .h5ad or .zarr" in failed(capsys, ["run", cells, "-o", tmp_path / "out.csv"], 5)
    assert "does not exist" in failed(capsys, ["run", cells, "-o", tmp_path / "no" / "out.h5ad"], 5)
    assert "cannot be made" in failed(capsys, ["run", cells, "-o", tmp_path / "o.h5ad", "--figures", out / "x"], 5)
    taken = ["run", cells, "-o", tmp_path / "o.h5ad", "--figures", out]
    assert "is a file; " in (said := failed(capsys, taken, 5))
    assert "choose another folder" in said
    (tmp_path / "report.html").write_text("mine")
    assert "exists" in failed(capsys, ["report", cells, "-o", tmp_path / "report.html"], 5)
    assert out.read_bytes() == b"something"


def test_one_run_at_a_time_writes_to_a_checkpoint(capsys, tmp_path, cells, out):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "out.h5ad.checkpoint"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    said = failed(capsys, ["run", cells, "-o", out], 5)
    assert f"is in use by another run; {folder}; wait for its end, or choose another output" in said
    assert folder.is_dir()
    os.close(other)
    assert "n_clusters must be" in failed(capsys, ["run", cells, "-o", out, "--n-clusters", "121"], 2)
    assert not folder.exists()


def test_a_report_needs_results(capsys, tmp_path, cells):
    said = failed(capsys, ["report", cells, "-o", tmp_path / "report.html"], 3)
    assert f"holds no results of diffbio; {cells}; first: diffbio run" in said
    assert not (tmp_path / "report.html").exists()


def test_the_demo_does_not_write_into_a_folder_with_other_things(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    assert "thesis.tex" in failed(capsys, ["demo", tmp_path], 5)


# ---- what goes wrong inside


@pytest.mark.parametrize(("error", "code", "wanted"), [
    (MemoryError("Unable to allocate 8 TiB"), 6, "--batch-size"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."), 6, "--batch-size"),
    (DeviceMemoryError("too large"), 6, "too large"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/out.h5ad"), 5, "/x/out.h5ad"),
    (TrainingDivergedError("lower learning_rate"), 7, "learning_rate"),
    (KeyError("a"), 1, "--debug"),
])  # fmt: skip
def test_errors_and_their_codes(error, code, wanted):
    found, message = explain(error)
    assert found == code
    assert wanted in message
    assert "\n" not in message


def test_an_internal_error_is_one_line_unless_debugged(capsys, cells, out, monkeypatch):
    def broken(*_args, **_settings):
        msg = "first line\nsecond line"
        raise AssertionError(msg)

    monkeypatch.setattr("diffbio.pipelines.run.analyse", broken)
    assert "internal error, AssertionError: first line second line" in failed(capsys, ["run", cells, "-o", out], 1)
    with pytest.raises(AssertionError):
        run_command(["run", str(cells), "-o", str(out), "--debug"])


# ---- info and doctor


def test_info(capsys, cells):
    assert run_command(["info", str(cells)]) == 0
    said = capsys.readouterr().out
    assert "h5ad, 120 cells x 50 genes" in said
    assert re.search(r"X: CSR, float32, on disk; counts, largest \d+", said)
    assert "obs/cell_type: 3 values: type 0 (40), type 1 (40), type 2 (40)" in said
    assert "obs/depth: float32" in said


def test_info_tells_what_is_no_counts(capsys, tmp_path):
    adata = toy_cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray())
    path = write_results(adata, tmp_path / "logged.zarr", {})
    assert run_command(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "X: dense, float32, on disk; not counts: the values look log-transformed" in said
    assert "layers/counts: CSR, float32, on disk; counts" in said


def test_doctor(capsys):
    assert run_command(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"diffbio {diffbio.__version__}, Python" in said
    assert "device: cpu" in said
    assert "MISSING" not in said


# ---- whole runs


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run with every stage, figures and report."""
    folder = tmp_path_factory.mktemp("whole")
    cells, out = saved(folder), folder / "out.h5ad"
    arguments = [
        "run",
        cells,
        "-o",
        out,
        "--batch-key",
        "batch",
        "--label-key",
        "cell_type",
        "--figures",
        folder / "f",
    ]
    assert run_command([*map(str, arguments), "--n-top-genes", "30", *FAST]) == 0
    return folder


def test_a_run_writes_every_result_and_leaves_the_rest_alone(whole_run):
    before, after = read(whole_run / "cells.h5ad"), read(whole_run / "out.h5ad")
    assert (before.X != after.X).nnz == 0
    pd.testing.assert_frame_equal(after.obs[before.obs.columns], before.obs)
    shapes = {key: value.shape for key, value in after.obsm.items()}
    assert shapes == {
        "X_diffbio_latent": (120, 64), "X_diffbio_harmony": (120, 64), "X_diffbio_umap": (120, 2),
        "diffbio_cluster_prob": (120, 3),
    }  # fmt: skip
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in after.obsm.values())
    assert list(after.obs["diffbio_cluster"].cat.categories) == ["0", "1", "2"]
    assert after.obs["diffbio_ambient_fraction"].between(0, 1).all()
    assert after.var["diffbio_highly_variable"].sum() == 30
    clean = after.layers["diffbio_decontaminated"]
    assert (clean - before.X).max() <= 1e-4
    assert not clean[:, ~after.var["diffbio_highly_variable"].to_numpy()].nnz
    assert not after.unwriteable()


def test_a_run_says_what_it_did(whole_run):
    record = read(whole_run / "out.h5ad").uns["diffbio"]["pipeline"]
    assert record["seed"] == 0
    assert record["device"] == "cpu"
    assert record["params"]["n_top_genes"] == 30
    assert record["params"]["n_clusters"] == 3
    assert len(record["input_sha256"]) == 64
    assert set(record["training"]) == set(np.asarray(record["history"]["stage"], str))
    assert record["training"]["vae"]["batch_size"] == 128
    assert record["input"] == "cells.h5ad"
    assert list(record["batches"]) == ["donor 0", "donor 1"]
    assert len(record["skipped"]) == len(record["unfitted"]) == 0
    assert set(record["scores"]) == {"ARI", "NMI"}
    assert set(record["history"]["stage"]) >= {"ambient", "vae", "umap"}
    assert not (whole_run / "out.h5ad.checkpoint").exists()


def test_a_run_draws(whole_run):
    names = {path.name for path in (whole_run / "f").iterdir()}
    assert names == {
        "umap_diffbio_cluster.png", "umap_batch.png", "umap_cell_type.png", "cluster_sizes.png", "ambient.png",
        "training.png", "report.html",
    }  # fmt: skip
    assert "Every stage ran, without a warning." in (whole_run / "f" / "report.html").read_text()


ONE_STAGE = (
    "enable_dim_reduction: false\nenable_ambient_removal: false\nenable_clustering: false\nlatent_dim: 4\n"
    "hidden_dims: [16]\nmax_epochs: 400\npatience: 400\n"
)


def test_a_streamed_run_without_most_stages_says_which(tmp_path, capsys):
    cells, out = saved(tmp_path), tmp_path / "out.zarr"
    (tmp_path / "run.yaml").write_text(ONE_STAGE)
    arguments = ["run", cells, "-o", out, "--config", tmp_path / "run.yaml", "--stream", "--normalized"]
    assert run_command([*map(str, arguments), "--epochs", "2"]) == 0
    said = capsys.readouterr()
    assert "vae: epoch 1/2, loss" in said.err
    assert "not run: batch correction (no batch key was given)" in said.out
    after = read(out)
    assert set(after.obsm) == {"X_diffbio_latent"}
    np.testing.assert_allclose(after.layers["diffbio_normalized"].sum(axis=1), 1, rtol=1e-4)
    assert list(after.uns["diffbio"]["pipeline"]["skipped"]) == [
        "batch correction: no batch key was given", "ambient removal: switched off", "UMAP: switched off",
        "clustering: switched off",
    ]  # fmt: skip


def test_other_methods_are_written_under_their_names(tmp_path, capsys):
    cells, out = saved(tmp_path), tmp_path / "out.h5ad"
    options = ["--batch-key", "batch", "--integration", "mmd", "--clustering", "communities", "--resolution", "0.8"]
    (tmp_path / "run.yaml").write_text("latent_dim: 6\nenable_ambient_removal: false\nenable_dim_reduction: false\n")
    arguments = ["run", cells, "-o", out, *options, "--epochs", "2", "--quiet", "--config", tmp_path / "run.yaml"]
    assert run_command(list(map(str, arguments))) == 0
    after = read(out)
    assert set(after.obsm) == {"X_diffbio_latent", "X_diffbio_mmd", "diffbio_cluster_prob"}
    n_found = after.obsm["diffbio_cluster_prob"].shape[1]
    assert f"{n_found} clusters" in capsys.readouterr().out
    assert after.uns["diffbio"]["pipeline"]["params"]["resolution"] == 0.8


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_what_is_odd_but_allowed_is_warned_of_and_analysed(tmp_path, capsys):
    adata = toy_cells()
    counts = adata.X.toarray()
    counts[[5, 60]] = counts[:, 7] = 0
    counts[1, 1], counts[2, 2] = 30.5, 2**24 + 2
    adata.X = sparse.csr_matrix(counts)
    adata.obs_names = ["twin", "twin", *adata.obs_names[2:]]
    adata.obs["batch"] = ["alone", *["others"] * 119]
    adata.obs["cell_type"] = ["rare", *["common"] * 119]
    cells = write_results(adata, tmp_path / "odd.h5ad", {})
    (tmp_path / "run.yaml").write_text(ONE_STAGE.replace("max_epochs: 400", "max_epochs: 1"))
    arguments = ["run", cells, "-o", tmp_path / "out.h5ad", "--config", tmp_path / "run.yaml", "--quiet"]
    arguments += ["--batch-key", "batch", "--label-key", "cell_type"]
    assert "--allow-non-integer" in failed(capsys, arguments, 3)
    assert run_command([*map(str, arguments), "--allow-non-integer"]) == 0
    said = capsys.readouterr().err
    for wanted in (
        "2 of 120 cells have no count", "1 of 50 genes have no count in any cell", "are not integers", "above 2^24",
        "1 cell names occur more than once, such as 'twin'; their order is kept",
        "1 of 2 batches have a single cell, such as 'alone'", "1 classes have a single cell, such as 'rare'",
    ):  # fmt: skip
        assert sum(line.startswith("warning: ") and wanted in line for line in said.splitlines()) == 1, (wanted, said)
    after = read(tmp_path / "out.h5ad")
    assert list(after.obs_names) == list(adata.obs_names)
    assert np.isfinite(after.obsm["X_diffbio_latent"]).all()
    assert np.isfinite(after.obsm["X_diffbio_harmony"]).all()


@pytest.mark.parametrize("shape", [(1, 50), (120, 1)])
def test_one_cell_or_one_gene_is_analysed(tmp_path, capsys, shape):
    adata = toy_cells()[: shape[0], : shape[1]].copy()
    cells = write_results(adata, tmp_path / "few.h5ad", {})
    (tmp_path / "run.yaml").write_text(ONE_STAGE.replace("max_epochs: 400", "max_epochs: 1"))
    arguments = ["run", cells, "-o", tmp_path / "out.h5ad", "--config", tmp_path / "run.yaml", "--quiet"]
    assert run_command([*map(str, arguments), "--force"]) == 0
    assert np.isfinite(read(tmp_path / "out.h5ad").obsm["X_diffbio_latent"]).all()


def hostile():
    """No home folder, no cache, an ASCII locale, warnings as errors; programs compiled as in the tests."""
    kept = {"PATH", "SYSTEMROOT", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"}
    env = {name: value for name, value in os.environ.items() if name in kept}
    return env | {
        "HOME": "/proc/no such home", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error",
        "NO_COLOR": "1", "TERM": "dumb", "PYTHONUTF8": "0",
    }  # fmt: skip


def stopped_by(number, arguments, folder, epoch):
    """Runs, sends a signal in the given epoch, and returns the exit code, the error and what went before."""
    with in_process(arguments, cwd=folder) as process:
        before = []
        for line in process.stderr:
            before.append(line)
            if f"epoch {epoch}/" in line:
                break
        process.send_signal(number)
        sent = time.monotonic()
        rest = process.stderr.read()
    assert time.monotonic() - sent < 10
    return process.returncode, next(line for line in rest.splitlines() if line.startswith("error: ")), "".join(before)


def test_stop_and_go_on_gives_what_an_undisturbed_run_gives(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "räume und leerzeichen"
    folder.mkdir()
    saved(folder)
    (folder / "run.yaml").write_text(ONE_STAGE)
    start = ["run", "cells.h5ad", "-o", "out.h5ad", "--config", "run.yaml"]
    monkeypatch.chdir(folder)
    said = failed(capsys, [*start, "--resume"], 4)
    assert "no checkpoint to go on from; out.h5ad.checkpoint; leave out --resume" in said
    code, message, _ = stopped_by(signal.SIGTERM, start, folder, 5)
    assert code == 143, message
    assert not (folder / "out.h5ad").exists()
    again = shlex.split(message.split("To go on: ")[1])
    assert again == ["diffbio", *start, "--resume"]
    # what differs is told, and only settings can be forced
    said = failed(capsys, [*again[1:], "--quiet", "--seed", "1"], 4)
    assert "settings differs" in said
    assert "{'seed': 0}, this run has {'seed': 1}" in said
    assert "--force" in said
    assert "data differs" in failed(capsys, [*again[1:], "--quiet", "--n-top-genes", "30", "--force"], 4)
    code, message, before = stopped_by(signal.SIGINT, again[1:], folder, 10)
    assert code == 130, message
    assert message.endswith("To go on: " + shlex.join(again))
    assert "epoch 5/" not in before
    resumed = in_process(again[1:], cwd=folder)
    errors = resumed.communicate()[1]
    assert resumed.returncode == 0, errors
    assert "epoch 10/" not in errors
    # undisturbed, in a hostile environment, to another place with figures
    whole = [*start[:3], "whole.h5ad", *start[4:], "--figures", "füguren", "--quiet"]
    other = in_process(whole, cwd=folder, env=hostile())
    said, errors = other.communicate()
    assert other.returncode == 0, errors
    assert errors == ""
    assert "wrote whole.h5ad" in said
    first, second = read(folder / "out.h5ad"), read(folder / "whole.h5ad")
    np.testing.assert_array_equal(first.obsm["X_diffbio_latent"], second.obsm["X_diffbio_latent"])
    assert {p.name for p in folder.iterdir()} == {
        "cells.h5ad",
        "out.h5ad",
        "run.yaml",
        "whole.h5ad",
        "füguren",
    }


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_outside_training_tells_how_to_go_on(capsys, tmp_path, cells, out, monkeypatch, error, code):
    (tmp_path / "run.yaml").write_text(ONE_STAGE.replace("max_epochs: 400", "max_epochs: 1"))

    def stopped(*args, **kwargs):
        raise error

    monkeypatch.setattr("diffbio.data.write.write_results", stopped)
    said = failed(capsys, ["run", cells, "-o", out, "--config", str(tmp_path / "run.yaml"), "--quiet"], code)
    assert "nothing was written. To go on: diffbio " in said
    assert any(tmp_path.glob("*.checkpoint/*/model.json"))


def test_after_divergence_other_settings_can_go_on(capsys, tmp_path, cells, out, monkeypatch):
    (tmp_path / "run.yaml").write_text(ONE_STAGE.replace("max_epochs: 400", "max_epochs: 1"))

    def diverged(*args, **kwargs):
        msg = "Lower learning_rate"
        raise TrainingDivergedError(msg)

    monkeypatch.setattr("diffbio.data.write.write_results", diverged)
    arguments = ["run", str(cells), "-o", str(out), "--config", str(tmp_path / "run.yaml"), "--quiet"]
    monkeypatch.setattr(sys, "argv", ["diffbio", *arguments])
    said = failed(capsys, arguments, 7)
    assert said.endswith(f"Lower learning_rate. To go on: diffbio {shlex.join(arguments)} --resume --force")
    assert any(tmp_path.glob("*.checkpoint/*/model.json"))


def test_a_reader_that_goes_away_is_no_error(cells):
    with in_process(["info", cells]) as process:
        process.stdout.close()  # before anything is printed
        assert process.stderr.read() == ""
    assert process.returncode == 0
