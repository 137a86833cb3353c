"""What scanpy's dpt and palantir give on 120 cells of a small tree, for tests that run without palantir.

    benchmarks/envs/palantir/bin/python benchmarks/peers/make_pseudotime_oracle.py tests/oracles/pseudotime.npz

Every cell is a waypoint of palantir, so that its random sampling has no part in the result.
"""

import contextlib
import io
import sys
import warnings

import anndata
import numpy as np
import palantir
import pandas as pd
import scanpy as sc

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    t, branch = rng.uniform(size=120), rng.integers(0, 2, 120)
    x = np.zeros((120, 6))
    x[:, 0] = 4 * np.minimum(t, 0.4)
    x[np.arange(120), 1 + branch] = 5 * np.maximum(t - 0.4, 0)
    x = (x + 0.12 * rng.normal(size=x.shape)).astype(np.float32)
    root = int(t.argmin())
    adata = anndata.AnnData(x)
    adata.obsm["X_pca"] = x
    sc.pp.neighbors(adata, n_neighbors=12, use_rep="X_pca")
    sc.tl.diffmap(adata, n_comps=8)
    adata.uns["iroot"] = root
    sc.tl.dpt(adata, n_dcs=8, n_branchings=1)
    names = [f"c{i}" for i in range(len(x))]
    with contextlib.redirect_stdout(io.StringIO()):
        maps = palantir.utils.run_diffusion_maps(pd.DataFrame(x.astype(float), index=names), n_components=8, knn=12)
        space = palantir.utils.determine_multiscale_space(maps)
        result = palantir.core.run_palantir(space, names[root], num_waypoints=3000, knn=12, n_jobs=1,
                                            terminal_states=[names[int(t.argmax())]])  # fmt: skip
    np.savez_compressed(
        sys.argv[1],
        x=x, t=t.astype(np.float32), branch=branch, root=root,
        dpt=adata.obs["dpt_pseudotime"].to_numpy(np.float32), groups=adata.obs["dpt_groups"].astype(int).to_numpy(),
        diffmap=adata.obsm["X_diffmap"], eigenvalues=adata.uns["diffmap_evals"],
        palantir=result.pseudotime.to_numpy(np.float32), palantir_eigenvalues=maps["EigenValues"].to_numpy(np.float32),
    )  # fmt: skip
    print("scanpy", sc.__version__, "cells", len(x))
