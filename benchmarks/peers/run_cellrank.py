"""CellRank 2.3.3 on cells and terminal states in a .npz: chains, fate probabilities, macrostates, CPU seconds.

    benchmarks/envs/cellrank/bin/python benchmarks/peers/run_cellrank.py INPUT.npz OUTPUT.npz

INPUT holds `points` (cells, features), of which scanpy makes its graph of 15 neighbours, or the graph itself as `data`,
`indices`, `indptr` (CSR); `pseudotime` (cells,); `terminal` (cells,), a number or -1; `kernels`, of "connectivity",
"hard", "soft"; `tol` of GMRES, 0 for CellRank's default; `macrostates`, how many are looked for, 0 for none.

OUTPUT holds for every kernel K: K_fates, K_chain_data, K_chain_indices, K_chain_indptr, K_seconds (kernel, fates),
and with macrostates K_memberships, K_coarse, K_crispness, K_macro_seconds. PETSc and SLEPc are not used. On one
thread: with OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1.
"""

import sys
import time
import warnings

import anndata
import cellrank as cr
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp


def cells_of(given):
    """AnnData with the graph, and no genes."""
    n = len(given["terminal"])
    adata = anndata.AnnData(np.zeros((n, 1), np.float32))
    adata.obs["time"] = given["pseudotime"].astype(float)
    if "points" in given:
        adata.obsm["X_given"] = given["points"]
        sc.pp.neighbors(adata, n_neighbors=15, use_rep="X_given", random_state=0)
    else:
        adata.obsp["connectivities"] = sp.csr_matrix((given["data"], given["indices"], given["indptr"]), shape=(n, n))
        adata.obsp["distances"] = adata.obsp["connectivities"]
        adata.uns["neighbors"] = {
            "connectivities_key": "connectivities",
            "distances_key": "distances",
            "params": {"n_neighbors": 15, "method": "umap"},
        }
    return adata


def kernel_of(adata, name):
    """The kernel with its transition matrix."""
    if name == "connectivity":
        return cr.kernels.ConnectivityKernel(adata).compute_transition_matrix()
    kernel = cr.kernels.PseudotimeKernel(adata, time_key="time")
    return kernel.compute_transition_matrix(threshold_scheme=name, show_progress_bar=False, n_jobs=1)


def fates_of(estimator, terminal, names, tol):
    """Fate probabilities, columns in order of the numbers."""
    labels = pd.Series(np.nan, index=names, dtype=object)
    held = terminal >= 0
    labels.iloc[np.flatnonzero(held)] = [f"s{code}" for code in terminal[held]]
    estimator.set_terminal_states(labels.astype("category"))
    settings = {"tol": float(tol)} if tol else {}
    estimator.compute_fate_probabilities(solver="gmres", use_petsc=False, show_progress_bar=False, n_jobs=1, **settings)
    found = estimator.fate_probabilities
    return np.asarray(found[[f"s{code}" for code in np.unique(terminal[held])]].X)


def main():
    """Runs what the input asks for."""
    given = dict(np.load(sys.argv[1]))
    adata = cells_of(given)
    out = {}
    for name in map(str, given["kernels"]):
        start = time.process_time()
        kernel = kernel_of(adata, name)
        middle = time.process_time()
        estimator = cr.estimators.GPCCA(kernel)
        out[f"{name}_fates"] = fates_of(estimator, given["terminal"], adata.obs_names, given["tol"])
        out[f"{name}_seconds"] = np.array([middle - start, time.process_time() - middle])
        chain = sp.csr_matrix(kernel.transition_matrix)
        out |= {f"{name}_chain_{part}": getattr(chain, part) for part in ("data", "indices", "indptr")}
        n_states = int(given["macrostates"])
        if n_states:
            start = time.process_time()
            estimator = cr.estimators.GPCCA(kernel)
            estimator.compute_schur(n_components=n_states + 1, method="brandts")
            estimator.compute_macrostates(n_states=n_states)
            out[f"{name}_macro_seconds"] = np.array(time.process_time() - start)
            out[f"{name}_memberships"] = np.asarray(estimator.macrostates_memberships.X)
            out[f"{name}_coarse"] = estimator.coarse_T.to_numpy()
            out[f"{name}_crispness"] = np.array(estimator._gpcca.crispness_values[-1])
    np.savez(sys.argv[2], version=cr.__version__, **out)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
