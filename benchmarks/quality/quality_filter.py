"""Learned quality thresholds beside MAD filtering and fixed ones: F1 of damaged cells.

    uv run python -m benchmarks.quality.quality_filter

``pbmc3k``, to which damaged copies of random cells are added: all mitochondrial counts are kept, those of the other
genes thinned to 5-30 % (uniform). Shares of 0, 2, 5, 10 and 20 % damaged cells, five seeds each; all methods see the
same cells in this run. "MAD" is the rule of the single-cell best practices (median +- 5 median absolute deviations of
log counts and log genes, + 3 of the mitochondrial share), "MAD, scaled" the same with deviations scaled to standard
deviations (1.4826), "tutorial" Seurat's fixed 200-2,500 genes and 5 %, which the authors of these data used to select
them, so that none of the cells of origin fails it. With no damaged cells the number is the share of cells lost.
Ours learns from the metrics alone, without labels. CPU seconds of one fit, compilation included.
"""

import time
import warnings

import numpy as np
from benchmarks.quality.harmony import data_folder

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)
SEEDS = range(5)
METHODS = ("learned", "weight < 1/2", "MAD", "MAD, scaled", "tutorial")
CLEAN_BAR = 0.01  # of the cells lost where none is damaged


def cells(share: float, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Metrics of intact and damaged cells, and which are damaged."""
    import anndata
    from scipy import sparse

    adata = anndata.read_h5ad(data_folder() / "pbmc3k.h5ad")
    counts = adata.X.tocsr()
    mitochondrial = np.asarray(adata.var_names.str.startswith("MT-"))
    rng = np.random.default_rng(seed)
    n_damaged = round(share * adata.n_obs / (1 - share))
    damaged = counts[rng.choice(adata.n_obs, n_damaged, replace=False)].copy()
    kept = np.repeat(rng.uniform(0.05, 0.3, n_damaged), np.diff(damaged.indptr))
    thinned = rng.binomial(damaged.data.astype(int), kept)
    damaged.data = np.where(mitochondrial[damaged.indices], damaged.data, thinned).astype(np.float32)
    both = sparse.vstack([counts, damaged]).tocsr()
    total = np.asarray(both.sum(axis=1)).ravel()
    metrics = {
        "library_size": total,
        "detected_genes": np.asarray((both > 0).sum(axis=1)).ravel(),
        "mitochondrial_share": np.asarray(both[:, mitochondrial].sum(axis=1)).ravel() / total,
    }
    truth = np.arange(len(total)) >= adata.n_obs
    return {key: value.astype(np.float32) for key, value in metrics.items()}, truth


def by_mads(metrics: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Which cells are outliers."""
    failed = np.zeros(len(metrics["library_size"]), bool)
    for key, n_mads in (("library_size", 5), ("detected_genes", 5), ("mitochondrial_share", 3)):
        values = metrics[key] if n_mads == 3 else np.log1p(metrics[key])
        median = np.median(values)
        far = n_mads * scale * np.median(np.abs(values - median))
        failed |= values > median + far
        if n_mads == 5:
            failed |= values < median - far
    return failed


def ours(metrics: dict[str, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Which cells fail the learned thresholds, which have less than half a weight, and CPU seconds."""
    from flax import nnx

    import diffbio
    from diffbio.operators.singlecell import DifferentiableQualityFilter, QualityFilterConfig

    start = time.process_time()
    op = DifferentiableQualityFilter(QualityFilterConfig(), rngs=nnx.Rngs(seed))
    diffbio.fit(op, metrics, seed=seed, progress=False)
    found = op.apply(metrics)[0]
    seconds = time.process_time() - start
    return np.asarray(found["passes"]) == 0, np.asarray(found["cell_weights"]) < 0.5, seconds


def main() -> None:
    """Print the table; exit with 1 if a bar is missed."""
    from sklearn.metrics import f1_score

    warnings.simplefilter("ignore")
    missed = False
    print(f"{'F1, mean of 5 seeds':28s}", *(f"{name:>13s}" for name in METHODS), f"{'CPU s':>6s}", "  bar")
    for share in SHARES:
        rows, spent = [], []
        for seed in SEEDS if share else [0]:
            metrics, truth = cells(share, seed)
            failed, light, seconds = ours(metrics, seed)
            genes = metrics["detected_genes"]
            fixed = (genes < 200) | (genes > 2500) | (metrics["mitochondrial_share"] > 0.05)
            called = [failed, light, by_mads(metrics, 1.0), by_mads(metrics, 1.4826), fixed]
            rows.append([f1_score(truth, c) if share else c.mean() for c in called])
            spent.append(seconds)
        values = np.mean(rows, axis=0)
        if share:
            bar, what = max(values[2:4]), f"{share:.0%} damaged"
            late = bool(values[0] < bar)
            note = f">= MAD ({values[2]:.3f}; scaled {values[3]:.3f})" + " MISSED" * late
        else:
            what, late = "no damage: share lost", bool(values[0] > CLEAN_BAR)
            note = f"<= {CLEAN_BAR}" + " MISSED" * late
        missed |= late
        print(f"{what:28s}", *(f"{v:13.4f}" for v in values), f"{np.mean(spent):6.1f}", " ", note, flush=True)
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
