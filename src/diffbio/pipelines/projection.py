"""New cells through a fitted pipeline, found by the names of genes and batches; nothing is fitted again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.guard import sniff
from ..data.names import align_genes, column_of, encode_with, label_codes
from ..data.plain import plain
from ..data.provenance import provenance
from ..data.read import read
from ..errors import ConfigError, MissingKeyError, ModelFileError
from ..recording import recording
from .analysis import Analysis, Prepared
from .inference import with_missing_genes
from .run import RunSettings, checked, opened_source, stages_of
from .single_cell import SingleCellPipeline

if TYPE_CHECKING:
    from anndata import AnnData


def project(
    data: "AnnData | str | Path",
    pipeline: SingleCellPipeline | str | Path,
    *,
    on_disk: bool = False,
    **settings: Any,
) -> Analysis:
    """Applies a fitted pipeline to cells that it has not seen.

    Genes are found by name, in any order; those that the data lack count as zero. Batches keep the codes that
    they had in training.

    Args:
        data: an AnnData, or the path of a file.
        pipeline: of `analyse` or `diffbio.tl.pipeline`, or the folder that it was saved to.
        on_disk: leaves the matrices of a .h5ad or .zarr where they are.
        settings: fields of `RunSettings`, but for those that choose genes or seed.

    Raises:
        ModelFileError: the folder is no pipeline's, or the pipeline is untrained or was fitted to arrays.
        DataError: more than 20 % of the genes are missing, a batch is unknown, or the data are no counts.
        ConfigError: the pipeline corrects batches, and no column was named.
    """
    run = RunSettings(n_top_genes=None, **settings)
    folder = None if isinstance(pipeline, SingleCellPipeline) else str(pipeline)
    if not isinstance(pipeline, SingleCellPipeline):
        pipeline = SingleCellPipeline.load(pipeline)
    if not (pipeline.genes and pipeline.fitted):
        lacks = "does not know the names of its genes" if pipeline.fitted else "is untrained"
        msg = f"project: the pipeline {lacks}; fit it with diffbio.tl.pipeline or diffbio run (arrays: pipeline.apply)"
        raise ModelFileError(msg)
    with recording() as record:
        origin = data
        if isinstance(data, str | Path) and not (on_disk and sniff(Path(data)) in ("h5ad", "zarr")):
            data = read(data)
        prepared = _prepared(data, pipeline, run)
    params = {**vars(run), **vars(pipeline.config), "model": folder}
    skipped = [f"{stage}: not part of the model" for stage in prepared.skipped]
    entry = provenance(params=params, seed=run.seed, data=origin, skipped=skipped, **record)
    entry |= {"counts": prepared.counts, "batches": plain(prepared.batches)}
    if isinstance(origin, str | Path):
        entry["input"] = Path(origin).name
    return Analysis(pipeline, prepared, None, entry)


def _prepared(data: "AnnData | str | Path", pipeline: SingleCellPipeline, run: RunSettings) -> Prepared:
    found = checked(data, run)
    if pipeline.ambient_removal is not None and "ambient_profile" not in found.places:
        msg = "the pipeline removes ambient RNA: var needs the profile of the soup; name its column (ambient_profile)"
        raise MissingKeyError(msg)
    columns = align_genes(found.var.index, pipeline.genes).columns
    present = np.flatnonzero(columns >= 0)
    source = opened_source(data, found.places, columns[present], found.matrix.shape[1])
    _add_batches(source, found.obs, pipeline, run.batch_key)
    labels = None if run.label_key is None else label_codes(found.obs, run.label_key)[0]
    source = with_missing_genes(source, columns)
    stages = stages_of(pipeline.config)
    skipped = {stage: "not part of the model" for stage, name in stages.items() if getattr(pipeline, name) is None}
    return Prepared(
        source, columns[present], tuple(np.asarray(pipeline.genes)[present]), found.matrix.shape[1],
        list(pipeline.batches), labels, skipped, found.counts, present,
    )  # fmt: skip


def _add_batches(source: Any, obs: Any, pipeline: SingleCellPipeline, key: str | None) -> None:
    if len(pipeline.batches) < 2:
        return
    if key is None:
        msg = (
            f"the pipeline knows the batches {', '.join(pipeline.batches)}; name the column of obs that says "
            "which each cell is of (batch_key)"
        )
        raise ConfigError(msg)
    source.cells["batch_labels"] = encode_with(column_of(obs, key), pipeline.batches, f"obs[{key!r}]")
    source.keys = (*source.keys, "batch_labels")
