"""Figure of `tl.embed(method="phate")`: how the steps of diffusion were chosen."""

from typing import TYPE_CHECKING

import numpy as np

from ..errors import MissingKeyError
from .drawing import PALETTE, new_axes, record_of, tidy

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

RECORD = "X_diffbio_phate"


def phate(adata: "AnnData") -> "Axes":
    """Draws the von Neumann entropy of diffusion over its steps, and the steps that were taken, at its knee.

    Args:
        adata: cells with the results of `tl.embed(adata, method="phate")`.

    Raises:
        MissingKeyError: there are none.
    """
    found = record_of(adata, RECORD)
    if "entropy" not in found or "t" not in found:
        msg = 'pl.phate: uns["diffbio"] has no entropy of diffusion; call tl.embed(adata, method="phate") first'
        raise MissingKeyError(msg)
    entropy, t = np.asarray(found["entropy"], float), int(found["t"])
    ax = new_axes((4.4, 3.2))
    steps = np.arange(1, len(entropy) + 1)
    ax.plot(steps, entropy, lw=1.4, color=PALETTE[0])
    if t <= len(entropy):
        ax.plot([t], entropy[[t - 1]], "o", color=PALETTE[4], ms=6)
        ax.annotate(f"t = {t}", (t, entropy[t - 1]), xytext=(8, 8), textcoords="offset points")
    ax.set(xlabel="steps of diffusion, t", ylabel="von Neumann entropy", title="entropy of diffusion")
    ax.set_ylim(bottom=0)
    return tidy(ax)
