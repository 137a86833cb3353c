"""Transport plans of POT 0.9.7, wot 1.0.8 and moscot 0.5.2, of one problem in a .npz.

    benchmarks/envs/ot/bin/python benchmarks/peers/run_ot.py PROBLEM.npz PLANS.npz

Reads `cost` (over its median), `log` (log-normalised cells of both days x genes), `pca` (30 components of them),
`scaled` (log-normalised of unit variance) and `early` (which cells are of the earlier day). Each plan is (early, late).
"""

import sys
import time
import warnings

import anndata
import numpy as np
import ot

EPSILON, LAMBDA1, LAMBDA2 = 0.05, 1.0, 50.0


def by_wot(values, early, **settings):
    import wot

    adata = anndata.AnnData(values.astype(np.float64))
    adata.obs["day"] = np.where(early, 4.0, 6.0)
    model = wot.ot.OTModel(adata, day_field="day", epsilon=EPSILON, lambda1=LAMBDA1, lambda2=LAMBDA2, **settings)
    return np.asarray(model.compute_transport_map(4.0, 6.0).X)


def by_moscot(pca, early):
    from moscot.problems.time import TemporalProblem

    adata = anndata.AnnData(pca)
    adata.obsm["X_pca"] = pca
    adata.obs["day"] = np.where(early, 4.0, 6.0)
    problem = TemporalProblem(adata).prepare(time_key="day", joint_attr="X_pca")
    problem = problem.solve(epsilon=EPSILON, tau_a=LAMBDA1 / (LAMBDA1 + EPSILON), tau_b=LAMBDA2 / (LAMBDA2 + EPSILON))
    return np.asarray(problem[next(iter(problem.solutions))].solution.transport_matrix)


def by_pot(cost):
    n, m = cost.shape
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    return ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, EPSILON, [LAMBDA1, LAMBDA2], method="sinkhorn_stabilized", numItermax=20000, stopThr=1e-14
    )


def by_pot_held(cost):
    n, m = cost.shape
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    return ot.sinkhorn(a, b, cost, EPSILON, method="sinkhorn_log", numItermax=20000, stopThr=1e-12)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    given = dict(np.load(sys.argv[1]))
    early = given["early"].astype(bool)
    peers = {
        "pot_unbalanced": lambda: by_pot(given["cost"]),
        "pot_balanced": lambda: by_pot_held(given["cost"]),
        "wot": lambda: by_wot(given["log"], early, local_pca=0),
        "wot_as_ours": lambda: by_wot(given["scaled"], early, local_pca=30, growth_iters=3),
        "moscot": lambda: by_moscot(given["pca"], early),
    }
    found = {}
    for name, run in peers.items():
        begun = time.process_time()
        found[name] = run()
        print(f"{name}: {time.process_time() - begun:.1f} CPU s", flush=True)
    np.savez_compressed(sys.argv[2], **found)
