"""Runs where memory and disk end, in processes of their own."""

import json
import subprocess
import sys

import pytest
from toy_cells import toy_cells

from diffbio.data import write_results

ONE_STAGE = (
    "enable_dim_reduction: false\nenable_ambient_removal: false\nenable_clustering: false\nlatent_dim: 4\n"
    "hidden_dims: [{0}, {0}]\nmax_epochs: 1\n"
)

# Each step: what is done, the exit code, what was said, and what is in the folder afterwards.
PREAMBLE = """
import contextlib, io, json, os, resource, sys
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # each thread takes address space
from diffbio.cli import run_command
folder = Path(sys.argv[1])
def step(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = run_command(list(map(str, arguments)))
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    print(json.dumps([code, errors, files]), flush=True)
"""


def steps(code, folder, *, before=()):
    command = [*before, sys.executable, "-c", PREAMBLE + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path):
    write_results(toy_cells(), tmp_path / "cells.h5ad", {})
    (tmp_path / "small.yaml").write_text(ONE_STAGE.format(16))
    (tmp_path / "large.yaml").write_text(ONE_STAGE.format(6000))
    return tmp_path


MEMORY = """
def under(gigabytes, *arguments):
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9), resource.RLIM_INFINITY))
    step("run", folder / "cells.h5ad", "-o", folder / "out.h5ad", "--quiet", *arguments)
under(2.0, "--config", folder / "small.yaml")  # no room for the compiler, which would abort
under(4.0, "--config", folder / "large.yaml")  # known beforehand
under(8.0, "--config", folder / "small.yaml")
"""


def test_where_memory_ends(folder):
    inputs = {"cells.h5ad", "small.yaml", "large.yaml"}
    *refused, (code, errors, files) = steps(MEMORY, folder)
    for code_there, said, left in refused:
        assert code_there == 6, said
        assert len(said) == 1
        assert said[0].startswith("error: out of memory")
        assert "--batch-size" in said[0]
        assert set(left) - {"out.h5ad.checkpoint"} == inputs
    assert "training needs at least 2.7 GB" in refused[0][1][0]
    assert "training needs at least 4.5 GB (weights 1.7" in refused[1][1][0]
    assert (code, errors, set(files)) == (0, [], inputs | {"out.h5ad"})


DISK = """
import shutil
disk = folder / "disk"
common = ("run", folder / "cells.h5ad", "--config", folder / "small.yaml", "--quiet", "--force")
def fill(left):
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
        file.write(b"x" * (shutil.disk_usage(disk).free - left))
        file.flush()
def room():
    (disk / "filler").unlink()
step(*common, "-o", disk / "old.h5ad", "--checkpoint", disk / "checkpoint")
size = (folder / "cells.h5ad").stat().st_size
fill(0)
step(*common, "-o", disk / "new.h5ad")  # known beforehand
step(*common, "-o", folder / "new.h5ad", "--checkpoint", disk / "another")
step(*common, "-o", folder / "drawn.h5ad", "--checkpoint", folder / "kept", "--figures", disk / "figures")
step("report", folder / "drawn.h5ad", "-o", disk / "report.html")
room()
fill(size + 8192)
step(*common, "-o", disk / "old.h5ad", "--checkpoint", folder / "kept", "--resume")  # found out while writing
step(*common, "-o", disk / "new.zarr", "--checkpoint", folder / "kept", "--resume")
room()
step(*common, "-o", disk / "old.h5ad", "--checkpoint", disk / "checkpoint", "--resume")
import jax, jax.experimental.compilation_cache.compilation_cache as cache
fill(0)
jax.config.update("jax_compilation_cache_dir", str(disk))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
cache.reset_cache()
assert jax.jit(lambda x: 3 * x)(2.0) == 6  # JAX only warns
"""


def test_where_the_disk_ends(folder):
    (folder / "disk").mkdir()
    before = ["unshare", "-rm", "sh", "-c", 'd=$1; shift; mount -t tmpfs -o size=1m none "$d" && exec "$@"', "sh"]
    before.append(str(folder / "disk"))
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    first, *full, written, zarr, again = steps(DISK, folder, before=before)
    for code, errors, _ in (*full, written, zarr):
        assert code == 5, errors
        assert len(errors) == 1
        assert "internal" not in errors[0]
    assert first[:2] == again[:2] == [0, []]
    old = first[2]["disk/old.h5ad"]
    for _, (error,), files in (written, zarr):
        assert "no space left on the disk" in error
        assert "nothing was changed. To go on: diffbio " in error
        assert files["disk/old.h5ad"] == old
        assert not any(name.startswith(("disk/new", "disk/.")) for name in files)
    drawn = full[2]
    assert "The results are in" in drawn[1][0]
    assert "drawn.h5ad" in drawn[2]
