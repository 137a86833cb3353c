"""The figures of a run, as files and as pictures inside a page."""

import base64
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import pl
from ..errors import DataError, MissingKeyError, OutputError
from ..scratch import remove, scratch_beside
from ..slots import DIFFERENTIAL_DISTRIBUTION, SWITCH_DE

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEMO_FILES = frozenset({
    "cells.h5ad", "out.h5ad", "report.html", "umap_diffbio_cluster.png", "umap_cell_type.png",
    "cluster_sizes.png", "training.png", "out.h5ad.checkpoint",
})  # fmt: skip
DPI = 160


def figures_of(adata: "AnnData") -> "dict[str, Figure]":
    """Every figure that the results in `adata` allow, by name."""
    drawn: dict[str, Any] = {}
    called = pl.CELL_TYPE if pl.CELL_TYPE in adata.obs else None
    names: list[str | None] = [*pl.colors_of(adata, called, label_key(adata))] or [None]
    for method in pl.maps_of(adata) if adata.n_obs else ():
        for name in names:
            drawn[f"{method}_{name}" if name else method] = pl.embed(adata, color=name, method=method)
    if "diffbio_cluster" in adata.obs:
        drawn["cluster_sizes"] = pl.cluster(adata)
    if "diffbio_ambient_fraction" in adata.obs:
        drawn["ambient"] = pl.ambient(adata)
    if pl.CELL_TYPE in adata.obs and adata.n_obs:
        drawn |= _annotation(adata)
    figures = {name: ax.figure for name, ax in drawn.items()} | _steps(adata) | _trajectory(adata) | _tissue(adata)
    if stages := pl.stages_of(adata):
        figures["training"] = _training(adata, stages)
    return figures


def label_key(adata: "AnnData") -> str | None:
    """The column of `obs` that the run compared its clusters with."""
    return _column_named(adata, "pipeline", "label_key")


def labels_of_types(adata: "AnnData") -> str | None:
    """The column of `obs` that the called types can be compared with: labels that some of the cells have."""
    for key in (_column_named(adata, "annotate", "labels_key"), label_key(adata)):
        if key is not None and pl.agreement(adata, key)["cells"]:
            return key
    return None


def save_figures(adata: "AnnData", folder: str | Path) -> list[Path]:
    """Writes `figures_of(adata)` as PNG files to `folder`; returns their paths.

    Raises:
        OutputError: the folder cannot be written to.
    """
    paths = []
    with drawing():
        for name, figure in figures_of(adata).items():
            path = Path(folder) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:80]}.png"
            write_whole(path, png(figure))
            paths.append(path)
    return paths


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file; afterwards it is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    # no text chunks: the same results give the same bytes
    figure.savefig(buffer, dpi=DPI, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def inline(figure: "Figure") -> str:
    """The figure as a data: address."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode("ascii")


@contextmanager
def drawing() -> Iterator[None]:
    """No window, no user's style, and no word about letters that the font lacks."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where there is no home folder
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mpl.use("agg", force=True)
        mpl.rcParams.update(mpl.rcParamsDefault)
        mpl.rcParams["backend"] = "agg"
        yield


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name and renames it: it is there whole, or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    scratch = scratch_beside(path)
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        msg = f"cannot be written ({error.strerror or error}); {path}; free space or choose another folder"
        raise OutputError(msg) from error
    finally:
        remove(scratch)


def _column_named(adata: "AnnData", function: str, setting: str) -> str | None:
    params = pl.record_of(adata, function).get("params", {})
    key = params.get(setting) if hasattr(params, "get") else None
    return key if isinstance(key, str) and key in adata.obs else None


def _annotation(adata: "AnnData") -> "dict[str, Axes]":
    drawn: dict[str, Axes] = {}
    if key := labels_of_types(adata):
        drawn["types_and_labels"] = pl.confusion(adata, key)
    if pl.CONFIDENCE in adata.obs:
        drawn["confidence"] = pl.confidence(adata)
    with suppress(DataError):  # none were written, or none is among these genes
        drawn["markers"] = pl.markers(adata)
    return drawn


def _steps(adata: "AnnData") -> "dict[str, Figure]":
    """Figures of what came before the pipeline."""
    drawn: dict[str, Any] = {}
    for name, draw in (("quality", pl.quality), ("doublets", pl.doublets), ("imputation", pl.impute)):
        with suppress(MissingKeyError):  # that step was not taken
            drawn[name] = np.ravel(np.asarray(draw(adata), dtype=object))[0].figure
    return drawn


def _trajectory(adata: "AnnData") -> "dict[str, Figure]":
    """Figures of what `diffbio trajectory` found."""
    groups = _column_named(adata, "pseudotime", "groupby")
    draw: dict[str, Callable[[], Any]] = {
        "pseudotime": lambda: pl.pseudotime(adata, groupby=groups),
        "fate": lambda: pl.fate(adata),
        "driver_genes": lambda: pl.driver_genes(adata),
        "gene_trends": lambda: pl.gene_trends(adata),
        "velocity": lambda: pl.velocity(adata, color=groups),
        "ot_trajectory": lambda: pl.ot_trajectory(adata),
    }
    return _drawn(adata, draw)


def _tissue(adata: "AnnData") -> "dict[str, Figure]":
    """Figures of space, networks, communication and differential expression."""
    draw: dict[str, Callable[[], Any]] = {
        "spatial_domains": lambda: pl.spatial_domains(adata),
        "aligned_slices": lambda: pl.align_slices(adata),
        "grn": lambda: pl.grn(adata),
        "ligand_receptor": lambda: pl.ligand_receptor(adata),
        "communication": lambda: pl.communication(adata),
    }
    # these draw counts, which a file on disk keeps to itself
    if SWITCH_DE in adata.uns:
        draw["switch_de"] = lambda: pl.switch_de(_in_memory(adata))
    if DIFFERENTIAL_DISTRIBUTION in adata.uns:
        draw["differential_distribution"] = lambda: pl.differential_distribution(_in_memory(adata))
    return _drawn(adata, draw)


def _in_memory(adata: "AnnData") -> "AnnData":
    return adata.to_memory() if adata.isbacked else adata


def _drawn(adata: "AnnData", draw: "dict[str, Callable[[], Any]]") -> "dict[str, Figure]":
    drawn: dict[str, Figure] = {}
    for name, figure in draw.items() if adata.n_obs else ():
        with suppress(MissingKeyError, DataError):  # that was not asked for, or there is nothing to draw
            drawn[name] = np.ravel(np.asarray(figure(), dtype=object))[0].figure
    return drawn


def _training(adata: "AnnData", stages: list[str]) -> "Figure":
    import matplotlib.pyplot as plt

    columns = min(3, len(stages))
    rows = -(-len(stages) // columns)
    figure = plt.figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    for i, stage in enumerate(stages):
        pl.training(adata, stage, ax=figure.add_subplot(rows, columns, i + 1))
    return figure
