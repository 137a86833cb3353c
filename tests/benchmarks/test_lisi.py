"""The LISI of the benchmarks against the scores that the harmonypy repository stores."""

import importlib.util
from pathlib import Path

import h5py
import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "quality" / "lisi.py"


@pytest.mark.parametrize("label", ["label1", "label2"])
def test_lisi_equals_the_stored_scores(data_dir, label):
    spec = importlib.util.spec_from_file_location("lisi", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with h5py.File(data_dir / "lisi_reference.h5ad") as file:
        points, obs = file["X"][:], file["obs"]
        codes = obs[label]["codes"][:] if isinstance(obs[label], h5py.Group) else obs[label][:]
        wanted = obs[f"lisi_{label}"][:]
    np.testing.assert_allclose(module.lisi(points, codes), wanted, atol=1e-5)
