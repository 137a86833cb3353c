"""Model folders that are damaged, foreign, or from the future."""

import json
import pickle

import numpy as np
import pytest
from flax import nnx
from toy import Toy, ToyConfig

from diffbio import storage
from diffbio.errors import ModelFileError, OutputError
from diffbio.operators.base import Operator


@pytest.fixture
def folder(tmp_path):
    return Toy(ToyConfig(), rngs=nnx.Rngs(0)).save(tmp_path / "model")


def refused(folder, match):
    with pytest.raises(ModelFileError, match=match):
        Toy.load(folder)


def edited(folder, change):
    header = json.loads((folder / "model.json").read_text())
    header["sha256"].pop("model.json", None)  # so that what was changed is what is found
    change(header)
    (folder / "model.json").write_text(json.dumps(header))


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_no_flipped_bit_goes_unseen(folder, name):
    whole = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 60, replace=False):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(broken)
        try:
            found = Toy.load(folder)
        except ModelFileError:
            continue
        # what json reads as the same (the blank of an indent, say) is no damage
        assert found.config == ToyConfig()
        assert name == "model.json"
        assert json.loads(broken) == json.loads(whole)


def test_files_that_are_missing_or_too_many(folder):
    (folder / "notes.txt").write_text("mine")
    refused(folder, r"unexpected \['notes.txt'\]")
    (folder / "notes.txt").unlink()
    (folder / "weights.safetensors").unlink()
    refused(folder, r"missing \['weights.safetensors'\]")
    refused(folder / "nothing", "no model folder")


def test_headers_that_are_none(folder):
    edited(folder, lambda header: header.update(format_version=2))
    refused(folder, "upgrade diffbio")
    edited(folder, lambda header: header.update(format_version="1; import os"))
    refused(folder, "upgrade diffbio")
    (folder / "model.json").write_text("[" * 100_000)
    refused(folder, "not readable JSON")
    (folder / "model.json").write_text("[]")
    refused(folder, "not the header")
    (folder / "model.json").write_text('{"sha256": {"../../etc/passwd": ""}, "format_version": 1}')
    refused(folder, "sha256 differs")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda header: header.update(operator="../../x"), "holds '../../x', not a Toy"),
        (lambda header: header["config"].update(n_genes=7), "has shape"),
        (lambda header: header["config"].update(n_genes="many"), "do not fit Toy"),
        (lambda header: header["config"].update(path="/etc"), "do not fit Toy"),
        (lambda header: header.pop("config"), "do not fit Toy"),
    ],
)
def test_settings_that_do_not_fit(folder, change, match):
    edited(folder, change)
    refused(folder, match)


@pytest.mark.parametrize("suffix", ["pkl", "pt", "joblib"])
def test_pickles_are_not_opened(tmp_path, suffix):
    fired = tmp_path / "fired"

    class Canary:
        def __reduce__(self):
            return fired.touch, ()

    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(Canary()))
    with pytest.raises(ModelFileError, match="diffbio never unpickles"):
        Operator.load(path)
    assert not fired.exists()


def test_a_folder_is_whole_after_a_kill_between_the_renames(folder):
    folder.rename(folder.with_name(f".{folder.name}.old"))
    assert storage.exists(folder)
    assert Toy.load(folder).config == ToyConfig()


def test_what_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in ("mine", "link", "mine/thesis.txt"):
        with pytest.raises(OutputError, match="not a diffbio model folder"):
            Toy(ToyConfig(), rngs=nnx.Rngs(0)).save(tmp_path / place)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
