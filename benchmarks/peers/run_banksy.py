"""pybanksy 1.3.5 on standardised expression in a .npz: its matrix at lambda, 20 components, Gaussian mixtures.

    benchmarks/envs/banksy/bin/python benchmarks/peers/run_banksy.py IN.npz OUT.npz

IN has x (cells, genes), places (cells, 2), n_domains, seeds. 18 neighbours, Gaussian decay, azimuthal harmonics up to
order 1, lambda 0.8: as BANKSY's own settings for domains, and as of the stored figure.
"""

import contextlib
import io
import sys
import time
import warnings

import anndata as ad
import numpy as np
import scipy.sparse as sp
from banksy.embed_banksy import generate_banksy_matrix
from banksy.initialize_banksy import initialize_banksy
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    given = np.load(sys.argv[1])
    adata = ad.AnnData(given["x"].astype(np.float32))
    adata.obs["xc"], adata.obs["yc"] = given["places"].T
    adata.obsm["coord_xy"] = given["places"]
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        found = initialize_banksy(
            adata, ("xc", "yc", "coord_xy"), 18, nbr_weight_decay="scaled_gaussian", max_m=1,
            plt_edge_hist=False, plt_nbr_weights=False, plt_agf_angles=False,
        )  # fmt: skip
        _, matrix = generate_banksy_matrix(adata, found, [0.8], 1)
    z = matrix.X.todense() if sp.issparse(matrix.X) else matrix.X
    z = PCA(20, random_state=0).fit_transform(np.nan_to_num(np.asarray(z)))
    n_domains, seeds = int(given["n_domains"]), range(int(given["seeds"]))
    mixtures = [GaussianMixture(n_domains, covariance_type="full", random_state=s, reg_covar=1e-3) for s in seeds]
    labels = [mixture.fit_predict(z) for mixture in mixtures]
    np.savez(sys.argv[2], labels=np.array(labels), cpu=time.process_time() - start)
