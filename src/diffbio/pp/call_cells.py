"""Cells among the droplets of an unfiltered matrix."""

import warnings
from typing import TYPE_CHECKING

import numpy as np

from .. import slots
from ..data.droplets import droplet_counts
from ..errors import DataWarning
from ..math.droplets import LOWER
from ..math.droplets import call_cells as called
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData


@recorded
def call_cells(
    adata: "AnnData",
    *,
    lower: float | int = LOWER,
    retain: float | int | None = None,
    fdr: float = 0.001,
    n_simulations: int = 10_000,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Finds the droplets that hold a cell in an unfiltered matrix (EmptyDrops, Lun et al. 2019).

    Args:
        adata: all droplets x genes, whole counts in X; changed in place.
        lower: droplets of at most as many counts are empty, and tell what the soup is.
        retain: droplets of at least as many counts are cells; None finds the knee of the totals.
        fdr: highest rate of false discoveries at which a droplet is called a cell.
        n_simulations: simulated droplets of soup that each p-value is counted from.
        random_state: seed of these.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_is_cell"]`, `obs["diffbio_cell_fdr"]` (NaN for droplets of at most `lower` counts) and
    `var["ambient_profile"]`, the soup's gene fractions, which `pp.ambient` and `tl.pipeline` read. Then:
    `cells = adata[adata.obs["diffbio_is_cell"]].copy()`.

    Raises:
        DataError: there are no droplets of 1 to `lower` counts (the matrix was filtered), or none of more.
    """
    found = called(
        droplet_counts(adata), lower=lower, retain=retain, fdr=fdr, n_simulations=n_simulations, seed=random_state
    )
    limited = int(((found.pvalue <= 1.0 / (n_simulations + 1)) & ~found.is_cell).sum())
    if limited:
        msg = f"pp.call_cells: {limited} droplets are less like the soup than all simulated ones, but "
        msg += f"{n_simulations:,} simulations are too few to call them at an fdr of {fdr:g}; raise n_simulations"
        warnings.warn(msg, DataWarning, stacklevel=3)
    adata.obs[slots.IS_CELL] = found.is_cell
    adata.obs[slots.CELL_FDR] = found.fdr.astype(np.float32)
    adata.var[slots.AMBIENT_PROFILE] = found.profile
