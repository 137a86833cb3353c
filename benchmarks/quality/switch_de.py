"""switchDE beside the R package's likelihood maximised by scipy, and its chi-squared: one table from one run.

    uv run python -m benchmarks.quality.switch_de            # accuracy, null, time course
    uv run python -m benchmarks.quality.switch_de --cost     # 20,000 genes x 50,000 cells

- synthetic: `switchde_mle.csv` (peers/scripts/p12_misc.py and p14_more.py, stored), the maximum-likelihood values of
  12 genes of 100 cells shipped with the R package, by scipy's L-BFGS-B from six starts. R itself was not run.
- null: 500 genes of one normal law each, 100 and 300 cells, mean over standard deviation 0.3 and 3, and 40 cells at 10;
  KS test of p-values against uniform, and the share below 0.05; beside, the R package's chi-squared (2) on the same
  ratios. The reference is that of 4 permutations of the same genes.
- dropout null: values 2 + N(1, 1) lost with probability exp(-0.15 x^2), both models.
- mesc: `mesc_lif_withdrawal_timecourse`, pseudotime = day; genes at q < 0.05, and with days permuted.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.quality.integration_data import REPO, data_dir
from scipy import sparse, stats

HEAD = ("data", "measure", "ours", "peer", "baseline", "bar")
CELLS, GENES = 50_000, 20_000


def references() -> Path:
    """Folder of the stored results."""
    return Path(os.environ.get("DIFFBIO_REFERENCES", REPO.parent / "shared" / "peers" / "ref"))


def ours(expression: np.ndarray, times: np.ndarray, **settings: Any) -> dict[str, np.ndarray]:
    """The operator's outputs; expression (cells, genes)."""
    import jax.numpy as jnp
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiableSwitchDE, SwitchDEConfig

    op = DifferentiableSwitchDE(SwitchDEConfig(n_genes=expression.shape[1], **settings), rngs=nnx.Rngs(0))
    data = {"counts": jnp.asarray(expression, jnp.float32), "pseudotime": jnp.asarray(times, jnp.float32)}
    return {key: np.asarray(value) for key, value in op.apply(data)[0].items()}


def synthetic() -> list[tuple[str, ...]]:
    """Against stored maximum-likelihood values."""
    import pandas as pd

    given = np.load(references() / "switchde.npz")
    peer = pd.read_csv(references() / "switchde_mle.csv")
    found = ours(given["gex"].T, given["t"], n_permutations=0)
    off = {
        "largest |k - k| of 12": (np.abs(found["switch_strengths"] - peer["k"]).max(), "1e-2"),
        "largest |t0 - t0| of 12": (np.abs(found["switch_times"] - peer["t0"]).max(), "1e-2"),
        "lowest log-likelihood difference": ((found["log_likelihood"] - peer["ll1"]).min(), "-1e-3"),
        "largest |log10 p - log10 p| (chi-squared)": (np.abs(np.log10(found["p_values"] / peer["p"])).max(), "0.05"),
    }
    rows = [("synth_gex", what, f"{value:.1e}", "0 stored", "-", bar) for what, (value, bar) in off.items()]
    calibrated = ours(given["gex"].T, given["t"], n_permutations=200)["p_values"]
    counts = [int((p < 0.05 / 12).sum()) for p in (calibrated, peer["p"])]
    return [*rows, ("synth_gex", "p < 0.05 / 12", f"{counts[0]}", f"{counts[1]} stored", "-", "-")]


