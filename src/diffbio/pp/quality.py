"""Quality control of cells on AnnData."""

import warnings
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx

from .. import slots
from ..errors import DataError, DataWarning, MissingKeyError
from ..fitting import fit
from ..operators.singlecell import DifferentiableQualityFilter, QualityFilterConfig
from ..operators.singlecell.quality_filter import THRESHOLDS
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

FEWEST = 100  # cells to learn 18 numbers from
STEPS, FEWEST_EPOCHS = 1200, 10  # of training; small data sets take more epochs to as many steps


@recorded
def quality(
    adata: "AnnData",
    *,
    mitochondrial: str | None = "MT-",
    n_mads: float = 5.0,
    n_mads_mitochondrial: float = 3.0,
    learned: bool = True,
    batch_key: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Weights cells by counts, detected genes and mitochondrial share (`DifferentiableQualityFilter`).

    No cell is removed: `adata[adata.obs["diffbio_quality_pass"]]` are those within all thresholds. Cells without counts
    have weight 0 and do not pass.

    Args:
        adata: cells x genes, all genes of the experiment.
        mitochondrial: how names of mitochondrial genes begin, in any case, or a column of `var` that marks them by
            True and False or 1 and 0; None does without.
        n_mads: where the thresholds of counts and genes start (and stay, if not learned), in median absolute
            deviations from the median, on a log scale.
        n_mads_mitochondrial: that of the mitochondrial share.
        learned: whether thresholds and their width are fitted to the data as a mixture of intact and leaky cells;
            batches of fewer than 100 cells keep the start.
        batch_key: column of `obs`: thresholds for each batch.
        layer: of the counts; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_cell_weight"]` (0 to 1), `obs["diffbio_quality_pass"]`, the metrics `obs["diffbio_counts"]`,
    `obs["diffbio_genes"]` and, where known, `obs["diffbio_mitochondrial_share"]`, and
    `uns["diffbio"]["quality_thresholds"]`, a table with a row per batch.
    """
    import pandas as pd

    matrix = slots.counts(adata, layer)
    total = np.asarray(matrix.sum(axis=1), np.float64).ravel()
    detected = np.asarray((matrix > 0).sum(axis=1)).ravel()
    metrics = {"library_size": total, "detected_genes": detected}
    genes = _mitochondrial(adata, mitochondrial)
    if genes is not None:
        own = np.asarray(matrix[:, np.flatnonzero(genes)].sum(axis=1), np.float64).ravel()
        metrics["mitochondrial_share"] = own / np.where(total > 0, total, 1.0)
    metrics = {key: value.astype(np.float32) for key, value in metrics.items()}
    codes, names = (np.zeros(adata.n_obs, int), ["all"]) if batch_key is None else slots.batches(adata, batch_key)
    weight, passes = np.zeros(adata.n_obs, np.float32), np.zeros(adata.n_obs, bool)
    thresholds = np.zeros((len(names), len(THRESHOLDS)))
    for b, name in enumerate(names):
        rows = codes == b
        cells = {key: value[rows] for key, value in metrics.items()}
        op = DifferentiableQualityFilter(
            QualityFilterConfig(n_mads=n_mads, n_mads_mitochondrial=n_mads_mitochondrial), rngs=nnx.Rngs(random_state)
        )
        n = int((cells["library_size"] > 0).sum())
        if not n:
            msg = f"pp.quality: no cell of batch {name!r} has counts, so that no threshold can be set; leave it out"
            raise DataError(msg)
        if learned and n >= FEWEST:
            batch_size = int(op.fit_defaults["batch_size"])
            epochs = max(FEWEST_EPOCHS, STEPS // max(1, n // batch_size))
            fit(op, cells, seed=random_state, progress=progress, max_epochs=min(epochs, STEPS))
        else:
            op.init_from(cells)
            if learned:
                msg = f"pp.quality: {n} cells in batch {name!r} are too few to learn from; thresholds are by MADs"
                warnings.warn(msg, DataWarning, stacklevel=4)
        found = op.apply(cells)[0]
        weight[rows], passes[rows] = np.asarray(found["cell_weights"]), np.asarray(found["passes"]) > 0
        thresholds[b] = np.asarray(found["thresholds"], np.float64)
    thresholds[:, :4] = np.expm1(thresholds[:, :4])  # in counts and genes
    table = pd.DataFrame(np.maximum(thresholds, 0.0), index=pd.Index(names, name="batch"), columns=list(THRESHOLDS))
    if genes is None:
        table = table.drop(columns="mitochondrial_max")
    adata.obs[slots.CELL_WEIGHT], adata.obs[slots.QUALITY_PASS] = weight, passes
    if genes is None and slots.QUALITY_METRICS[2] in adata.obs:
        cast("Any", adata.obs).pop(slots.QUALITY_METRICS[2])  # of an earlier run
    for column, value in zip(slots.QUALITY_METRICS, metrics.values(), strict=False):
        adata.obs[column] = value
    adata.uns["diffbio"] = {**adata.uns.get("diffbio", {}), slots.QUALITY_THRESHOLDS: table}


def _mitochondrial(adata: "AnnData", named: str | None) -> np.ndarray | None:
    """A mask of genes from a column of `var` or from a prefix of their names; None where nothing is asked for."""
    if named is None:
        return None
    if named in adata.var:
        marks = adata.var[named].tolist()
        wrong = [m for m in marks if not (isinstance(m, bool | int | float | np.generic) and m in (0, 1))]
        if wrong:
            msg = (
                f"pp.quality: var[{named!r}] must mark mitochondrial genes by True and False or 1 and 0, but "
                f"{len(wrong)} of {len(marks)} entries do not, such as {wrong[0]!r}; convert it, or pass a prefix "
                "of gene names"
            )
            raise DataError(msg)
        return np.asarray(marks, bool)
    found = adata.var_names.str.upper().str.startswith(named.upper())
    if not found.any():
        msg = (
            f"pp.quality: no gene's name starts with {named!r} and var has no such column; pass mitochondrial= with "
            "the prefix or the column, or None to do without"
        )
        raise MissingKeyError(msg)
    return np.asarray(found)
