"""A small process that divides: cells of known time and branch, with spliced and unspliced counts."""

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

N_GENES, FORK = 60, 0.4


def branching_cells(n=240, seed=0):
    """AnnData with counts, layers `spliced` and `unspliced`, obs `cell_type`, `day`, `time`, `branch`."""
    rng = np.random.default_rng(seed)
    time, branch = np.sort(rng.uniform(0, 1, n)), rng.integers(0, 2, n)
    late = np.maximum(time - FORK, 0)[:, None] / (1 - FORK)
    start, strength = rng.uniform(0.5, 1.5, N_GENES), rng.uniform(2, 5, N_GENES)
    kind = np.arange(N_GENES) % 3  # fades with time, rises in branch 0, rises in branch 1
    falls, rises = kind == 0, (kind[None] - 1 == branch[:, None]) & (kind > 0)
    mature = start + strength * np.where(falls, 1 - time[:, None], rises * late)
    change = strength * np.where(falls, -1.0, rises * (late > 0) / (1 - FORK))
    nascent = np.maximum(0.3 * mature + 0.15 * change, 0.02)
    spliced, unspliced = rng.poisson(4 * mature), rng.poisson(4 * nascent)
    names = np.array(["early", "middle", "late A", "late B"])
    stage = np.where(time < 0.25, 0, np.where(time < 0.75, 1, 2 + branch))
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(names[stage]), "day": np.floor(3 * time), "time": time, "branch": branch},
        index=[f"cell{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    counts = sparse.csr_matrix(spliced.astype(np.float32))
    layers = {"spliced": counts.copy(), "unspliced": sparse.csr_matrix(unspliced.astype(np.float32))}
    return anndata.AnnData(counts, obs=obs, var=var, layers=layers)
