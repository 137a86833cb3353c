"""Real cells, damaged and thinned: all shallow, a quarter of them dying or droplets with next to no cell in them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from benchmarks.quality.integration_data import data_dir

DEPTH = 330  # median molecules of a cell after thinning: about 15 % of those of pbmc3k
DAMAGED, EMPTY = 0.25, 0.5  # share of the cells that are damaged; of those, that are near-empty droplets
LEAKED = 0.1  # of a dying cell's molecules of the nucleus and cytoplasm that stay
LEFT = 0.05  # of the cell's own molecules in a near-empty droplet
SOUP = (0.05, 0.35)  # molecules of the soup in such a droplet, of the median cell's
FEWEST = 20  # cells that hold a gene, for it to be looked at
FEWEST_OF_TYPE = 30  # of the file: recall of fewer than 15 unseen cells is mostly chance (14 platelets of pbmc3k)
INTACT, DYING, DROPLET = 0, 1, 2


class Cells(NamedTuple):
    """Counts (cells, genes) of some cells, totals over all genes, their types, and what was done to each."""

    counts: np.ndarray
    totals: dict[str, np.ndarray]  # library_size, detected_genes, mitochondrial_share
    types: np.ndarray
    state: np.ndarray  # INTACT, DYING or DROPLET


class Damaged(NamedTuple):
    """A data set in two halves."""

    seen: Cells
    unseen: Cells
    genes: np.ndarray


def damaged(name: str, seed: int, half: int = 0, *, n_genes: int = 2000) -> Damaged:
    """The cells of `name` after the damage, in random halves; the most expressed genes of the seen half.

    half: which of the two halves is seen, 0 or 1. Damage and halves do not depend on it.
    Thinning is binomial. A dying cell keeps all molecules of the mitochondria and LEAKED of the others. A near-empty
    droplet holds LEFT of its cell and for the rest molecules drawn from the soup: the file's measured ambient profile,
    else the mean of all cells; its label is that of its cell, as where types come from hashtags or sorting.
    With both it has 0.1 to 0.4 of a median cell's molecules: fewer than a cell, as such droplets do.
    """
    import anndata
    from scipy import sparse

    adata = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    number = adata.obs["cell_type"].value_counts()
    often = [name for name in number.index[number >= FEWEST_OF_TYPE] if name != "NA"]
    adata = adata[adata.obs["cell_type"].isin(often).to_numpy()]
    counts: Any = sparse.csr_matrix(cast(Any, adata.X))
    mitochondrial = np.asarray(adata.var_names.str.startswith("MT-"))
    if "ambient_profile" in adata.var:
        profile = adata.var["ambient_profile"].to_numpy(float)
    else:
        profile = np.asarray(counts.sum(axis=0), float).ravel()
    types = np.unique(adata.obs["cell_type"].astype(str).to_numpy(), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    share = DEPTH / float(np.median(np.asarray(counts.sum(axis=1))))
    cells = counts.toarray().astype(int)
    state = rng.choice(3, len(cells), p=[1 - DAMAGED, DAMAGED * (1 - EMPTY), DAMAGED * EMPTY])
    kept = np.full(cells.shape, share)
    kept[np.ix_(state == DYING, ~mitochondrial)] *= LEAKED
    kept[state == DROPLET] *= LEFT
    cells = rng.binomial(cells, kept)
    for row in np.flatnonzero(state == DROPLET):
        cells[row] += rng.multinomial(round(DEPTH * rng.uniform(*SOUP)), profile / profile.sum())
    halves = np.array_split(rng.permutation(len(cells)), 2)
    halves = halves[::-1] if half else halves
    seen = cells[halves[0]]
    held = (seen > 0).sum(axis=0) >= FEWEST
    chosen = np.sort(np.argsort(-seen.sum(axis=0) * held, kind="stable")[:n_genes])
    first, second = (Cells(cells[h][:, chosen].astype(np.float32), totals(cells[h], mitochondrial), types[h], state[h])
                     for h in halves)  # fmt: skip
    return Damaged(first, second, np.asarray(adata.var_names)[chosen])


def totals(counts: np.ndarray, mitochondrial: np.ndarray) -> dict[str, np.ndarray]:
    """What a quality filter reads of each cell."""
    library = counts.sum(axis=1)
    share = counts[:, mitochondrial].sum(axis=1) / np.maximum(library, 1)
    found = {"library_size": library, "detected_genes": (counts > 0).sum(axis=1), "mitochondrial_share": share}
    return {key: value.astype(np.float32) for key, value in found.items()}
