"""One annotation of one data set: what it is annotated by, training where needed, one pass over the cells."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import storage
from ..data.guard import sniff
from ..data.markers import as_markers
from ..data.names import column_of
from ..data.provenance import provenance
from ..data.read import read
from ..errors import ConfigError, DataError, DiffBioError, ModelFileError
from ..models import SCANVI
from ..operators.singlecell import DifferentiableCellAnnotator
from ..pipelines.run import Checked, checked_counts
from ..recording import recording
from . import classifier, markers_only, partly_labelled
from .asked import UNKNOWN, Asked
from .calls import Annotation, Calling

if TYPE_CHECKING:
    from anndata import AnnData

MODES = ("celltypist", "cellassign", "scanvi")


def annotate(
    data: "AnnData | str | Path",
    *,
    mode: str | None = None,
    reference: "AnnData | str | Path | None" = None,
    labels_key: str | None = None,
    markers: "Mapping[str, Sequence[str]] | pd.DataFrame | str | Path | None" = None,
    model: "DifferentiableCellAnnotator | SCANVI | str | Path | None" = None,
    unlabeled_category: str = "Unknown",
    batch_key: str | None = None,
    other: str | None = None,
    layer: str | None = None,
    n_top_genes: int | None = None,
    max_epochs: int | None = None,
    allow_non_integer: bool = False,
    on_disk: bool = False,
    calling: Calling | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Annotation:
    """Says of every cell which type it is, by an annotator that is trained first, or given; see `tl.annotate`.

    Args:
        data: an AnnData, or the path of a file.
        mode: 'celltypist', 'cellassign' or 'scanvi'; None: by what is given.
        reference: annotated cells; None: those of `data` that have a label.
        labels_key: column of obs with the types.
        markers: marker genes by type: a mapping, a table, or a file.
        model: a trained annotator or its folder, in place of reference and markers.
        unlabeled_category: value of labels_key for cells without a type.
        batch_key: column of obs; 'scanvi' reads it.
        other: name of one more type, without markers, for cells of none of the types; 'cellassign' reads it.
        layer: of the counts, in both data sets; None is X.
        n_top_genes: genes to train on; None is what suits the mode, 0 all.
        max_epochs: passes over the cells at most.
        allow_non_integer: accepts values that are not whole.
        calling: how probabilities become types.
        on_disk: leaves the counts of a .h5ad or .zarr where they are ('scanvi' reads them whole).
        seed: of everything drawn at random.
        progress: shows how training goes.

    Raises:
        ConfigError: what is given contradicts itself, or does not suffice.
        DataError: the data are no counts, or lack the genes of the model.
    """
    given = {"model": model, "markers": markers, "reference": reference}
    calling = calling or Calling()
    mode = _mode(mode, given, labels_key)
    how: dict[str, Any] = {"layer": layer, "allow_non_integer": allow_non_integer}
    trained = load(model) if isinstance(model, str | Path) else model
    if trained is not None:
        _check_usable(trained, "the annotator given")
        asked_for, mode = mode, "scanvi" if isinstance(trained, SCANVI) else trained.config.annotation_mode
        if asked_for not in ("", mode):
            msg = f"annotate: the model is of mode {mode!r}, not {asked_for!r}; leave mode out, or pass another model."
            raise ConfigError(msg)
    asked = Asked(
        labels_key=labels_key, unlabeled_category=unlabeled_category, batch_key=batch_key, other=other,
        n_top_genes=n_top_genes, max_epochs=max_epochs, seed=seed, progress=progress,
    )
    _refuse_idle(mode, calling, asked, trained=trained is not None)
    with recording() as record:
        origin = data
        stays = on_disk and mode != "scanvi"
        if isinstance(data, str | Path) and not (stays and sniff(Path(data)) in ("h5ad", "zarr")):
            data = read(data)
        cells = checked_counts(data, **how)
        if labels_key is not None and reference is None:
            column_of(cells.obs, labels_key)
        if calling.over_clustering is not None:
            _check_groups(cells.obs, calling.over_clustering)  # complain before training does
        if trained is None:
            trained = _trained(mode, data, cells, given, asked, how)
        if isinstance(trained, SCANVI):
            answers = partly_labelled.ask(trained, cells, asked, own=model is None and reference is None)
        else:
            answers = (classifier if mode == "celltypist" else markers_only).ask(trained, data, cells)
    params = {
        **dataclasses.asdict(calling), **dataclasses.asdict(asked), **how, "mode": mode,
        **{name: _said(value) for name, value in given.items()},
    }
    entry = provenance(params=params, seed=seed, data=origin, **record) | {"counts": cells.counts}
    if isinstance(origin, str | Path):
        entry["input"] = Path(origin).name
    # labels that training has not seen tell how good the answer is
    unseen = any(value is not None for value in given.values()) and labels_key in cells.obs
    truth = _truth(cells, asked) if unseen else None
    return Annotation(model=trained, calling=calling, record=entry, truth=truth, **answers)


def load(path: str | Path) -> DifferentiableCellAnnotator | SCANVI:
    """The annotator in a folder.

    Raises:
        ModelFileError: the folder is damaged, or holds something that does not annotate.
    """
    header, _ = storage.load_folder(path)
    if header.get("model") == "SCANVI":
        return SCANVI.load(path, adata=False)
    if header.get("operator") != DifferentiableCellAnnotator.__name__:
        msg = f"load: {path} holds {header.get('model') or header.get('operator')!r}, which does not annotate cells."
        raise ModelFileError(msg)
    found = DifferentiableCellAnnotator.load(path)
    _check_usable(found, f"the annotator in {path}")
    return found


def _check_usable(model: Any, what: str) -> None:
    """Refuses what cannot annotate cells by the names of their genes."""
    if isinstance(model, SCANVI):
        return
    if not isinstance(model, DifferentiableCellAnnotator):
        msg = f"annotate: model must be what tl.annotate returned, or the folder of one, got {type(model).__name__}."
        raise ConfigError(msg)
    if not (model.types and model.fitted):
        lacks = "does not know the names of its types and genes" if model.fitted else "is untrained"
        msg = f"annotate: {what} {lacks}; take one that diffbio.tl.annotate or diffbio annotate trained."
        raise ModelFileError(msg)


def _refuse_idle(mode: str, calling: Calling, asked: Asked, *, trained: bool) -> None:
    """Settings that would do nothing.

    Raises:
        ConfigError: naming one, and what it is for.
    """
    idle = {
        "multi_label": (calling.multi_label and mode != "celltypist", "mode 'celltypist'"),
        "over_clustering": (calling.over_clustering is not None and not calling.majority_voting, "majority_voting"),
        "min_share": (calling.min_share > 0 and not calling.majority_voting, "majority_voting"),
        "other": (asked.other is not None and (mode != "cellassign" or trained), "markers="),
        "batch_key": (asked.batch_key is not None and mode != "scanvi", "mode 'scanvi'"),
        "n_top_genes": (asked.n_top_genes is not None and (mode == "cellassign" or trained), "training with labels"),
        "max_epochs": (asked.max_epochs is not None and trained and mode != "scanvi", "training, not for model="),
    }
    for name, (does_nothing, what_for) in idle.items():
        if does_nothing:
            msg = f"annotate: {name} is for {what_for}; leave it out."
            raise ConfigError(msg)


def _check_groups(obs: pd.DataFrame, key: str) -> None:
    column = column_of(obs, key)
    if n_missing := int(column.isna().sum()):
        msg = f"annotate: obs[{key!r}] has no value for {n_missing} of {len(obs)} cells; fill them in, or name another."
        raise DataError(msg)


def _mode(mode: str | None, given: Mapping[str, Any], labels_key: str | None) -> str:
    """The mode that what is given is for.

    Raises:
        ConfigError: it is for none, or for another one than was asked for.
    """
    there = [name for name, value in given.items() if value is not None]
    if len(there) > 1:
        msg = f"annotate: got {' and '.join(there)}; an annotator is one of model, markers and reference; pass one."
        raise ConfigError(msg)
    if mode is not None and mode not in MODES:
        msg = f"annotate: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}."
        raise ConfigError(msg)
    if there == ["model"]:
        return mode or ""
    if there == ["markers"]:
        if mode not in (None, "cellassign"):
            msg = f"annotate: markers are for mode 'cellassign'; mode {mode!r} learns from labels: pass labels_key."
            raise ConfigError(msg)
        return "cellassign"
    if mode == "cellassign":
        msg = "annotate: mode 'cellassign' needs markers: a mapping {type: [genes]}, a table, or a file."
        raise ConfigError(msg)
    if labels_key is None:
        msg = (
            "annotate: pass labels_key, the column with the types (of reference=, or of the labelled cells among "
            "these); or markers= or model=."
        )
        raise ConfigError(msg)
    return mode or "celltypist"


def _trained(
    mode: str, data: Any, cells: Checked, given: Mapping[str, Any], asked: Asked, how: Mapping[str, Any]
) -> DifferentiableCellAnnotator | SCANVI:
    if mode == "cellassign":
        return markers_only.train(data, cells, as_markers(given["markers"]), asked)
    reference = given["reference"]
    known = cells
    try:
        if reference is not None:
            known = checked_counts(read(reference) if isinstance(reference, str | Path) else reference, **how)
        if mode == "celltypist":
            return classifier.train(known, cells.var.index, asked)
        return partly_labelled.train(known, cells, asked)
    except DiffBioError as error:
        if reference is not None:
            error.add_note("This is about the reference.")
        raise


def _said(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str | Path):
        return Path(value).name
    size = f", {value.n_obs:,} cells" if hasattr(value, "n_obs") else ""
    return type(value).__name__ + size


def _truth(cells: Checked, asked: Asked) -> np.ndarray | None:
    """Names of the cells' types by their own labels, "" where there is none; None without any."""
    column = column_of(cells.obs, str(asked.labels_key))
    names = column.astype(str).to_numpy(dtype=object)
    known = ~(column.isna().to_numpy() | np.isin(names.astype(str), [asked.unlabeled_category, *UNKNOWN]))
    return np.where(known, names, "") if known.any() else None
