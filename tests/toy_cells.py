"""A small AnnData that has everything the AnnData functions read."""

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


def toy_cells(n_cells=120, n_genes=50, *, n_types=3, n_batches=2, seed=0):
    """Negative-binomial counts of a few types in a few batches, with a soup in var["ambient_profile"]."""
    rng = np.random.default_rng(seed)
    kind, batch = np.arange(n_cells) % n_types, rng.integers(n_batches, size=n_cells)
    level = rng.normal(0.0, 1.0, n_genes)
    mean = np.exp(level + 1.5 * rng.normal(size=(n_types, n_genes))[kind])
    mean *= np.exp(0.3 * rng.normal(size=(n_batches, n_genes)))[batch]
    counts = rng.poisson(mean * rng.standard_gamma(3.0, mean.shape) / 3.0).astype(np.float32)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical([f"donor {b}" for b in batch]),
            "cell_type": pd.Categorical([f"type {k}" for k in kind]),
            "one": pd.Categorical(["same"] * n_cells),
            "depth": counts.sum(axis=1),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)])
    var["ambient_profile"] = counts.sum(axis=0) / counts.sum()
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
