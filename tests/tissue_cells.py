"""Two slices of a layered tissue: coordinates, layers, types, conditions, an order, ligands, regulators."""

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

N_GENES, N_REGULATORS, LAYERS = 60, 4, 3


def tissue_cells(n=240, seed=0):
    """AnnData with counts, obsm `spatial`, obs `slice`, `layer`, `cell_type`, `condition`, `diffbio_pseudotime`.

    The second slice is turned by 0.5 rad and shifted. Genes 0 to 3 regulate the ten genes that follow each of them;
    LIG is expressed by type A, REC by type B. Under "treated" the genes IFN0 to IFN2 rise.
    """
    rng = np.random.default_rng(seed)
    where, number = rng.uniform(0, 10, (n, 2)), np.arange(n) % 2
    layer = np.minimum((where[:, 0] / 10 * LAYERS).astype(int), LAYERS - 1)
    order = np.clip(where[:, 0] / 10 + rng.normal(0, 0.05, n), 0, 1)
    kind, treated = rng.integers(0, 2, n), rng.integers(0, 2, n)
    rates = np.exp(rng.normal(0, 0.7, (LAYERS, N_GENES)))[layer]
    activity = rng.gamma(2.0, 1.0, (n, N_REGULATORS))
    rates[:, :N_REGULATORS] = 3 * activity
    for regulator in range(N_REGULATORS):
        first = N_REGULATORS + 10 * regulator
        rates[:, first : first + 10] += 3 * activity[:, [regulator]]
    special = {"LIG": 6 * (kind == 0), "REC": 6 * (kind == 1), "SWITCH": 8 / (1 + np.exp(-20 * (order - 0.5)))}
    special |= {f"IFN{i}": 1 + 6 * treated for i in range(3)}
    names = [f"gene{i}" for i in range(N_GENES - len(special))] + list(special)
    rates[:, N_GENES - len(special) :] = np.column_stack(list(special.values())) + 0.1
    angle = 0.5 * number
    turned = np.column_stack([
        np.cos(angle) * where[:, 0] - np.sin(angle) * where[:, 1],
        np.sin(angle) * where[:, 0] + np.cos(angle) * where[:, 1],
    ])  # fmt: skip
    obs = pd.DataFrame(
        {
            "slice": pd.Categorical(np.array(["one", "two"])[number]),
            "layer": pd.Categorical(layer.astype(str)),
            "cell_type": pd.Categorical(np.array(["A", "B"])[kind]),
            "condition": pd.Categorical(np.array(["control", "treated"])[treated]),
            "diffbio_pseudotime": order,
        },
        index=[f"spot{i}" for i in range(n)],
    )
    counts = sparse.csr_matrix(rng.poisson(rates).astype(np.float32))
    cells = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=names))
    cells.obsm["spatial"] = turned + 3.0 * number[:, None]
    return cells
