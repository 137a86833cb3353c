"""Correct one embedding with harmonypy; runs in the ``scib`` environment, started by ``quality/harmony.py``.

    benchmarks/envs/scib/bin/python -m benchmarks.peers.run_harmonypy IN.npz OUT.npz [classic]

IN holds ``x`` (cells, features) and ``batch``; OUT gets ``z`` and ``cpu_s``. ``classic`` are the settings of
the publication (lambda 1, 20 rounds of k-means); without it harmonypy 2's own defaults.
"""

import sys
import time
from importlib.metadata import version

import harmonypy
import numpy as np
import pandas as pd

CLASSIC = {"lamb": 1, "max_iter_kmeans": 20, "epsilon_cluster": 1e-5, "epsilon_harmony": 1e-4}

if __name__ == "__main__":
    source, target, *mode = sys.argv[1:]
    data = np.load(source)
    batch = pd.DataFrame({"batch": data["batch"].astype(str)})
    settings = CLASSIC if mode else {}
    start = time.process_time()
    found = harmonypy.run_harmony(
        data["x"], batch, ["batch"], random_state=0, verbose=False, ncores=1, **settings
    )
    cpu_s = time.process_time() - start
    z = np.asarray(found.Z_corr, dtype=np.float32)
    z = z if z.shape == data["x"].shape else z.T
    np.savez(target, z=z, cpu_s=cpu_s, version=version("harmonypy"))
