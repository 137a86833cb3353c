import json

import numpy as np
import pytest
from flax import nnx

from diffbio import storage
from diffbio.errors import ModelFileError
from diffbio.operators.normalization import LibrarySizeConfig, LibrarySizeNormalizer
from diffbio.report.models import described, model_info, models_in

WEIGHTS = {"w": np.arange(6, dtype=np.float32)}
TYPES = ["B", "CD4 T", "NK/T"]
ANNOTATOR = {
    "operator": "DifferentiableCellAnnotator", "config": {"n_genes": 3, "latent_dim": 4}, "fitted": [True],
    "diffbio_version": "0.1.0",
    "annotation": {
        "mode": "celltypist", "types": TYPES, "genes": ["CD3D", "GNLY", "MS4A1"], "n_cells": 2638,
        "labels_key": "cell_type", "reference": "ref.h5ad", "markers": [["MS4A1"], ["CD3D"], ["GNLY", "CD3D"]],
    },
}  # fmt: skip
SCANVI = {
    "kind": "model", "model": "SCANVI", "is_trained": True, "init_params": {"n_latent": 10},
    "registry": {
        "model": "SCANVI", "setup": {"labels_key": "kind", "unlabeled_category": "Unknown"},
        "var_names": ["a", "b"], "batches": ["x"], "labels": ["B", "T", "Unknown"], "categories": {},
    },
}  # fmt: skip
PIPELINE = {
    "operator": "SingleCellPipeline", "config": {"n_genes": 2}, "fitted": [True, False], "genes": ["a", "b"],
    "batches": ["x", "y"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Models of every kind, at several depths, among other things."""
    storage.save_folder(tmp_path / "pbmc", ANNOTATOR, WEIGHTS)
    storage.save_folder(tmp_path / "more" / "scanvi", SCANVI, WEIGHTS)
    storage.save_folder(tmp_path / "more" / "pipeline", PIPELINE, WEIGHTS)
    storage.save_folder(tmp_path / "one" / "two" / "three", PIPELINE, WEIGHTS)  # too deep
    storage.save_folder(tmp_path / "run" / "vae", {"kind": "checkpoint"}, WEIGHTS)
    (tmp_path / "cells.h5ad").write_bytes(b"no model")
    return tmp_path


def test_models_are_found_and_described(folder):
    found = {str(info.folder.relative_to(folder)): info for info in models_in(folder)}
    assert list(found) == ["more/pipeline", "more/scanvi", "pbmc"]
    pbmc = found["pbmc"]
    assert (pbmc.kind, pbmc.mode, pbmc.n_genes, pbmc.n_cells) == ("annotator", "celltypist", 3, 2638)
    assert pbmc.types == tuple(TYPES)
    assert pbmc.markers["NK/T"] == ("GNLY", "CD3D")
    assert (pbmc.labels_key, pbmc.reference, pbmc.version, pbmc.problem) == ("cell_type", "ref.h5ad", "0.1.0", None)
    assert pbmc.n_bytes == sum(file.stat().st_size for file in (folder / "pbmc").iterdir())
    scanvi = found["more/scanvi"]
    assert (scanvi.kind, scanvi.mode, scanvi.types, scanvi.n_genes) == ("SCANVI", "scanvi", ("B", "T"), 2)
    assert (scanvi.labels_key, scanvi.trained, scanvi.n_cells) == ("kind", True, None)
    pipeline = found["more/pipeline"]
    assert (pipeline.kind, pipeline.trained, pipeline.genes) == ("SingleCellPipeline", False, ("a", "b"))


def test_lines(folder):
    pipeline, scanvi, pbmc = described(folder)
    assert pipeline.startswith("more/pipeline: SingleCellPipeline, UNTRAINED; 2 genes; 0.0 MB")
    assert scanvi.startswith("more/scanvi: SCANVI; 2 types: B, T; 2 genes; 0.0 MB")
    wanted = "pbmc: annotator, mode celltypist; 3 types: B, CD4 T, NK/T; 3 genes; trained on 2,638 cells; 0.0 MB"
    assert pbmc == f"{wanted}; diffbio 0.1.0"
    detail = "\n".join(described(folder / "pbmc"))
    for line in (
        "trained on: 2,638 cells, labels of obs['cell_type'], of ref.h5ad", "genes: 3: CD3D, GNLY, MS4A1",
        "types: 3", "NK/T: GNLY, CD3D", "settings: n_genes=3, latent_dim=4",
    ):  # fmt: skip
        assert line in detail
    (only,) = described(folder / "run")
    assert only.startswith("no models of diffbio in")
    assert "is the checkpoint of a run" in next(described(folder / "run" / "vae"))


def test_what_operators_and_models_write_is_understood(tmp_path):
    op = LibrarySizeNormalizer(LibrarySizeConfig(), rngs=nnx.Rngs(0))
    info = model_info(op.save(tmp_path / "op"))
    assert (info.kind, info.problem, info.trained) == ("LibrarySizeNormalizer", None, True)


def test_damage_is_told_and_nothing_raised(folder):
    def spoil(name, change):
        storage.save_folder(folder / name, ANNOTATOR, WEIGHTS)
        change(folder / name)

    def edit(path):
        header = json.loads((path / "model.json").read_text())
        header["annotation"]["mode"] = "scanvi"
        (path / "model.json").write_text(json.dumps(header))

    def flip(path):
        content = bytearray((path / "weights.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "weights.safetensors").write_bytes(content)

    spoil("edited", edit)
    spoil("flipped", flip)
    spoil("cut", lambda path: (path / "weights.safetensors").unlink())
    spoil("nojson", lambda path: (path / "model.json").write_text("{" * 100_000))
    spoil("binary", lambda path: (path / "model.json").write_bytes(b"\xff\xfe\x00"))
    spoil("folder", lambda path: ((path / "model.json").unlink(), (path / "model.json").mkdir()))
    spoil("future", lambda path: (path / "model.json").write_text('{"sha256": {}, "format_version": 99}'))
    for name, odd in (("odd", {"annotation": []}), ("odder", {"registry": {"var_names": 3}}), ("empty", {})):
        storage.save_folder(folder / name, odd, WEIGHTS)
    found = {info.folder.name: info.problem for info in models_in(folder)}
    assert found["pbmc"] is None
    for name, said in {
        "edited": "damaged or was edited", "flipped": "sha256 differs", "cut": "missing", "nojson": "not readable JSON",
        "binary": "not readable JSON", "folder": "cannot be read", "future": "upgrade diffbio",
        "odd": "not that of a model", "odder": "not that of a model", "empty": "holds no operator",
    }.items():  # fmt: skip
        assert said in found[name], (name, found[name])
    lines = [line for line in described(folder) if "damaged" in line]
    assert len(lines) == 10
    assert next(described(folder / "cut")).startswith(f"{folder / 'cut'}: damaged: ")


def test_a_save_that_was_cut_off_leaves_the_old_model(folder):
    (folder / "pbmc").rename(folder / ".pbmc.old")
    found = {str(info.folder.relative_to(folder)): info.problem for info in models_in(folder)}
    assert found["pbmc"] is None
    assert model_info(folder / "pbmc").kind == "annotator"


def test_names_from_a_foreign_header_are_harmless(tmp_path):
    evil = {**ANNOTATOR, "annotation": {**ANNOTATOR["annotation"], "types": ["\x1b[2J", "x" * 9999], "mode": "\x07"}}
    storage.save_folder(tmp_path / "m", evil, WEIGHTS)
    for line in [*described(tmp_path), *described(tmp_path / "m")]:
        assert line.isprintable()
        assert len(line) < 3000


def test_no_such_folder(tmp_path):
    with pytest.raises(ModelFileError, match="no such folder"):
        models_in(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelFileError, match="is a file"):
        next(described(tmp_path / "file"))
