"""What a killed process left beside its output goes at the next run; what a living one is writing stays."""

import os
import subprocess
import sys

import numpy as np
import pytest
from toy_cells import toy_cells

from diffbio import scratch, storage
from diffbio.data import check_output, write_results
from diffbio.pipelines.stages import forget
from diffbio.report.figures import write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from diffbio.scratch import ASIDE, scratch_beside
for place in map(Path, sys.argv[1:]):
    left = scratch_beside(place)
    if place.suffix in (".h5ad", ".html"):
        left.write_text("half")
    else:
        left.mkdir()
        (left / "zarr.json").write_text("half")
    if place.name == "aside.zarr":
        left.rename(left.with_name(left.name + ASIDE))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    (folder / "checkpoint").mkdir()
    names = ["out.h5ad", "out.zarr", "report.html", "aside.zarr", "checkpoint/vae"]
    command = [sys.executable, "-c", KILLED, *(str(folder / name) for name in names)]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(hidden(folder)) == 4
    assert len(hidden(folder / "checkpoint")) == 1
    return folder


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_next_run_removes_what_a_killed_one_left(killed):
    write_results(toy_cells(), killed / "out.h5ad", {})
    write_results(toy_cells(), killed / "out.zarr", {})
    write_whole(killed / "report.html", b"whole")
    assert len(hidden(killed)) == 1  # the one of aside.zarr
    storage.save_folder(killed / "checkpoint" / "vae", {}, {"a": np.zeros(3)})
    assert hidden(killed / "checkpoint") == []


def test_a_folder_put_aside_comes_back(killed):
    check_output(killed / "aside.zarr", True)
    assert (killed / "aside.zarr" / "zarr.json").read_text() == "half"
    assert hidden(killed) == []


def test_a_checkpoint_is_forgotten_with_what_is_stale_in_it(tmp_path, monkeypatch):
    folder = tmp_path / "out.h5ad.checkpoint"
    storage.save_folder(folder / "vae", {"kind": "checkpoint"}, {"a": np.zeros(3)})
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # above any process number
    scratch.scratch_beside(folder / "joint1").mkdir()
    monkeypatch.undo()
    forget(folder)
    assert not folder.exists()


def test_others_keep_theirs(tmp_path, monkeypatch):
    place = tmp_path / "out.h5ad"
    mine = scratch.scratch_beside(place)
    other = scratch.scratch_beside(tmp_path / "other.out.h5ad")
    monkeypatch.setattr(scratch, "_machine", lambda: "0123abcd")
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    foreign = scratch.scratch_beside(place)
    monkeypatch.undo()
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
    somebodys = scratch.scratch_beside(place)
    unlike = tmp_path / ".out.h5ad.tmp"
    kept = [mine, other, foreign, somebodys, unlike]
    for path in kept:
        path.touch()
    scratch.scratch_beside(place)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