def null_rows() -> list[tuple[str, ...]]:
    """Uniformity of p-values where nothing switches."""
    rng, rows = np.random.default_rng(0), []
    sets = [(f"{n} cells, mean / sd {level:g}", level, n, False) for n in (100, 300) for level in (0.3, 3)]
    sets += [("40 cells, mean / sd 10", 10.0, 40, False)]
    sets += [("dropout, 200 cells", 3.0, 200, False), ("dropout, 200 cells, zero-inflated", 3.0, 200, True)]
    for name, level, n, inflated in sets:
        values = level + rng.normal(size=(n, 500))
        if name.startswith("dropout"):
            values = np.where(rng.random(values.shape) < np.exp(-0.15 * values**2), 0.0, np.maximum(values, 0.05))
        found = ours(values, rng.random(n), zero_inflated=inflated, n_permutations=4)
        chi2 = np.exp(-(found["log_likelihood"] - found["null_log_likelihood"]))
        ks = [stats.kstest(p, "uniform").pvalue for p in (found["p_values"], chi2)]
        low = [(p < 0.05).mean() for p in (found["p_values"], chi2)]
        rows.append((f"null, {name}", "KS p", f"{ks[0]:.2f}", f"{ks[1]:.1e} (chi2)", "-", ">= 0.05"))
        rows.append((f"null, {name}", "share below 0.05", f"{low[0]:.3f}", f"{low[1]:.3f} (chi2)", "-", "-"))
    return rows


def time_course() -> list[tuple[str, ...]]:
    """Days of differentiation as pseudotime."""
    import anndata

    import diffbio

    adata = anndata.read_h5ad(data_dir() / "mesc_lif_withdrawal_timecourse.h5ad")
    adata.obs["time"] = adata.obs["day"].astype(str).astype(float).to_numpy()
    started = time.process_time()
    diffbio.tl.switch_de(adata, pseudotime_key="time")
    seconds = time.process_time() - started
    table = adata.uns["diffbio_switch_de"]
    marks = " ".join(
        f"{g} {table.loc[g, 'k']:+.2f}" for g in ("Zfp42", "Tdh", "Dppa5a", "Krt8", "Krt18") if g in table.index
    )
    rows = [
        ("mesc", "genes at q < 0.05", f"{(table['qvalue'] < 0.05).sum()} of {len(table)}", "-", "-", "-"),
        ("mesc", "k of pluripotency genes (down) and keratins (up)", marks, "-", "-", "signs"),
        ("mesc", "CPU s with compilation", f"{seconds:.0f}", "-", "-", "-"),
    ]
    adata.obs["time"] = np.random.default_rng(0).permutation(adata.obs["time"].to_numpy())
    diffbio.tl.switch_de(adata, pseudotime_key="time", random_state=1)
    p = adata.uns["diffbio_switch_de"]["pvalue"]
    rows.append(("mesc, days permuted", "KS p", f"{stats.kstest(p, 'uniform').pvalue:.2f}", "-", "-", ">= 0.05"))
    return rows


def cost() -> list[tuple[str, ...]]:
    """20,000 genes of 50,000 cells, 5 % of entries above 0."""
    import anndata

    import diffbio

    rng = np.random.default_rng(0)
    per_cell = GENES // 20
    columns = np.concatenate([rng.choice(GENES, per_cell, replace=False).astype(np.int32) for _ in range(200)])
    columns = np.tile(columns.reshape(200, per_cell), (CELLS // 200, 1))
    columns = np.sort((columns + rng.integers(0, GENES, (CELLS, 1), dtype=np.int32)) % GENES, axis=1)
    counts = rng.poisson(1.0, columns.size).astype(np.float32) + 1
    indptr = np.arange(0, columns.size + 1, per_cell)
    adata = anndata.AnnData(sparse.csr_matrix((counts, columns.ravel(), indptr), shape=(CELLS, GENES)))
    adata.obs["time"] = rng.random(CELLS)
    before, started, wall = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    diffbio.tl.switch_de(adata, pseudotime_key="time")
    seconds, wall = time.process_time() - started, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    name = f"{GENES:,} genes x {CELLS:,} cells, 5 % above 0"
    return [
        (name, "minutes of wall (CPU)", f"{wall / 60:.1f} ({seconds / 60:.1f})", "-", "-", "minutes"),
        (name, "peak memory, GiB (with the data before)", f"{peak:.1f} ({before / 2**20:.1f})", "-", "-", "< 8"),
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cost", action="store_true")
    rows = cost() if parser.parse_args().cost else [*synthetic(), *null_rows(), *time_course()]
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
