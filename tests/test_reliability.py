"""What must hold when things go wrong, in ways that no one module answers for."""

import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from toy import Toy, ToyConfig
from toy_cells import toy_cells

import diffbio
from diffbio.data import write_results
from diffbio.errors import TrainingDivergedError

CELLS = np.random.default_rng(0).poisson(2.0, (60, 6)).astype(np.float32)


def trained(**settings):
    model = Toy(ToyConfig(), rngs=nnx.Rngs(0))
    diffbio.fit(model, {"counts": CELLS}, progress=False, **settings)
    return {k: np.asarray(v[...]) for k, v in model.saved_state().items() if "rngs" not in k}


def test_after_a_diverged_run_the_last_good_checkpoint_goes_on(tmp_path, monkeypatch):
    whole = trained(max_epochs=5)
    trained(max_epochs=2, checkpoint=tmp_path / "a")
    objective = Toy.objective
    monkeypatch.setattr(Toy, "objective", lambda *a, **k: (objective(*a, **k)[0] * np.nan, objective(*a, **k)[1]))
    with pytest.raises(TrainingDivergedError, match=r"last good checkpoint is .*a\. Lower learning_rate") as caught:
        trained(max_epochs=5, checkpoint=tmp_path / "a", resume=True)
    assert caught.value.exit_code == 7
    monkeypatch.undo()
    again = trained(max_epochs=5, checkpoint=tmp_path / "a", resume=True)
    for key, value in whole.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


# Writes 1, 2, 3 ... to a place until it is killed; the imports are paid once, by the process that forks.
WRITERS = """
import os, signal, sys, time
import numpy as np
kind, path, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "model":
    from diffbio.storage import load_folder, save_folder
    def write(i):
        save_folder(path, {"step": i}, {"a": np.full(50_000, i)})
    def look():
        header, arrays = load_folder(path)
        return {header["step"], *arrays["a"]}
else:
    import h5py
    from diffbio.data import write_results
    source = sys.argv[4]
    def write(i):
        write_results(source, path, {"latent": np.full((120, 300), float(i))}, overwrite=True)
    def look():
        with h5py.File(path) as file:
            return set(file["obsm/X_diffbio_latent"][:].ravel())
write(0)
begun = time.perf_counter()
write(0)
one = time.perf_counter() - begun  # a slow or busy machine gets more time for each
rng = np.random.default_rng(0)
seen = []
for _ in range(kills):
    child = os.fork()
    if not child:
        i = int(max(seen, default=0))
        while True:
            i += 1
            write(i)
    time.sleep(rng.uniform(0.0, 6 * one))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    values = look()
    assert len(values) == 1, values
    seen += values
assert seen == sorted(seen)
write(-1)
print(int(seen[-1]))
"""


@pytest.mark.parametrize("kind", ["model", "cells"])
def test_killed_at_any_moment_a_place_holds_the_old_or_the_new(tmp_path, kind):
    write_results(toy_cells(), tmp_path / "cells.h5ad", {})
    place = tmp_path / ("model" if kind == "model" else "out.h5ad")
    command = [sys.executable, "-c", WRITERS, kind, str(place), "25", str(tmp_path / "cells.h5ad")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 5
    # and nothing of the killed ones is left after the next write
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"cells.h5ad", place.name})
