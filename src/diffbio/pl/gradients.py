"""Figure of what `diffbio.gradients` has measured."""

from typing import TYPE_CHECKING

import numpy as np

from .drawing import GREY, PALETTE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FINE, BAD = PALETTE[0], PALETTE[4]
PANELS = {
    "gain": "gain, outputs to inputs",
    "condition": "condition (largest / root mean square)",
    "signal_to_noise": "signal to noise over minibatches",
}


def gradients(
    found: "pd.DataFrame", *, axes: "np.ndarray | None" = None
) -> "np.ndarray[tuple[int], np.dtype[np.object_]]":
    """Draws gain, conditioning and signal to noise of every part; red where the verdict is not "ok".

    Args:
        found: of `diffbio.gradients`.
        axes: three to draw on; None makes a figure.

    Returns:
        The three axes. A bar is left out where the value is 0, infinite or not known; then the value is written.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        size = (11, 1.2 + 0.45 * len(found))
        axes = plt.subplots(1, len(PANELS), figsize=size, sharey=True, layout="constrained")[1]
    for ax, (column, title) in zip(axes, PANELS.items(), strict=True):
        _bars(ax, found, column, title)
    axes[0].set_yticks(np.arange(len(found)), [f"{name}: {said}" for name, said in found["verdict"].items()])
    return np.asarray(axes)


def _bars(ax: "Axes", found: "pd.DataFrame", column: str, title: str) -> None:
    values = found[column].to_numpy(float)
    drawn = np.isfinite(values) & (values > 0)
    places = np.arange(len(values))
    colors = np.where(found["verdict"] == "ok", FINE, BAD)
    lowest, highest = (
        (10.0 ** np.floor(np.log10(values[drawn].min() / 1.5)), values[drawn].max()) if drawn.any() else (0.1, 1)
    )
    ax.barh(places[drawn], values[drawn] - lowest, left=lowest, color=colors[drawn], height=0.6)
    ax.set_xscale("log")
    ax.set_xlim(lowest, max(2 * highest, 10 * lowest))
    ax.xaxis.set_minor_formatter("")
    ax.axvline(1.0, color=GREY, linewidth=0.8, zorder=0)
    for place in places[~drawn]:
        ax.text(0.02, place, f"{values[place]:g}", transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.invert_yaxis() if not ax.yaxis_inverted() else None
    ax.set_title(title, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
