"""phate 2.0.0 on features in a .npz: t, Spearman correlation of embedded with potential distances, CPU seconds.

    benchmarks/envs/phate/bin/python benchmarks/peers/run_phate.py FEATURES.npz RESULT.json [seeds] [--dla OUT.npz]

On one thread: with OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1.

`--dla` also writes phate's own simulated tree of seed 37, 1200 x 100, on which stored references were made.
"""

import json
import sys
import time
import warnings

import numpy as np
import phate
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if "--dla" in sys.argv:
        tree, _ = phate.tree.gen_dla(n_dim=100, n_branch=8, branch_length=150, rand_multiplier=2, seed=37, sigma=4)
        np.savez_compressed(sys.argv[sys.argv.index("--dla") + 1], x=tree)
    x = np.load(sys.argv[1])["x"].astype(float)
    seeds = int(sys.argv[3]) if len(sys.argv) > 3 and sys.argv[3].isdigit() else 1
    found = {"t": [], "spearman": [], "cpu": []}
    for seed in range(seeds):
        start = time.process_time()
        op = phate.PHATE(verbose=0, random_state=seed, n_jobs=1)
        y = op.fit_transform(x)
        found["cpu"].append(round(time.process_time() - start, 1))
        found["t"].append(int(op.optimal_t))
        found["spearman"].append(round(float(spearmanr(pdist(op.embedding), pdist(op._calculate_potential()))[0]), 4))
    with open(sys.argv[2], "w") as file:
        json.dump({"phate": phate.__version__, "cells": len(x), **found}, file)
        file.write("\n")
