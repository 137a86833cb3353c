"""Doublets on AnnData."""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from flax import nnx
from scipy import sparse

from .. import slots
from ..data.genes import highly_variable_genes
from ..data.source import ArraySource
from ..errors import ConfigError, DataError, DataWarning
from ..fitting import fit
from ..math.doublets import LEAST_COUNT, most_variable
from ..operators.singlecell.doublet_detection import (
    FEWEST_CELLS,
    DifferentiableDoubletScorer,
    DifferentiableSoloDetector,
    DoubletScorerConfig,
    SoloDetectorConfig,
)
from ..pipelines.inference import apply_in_chunks
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

    from ..models import SCVI

N_COMPONENTS, PERCENTILE = 30, 85.0  # Scrublet's
SOLO_GENES = 2000
MANY = 0.5  # of the cells called doublets: no experiment has so many


@recorded
def doublets(
    adata: "AnnData",
    *,
    method: str = "scrublet",
    expected_rate: float = 0.06,
    threshold: float | None = None,
    batch_key: str | None = None,
    model: "SCVI | None" = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Scores cells by how much they are like sums of two cells. No cell is removed.

    `adata[~adata.obs["diffbio_predicted_doublet"]]` are the cells that are kept. Two cells of one type that share a
    droplet look like one cell, and cannot be found.

    Args:
        adata: cells x genes, raw counts of one experiment (one lane), or of several with `batch_key`.
        method: "scrublet" (`DifferentiableDoubletScorer`) counts simulated doublets among a cell's neighbours; "solo"
            (`DifferentiableSoloDetector`) trains a count VAE and a classifier.
        expected_rate: of doublets among the cells, in (0, 0.5); of 10x experiments about 0.008 per 1,000 cells.
        threshold: in (0, 1); scores above it are called. None lies, with "scrublet", in the valley between the two
            modes of the simulated doublets' scores; where there is none, and with "solo", it calls the expected rate.
        batch_key: column of `obs`: doublets are sought in each batch by itself.
        model: of "solo": a fitted `diffbio.models.SCVI` of these genes, whose encoder is taken instead of training one.
        max_epochs: of "solo"; None is what the operator prefers.
        layer: of the counts; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `obs["diffbio_doublet_score"]` (NaN for cells without counts), `obs["diffbio_predicted_doublet"]` (bool),
    `uns["diffbio"]["doublet_thresholds"]`, a table with a row per batch: `threshold`, `automatic` (False: calls the
    expected rate, or given), `detected_rate`, `detectable_share` of the simulated doublets, `estimated_rate` (the ratio
    of the two), and `uns["diffbio"]["simulated_doublet_scores"]`, arrays `scores` and `batch` (row of the table).

    Raises:
        ConfigError: an unknown method, or a rate or threshold out of its range.
        DataError: values that are no raw counts, or a batch of fewer than 30 cells with counts.
    """
    import pandas as pd

    slots.choose(method, ["scrublet", "solo"], "pp.doublets")
    if not 0 < expected_rate < 0.5:
        msg = f"pp.doublets: expected_rate must be in (0, 0.5), got {expected_rate!r}."
        raise ConfigError(msg)
    if threshold is not None and not 0 < threshold < 1:  # NaN is refused too
        msg = f"pp.doublets: threshold must be in (0, 1), as the scores are, got {threshold!r}."
        raise ConfigError(msg)
    if max_epochs is not None and method != "solo":
        msg = "pp.doublets: max_epochs is for method='solo'; 'scrublet' trains nothing."
        raise ConfigError(msg)
    if model is not None:
        _check_model(model, adata, method)
    matrix = cast("Any", sparse.csr_array)(slots.counts(adata, layer))
    total = np.asarray(matrix.sum(axis=1), np.float64).ravel()
    codes, names = (np.zeros(adata.n_obs, int), ["all"]) if batch_key is None else slots.batches(adata, batch_key)
    score, called = np.full(adata.n_obs, np.nan, np.float32), np.zeros(adata.n_obs, bool)
    table, simulated = [], []
    for b, name in enumerate(names):
        rows = np.flatnonzero((codes == b) & (total > 0))
        where = "" if batch_key is None else f" in batch {name!r}"
        if len(rows) < FEWEST_CELLS:
            msg = f"pp.doublets: {len(rows)} cells with counts{where}; doublets need at least {FEWEST_CELLS}."
            raise DataError(msg)
        if method == "scrublet":
            found = _scrublet(matrix[rows], total[rows], expected_rate, random_state)
        else:
            found = _solo(matrix[rows], expected_rate, model, max_epochs, random_state, progress=progress)
        if not found.automatic and method == "scrublet" and threshold is None:
            _warn(
                f"the simulated doublets' scores{where} have no valley that tells doublets from cells; the threshold "
                f"{found.threshold:.3g} calls the expected {expected_rate:.0%}: look at pl.doublets, pass threshold="
            )
        border = found.threshold if threshold is None else float(threshold)
        score[rows], called[rows] = found.scores, found.scores > border
        detected, detectable = float(called[rows].mean()), float((found.simulated > border).mean())
        if detected > MANY:
            _warn(f"{detected:.0%} of the cells{where} are called doublets; raise threshold, look at pl.doublets")
        table.append(
            {
                "threshold": border,
                "automatic": found.automatic and threshold is None,
                "expected_rate": expected_rate,
                "detected_rate": detected,
                "detectable_share": detectable,
                "estimated_rate": detected / detectable if detectable > 0 else np.nan,
            }
        )
        simulated.append(found.simulated)
    adata.obs[slots.DOUBLET_SCORE], adata.obs[slots.PREDICTED_DOUBLET] = score, called
    of_batch = np.repeat(np.arange(len(names)), [len(s) for s in simulated])
    adata.uns["diffbio"] = {
        **adata.uns.get("diffbio", {}),
        slots.DOUBLET_THRESHOLDS: pd.DataFrame(table, index=pd.Index(list(map(str, names)), name="batch")),
        slots.SIMULATED_DOUBLETS: {"scores": np.concatenate(simulated), "batch": of_batch.astype(np.int32)},
    }


class Found(NamedTuple):
    """Scores of a batch's cells and of its simulated doublets; `automatic`: the threshold lies in a valley."""

    scores: np.ndarray
    simulated: np.ndarray
    threshold: float
    automatic: bool


def _scrublet(matrix: Any, total: np.ndarray, expected_rate: float, seed: int) -> Found:
    """The genes are chosen while the counts are sparse; only theirs become dense."""
    genes = np.flatnonzero(_variable(matrix, total))
    if not len(genes):
        msg = "pp.doublets: no gene varies between the cells and has 3 counts in at least 3 of them"
        raise DataError(msg)
    config = DoubletScorerConfig(
        n_genes=len(genes),
        gene_percentile=0.0,
        expected_doublet_rate=expected_rate,
        n_pca_components=min(N_COMPONENTS, len(genes), len(total)),
    )
    op = DifferentiableDoubletScorer(config, rngs=nnx.Rngs(seed))
    chosen = matrix[:, genes].toarray().astype(np.float32)
    out = op.apply({"counts": chosen, "library_size": total.astype(np.float32)})[0]
    return Found(
        np.asarray(out["doublet_scores"]),
        np.asarray(out["simulated_doublet_scores"]),
        float(out["doublet_threshold"]),
        bool(out["threshold_found"]),
    )


def _variable(matrix: Any, total: np.ndarray) -> np.ndarray:
    """A mask of the genes whose v-score is among the highest 15 %, of counts of cells of one library size."""
    n = matrix.shape[0]
    values = matrix.data * np.repeat(total.mean() / total, np.diff(matrix.indptr))
    normal = cast("Any", sparse.csr_array)((values, matrix.indices, matrix.indptr), shape=matrix.shape)
    mean = np.asarray(normal.sum(axis=0), np.float64).ravel() / n
    normal.data = values**2
    variance = np.asarray(normal.sum(axis=0), np.float64).ravel() / n - mean**2
    detected = np.bincount(matrix.indices[values >= LEAST_COUNT], minlength=matrix.shape[1])
    return most_variable(mean, variance, detected, PERCENTILE)


def _check_model(model: Any, adata: "AnnData", method: str) -> None:
    if method != "solo":
        msg = "pp.doublets: model is for method='solo'; 'scrublet' reads the counts themselves."
        raise ConfigError(msg)
    if not model.is_trained:
        msg = "pp.doublets: model is not trained; call model.train() first."
        raise ConfigError(msg)
    names = model.get_var_names()
    if list(names) != list(adata.var_names):
        msg = f"pp.doublets: model was trained on {len(names)} genes, not on these {adata.n_vars} in this order; "
        msg += "pass adata[:, model.get_var_names()]"
        raise DataError(msg)


def _solo(
    matrix: Any, expected_rate: float, model: Any, max_epochs: int | None, seed: int, *, progress: bool
) -> Found:
    """Trains on the cells in random order: a cell's partners are those around it."""
    if model is None and matrix.shape[1] > SOLO_GENES:
        variable = highly_variable_genes(matrix, n_top_genes=SOLO_GENES)["highly_variable"].to_numpy()
        matrix = matrix[:, np.flatnonzero(variable)]
    order = np.random.default_rng(seed).permutation(matrix.shape[0])
    source = ArraySource({"counts": matrix[order].astype(np.float32)}, {})
    if model is None:
        op = DifferentiableSoloDetector(SoloDetectorConfig(n_genes=matrix.shape[1]), rngs=nnx.Rngs(seed))
    else:
        op = DifferentiableSoloDetector.from_scvi(model.module, rngs=nnx.Rngs(seed))
    settings: dict[str, Any] = {} if max_epochs is None else {"max_epochs": max_epochs}
    fit(op, source, seed=seed, progress=progress, **settings)
    parts = list(apply_in_chunks(op, source, ["doublet_probabilities"]))
    scores = np.empty(len(order), np.float32)
    scores[order] = np.concatenate([part["doublet_probabilities"] for part in parts])
    border = float(np.quantile(scores, 1 - expected_rate))
    return Found(scores, op.reference_doublet_probabilities(), border, automatic=False)


def _warn(message: str) -> None:
    warnings.warn(f"pp.doublets: {message}", DataWarning, stacklevel=4)
