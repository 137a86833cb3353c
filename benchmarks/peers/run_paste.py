"""PASTE's problem by POT 0.9.7: fused Gromov-Wasserstein by conditional gradients with an exact inner solver.

    benchmarks/envs/ot/bin/python benchmarks/peers/run_paste.py PROBLEMS.npz PLANS.npz

For each NAME in PROBLEMS (NAME/M, NAME/C1, NAME/C2, NAME/alpha) writes NAME/plan and NAME/cpu.
"""

import sys
import time
import warnings

import numpy as np
import ot

warnings.filterwarnings("ignore")
given, found = np.load(sys.argv[1]), {}
for name in sorted({key.rpartition("/")[0] for key in given.files}):
    cost, left, right = (given[f"{name}/{part}"] for part in ("M", "C1", "C2"))
    alpha = float(given[f"{name}/alpha"])
    p, q = (np.full(size, 1 / size) for size in cost.shape)
    begun = time.process_time()
    if alpha == 0:
        plan = ot.emd(p, q, cost, numItermax=1_000_000)
    else:
        plan = ot.gromov.fused_gromov_wasserstein(
            cost, left, right, p, q, alpha=alpha, loss_fun="square_loss", max_iter=200, tol_rel=1e-9, tol_abs=1e-9
        )
    found[f"{name}/plan"], found[f"{name}/cpu"] = plan.astype(np.float32), time.process_time() - begun
np.savez_compressed(sys.argv[2], **found)
