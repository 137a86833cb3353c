"""Simulated beside real counts: Kolmogorov-Smirnov distances of their statistics, ours and Splatter's.

    uv run python -m benchmarks.quality.simulator
    uv run python -m benchmarks.quality.simulator --cost

Counts of ``pbmc3k`` and ``scmix_cell_lines`` (genes in 3 cells or more). Each side sees the real counts and simulates
as many cells (mean of three seeds):

- Splatter: plain Splat, restated in numpy, with Splatter's own estimates (splatEstimate; no R package is run);
- drawn, estimated / fitted: our simulator with genes drawn from Splat's laws, 1 group, before and after `diffbio.fit`;
- kept, estimated / fitted: a mean, dispersion and group factors of each gene, 8 groups and 10 programmes.

The bar for "kept, fitted" is Splatter's distance. The baseline is the real data itself: one half of the cells against
the other. Then KS p-values against the stored statistics of a Splat run with default parameters (2,000 genes x 1,000
cells): seeds of ten with p > 0.01, bar 9.

``--cost`` measures matrix entries per CPU-minute and the memory of a file of 10,000, 50,000 and 200,000 cells x 2,000
genes, each in a process of its own; the bar is 1e8, and a peak that does not grow.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.quality.harmony import data_folder

SEEDS = 3
EXAMPLE = {"n_genes": 2000, "n_groups": 6, "n_batches": 2, "lib_loc": 8.0}


def splat(params: dict[str, Any], n_cells: int, n_genes: int, seed: int) -> np.ndarray:
    """Splat without groups (Zappia 2017) in numpy: the peer."""
    rng = np.random.default_rng(seed)
    means = rng.gamma(params["mean_shape"], 1 / params["mean_rate"], n_genes)
    out = rng.random(n_genes) < params["out_prob"]
    factors = rng.lognormal(params.get("out_fac_loc", 4.0), params.get("out_fac_scale", 0.5), n_genes)
    means = np.where(out, np.median(means) * factors, means)
    if params["lib_norm"]:
        library = rng.normal(params["lib_loc"], params["lib_scale"], n_cells)
        library = np.where(library < 0, library[library > 0].min() / 2, library)
    else:
        library = rng.lognormal(params["lib_loc"], params["lib_scale"], n_cells)
    mu = np.maximum(means / means.sum() * library[:, None], 1e-12)
    df = params["bcv_df"]
    bcv = (params["bcv_common"] + 1 / np.sqrt(mu)) * np.sqrt(df / rng.chisquare(df, n_genes))
    return rng.poisson(rng.gamma(1 / bcv**2, mu * bcv**2))


def real_counts(name: str) -> np.ndarray:
    """Counts of a data set, genes that three cells have."""
    import anndata

    adata = anndata.read_h5ad(data_folder() / f"{name}.h5ad")
    counts = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, np.float32)
    counts = counts[counts.sum(axis=1) > 0]
    return counts[:, (counts > 0).sum(axis=0) >= 3]


def distances(real: np.ndarray, make: Any) -> dict[str, float]:
    """Mean over seeds of the KS distances."""
    from diffbio.math.count_statistics import statistics_ks

    found = [statistics_ks(real, make(seed)) for seed in range(SEEDS)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def ours(real: np.ndarray, *, fitted: bool, **settings: Any) -> Any:
    """The simulator after its start from data, and training."""
    from flax import nnx

    import diffbio
    from diffbio.operators.singlecell import DifferentiableSimulator, SimulationConfig

    config = SimulationConfig(n_genes=real.shape[1], n_cells=len(real), **settings)
    simulator = DifferentiableSimulator(config, rngs=nnx.Rngs(0))
    if fitted:
        diffbio.fit(simulator, {"counts": real}, progress=False)
    else:
        simulator.init_from({"counts": real})

    def make(seed: int) -> Any:
        from diffbio.data import simulated

        return simulated(simulator, len(real), seed=seed).X

    return make


def statistics() -> bool:
    """Print the tables of distances; tell whether a bar is missed."""
    from diffbio.math.count_statistics import STATISTICS, statistics_ks
    from diffbio.math.splat_estimates import estimate_splat

    missed = False
    kept = {"gene_values": "kept", "n_groups": 8, "n_programs": 10}
    for name in ("pbmc3k", "scmix_cell_lines"):
        real = real_counts(name)
        print(f"\n{name}: {len(real):,} cells x {real.shape[1]:,} genes; Kolmogorov-Smirnov distances")
        print(f"{'':24s}" + "".join(f"{s:>14s}" for s in STATISTICS) + f"{'CPU s':>8s}", flush=True)

        def row(what: str, found: dict[str, float], seconds: float) -> None:
            print(f"{what:24s}" + "".join(f"{found[s]:14.3f}" for s in found) + f"{seconds:8.0f}", flush=True)

        order = np.random.default_rng(0).permutation(len(real))
        row("halves of the real data", statistics_ks(real[order[::2]], real[order[1::2]]), 0.0)
        start = time.process_time()
        params = estimate_splat(real)
        peer = distances(real, lambda seed: splat(params, *real.shape, seed))  # noqa: B023
        row("Splatter's formulas", peer, time.process_time() - start)
        for what, settings, fitted in (
            ("drawn, estimated", {"n_groups": 1}, False), ("drawn, fitted", {"n_groups": 1}, True),
            ("kept, estimated", kept, False), ("kept, fitted", kept, True),
        ):  # fmt: skip
            if what.startswith("drawn"):
                settings = settings | {"lib_norm": params["lib_norm"]}
            start = time.process_time()
            found = distances(real, ours(real, fitted=fitted, **settings))
            row(what, found, time.process_time() - start)
        short = [s for s in STATISTICS if found[s] > peer[s]]
        missed |= bool(short)
        said = ("MISSED" if s in short else "met" for s in STATISTICS)
        print(f"{'bar: at most Splatter':24s}" + "".join(f"{word:>14s}" for word in said))
    return missed


def law() -> bool:
    """Print how many seeds agree with a Splat run of default parameters; tell whether a bar is missed."""
    from flax import nnx
    from scipy.stats import ks_2samp

    from diffbio.operators.singlecell import DifferentiableSimulator, SimulationConfig

    folder = Path(os.environ.get("DIFFBIO_PEERS", data_folder().parent / "peers" / "ref"))
    stored = np.load(folder / "splat_stats.npz")
    agree = {"lib": 0, "mean": 0, "zero": 0}
    for seed in range(10):
        config = SimulationConfig(n_cells=1000, n_genes=2000, n_groups=1)
        counts = np.asarray(DifferentiableSimulator(config, rngs=nnx.Rngs(seed))()["counts"])
        found = {"lib": counts.sum(1), "mean": counts.mean(0), "zero": (counts == 0).mean(0)}
        for name in agree:
            agree[name] += ks_2samp(found[name], stored[name]).pvalue > 0.01
    print("\nagainst a stored Splat run (defaults, 2,000 genes x 1,000 cells): seeds of 10 with KS p > 0.01, bar 9")
    print("".join(f"{name:>10s} {n}{'' if n >= 9 else ' MISSED'}" for name, n in agree.items()))
    return min(agree.values()) < 9


def cost() -> bool:
    """Print speed and memory of files of three sizes; tell whether a bar is missed."""
    print(f"{'cells x 2,000 genes':>20s} {'CPU s':>8s} {'entries per CPU-minute':>24s} {'peak MB':>9s}   bar 1e8, flat")
    peaks, missed = [], False
    for n_cells in (10_000, 50_000, 200_000):
        command = [sys.executable, "-m", "benchmarks.quality.simulator", "--write", str(n_cells)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = map(float, done.stdout.split()[-2:])
        speed = n_cells * EXAMPLE["n_genes"] / seconds * 60
        peaks.append(peak)
        missed |= speed < 1e8
        print(f"{n_cells:20,d} {seconds:8.1f} {speed:24.2e} {peak:9.0f}", flush=True)
    return missed or peaks[-1] > 1.3 * peaks[0]


def write(n_cells: int) -> None:
    """Write one file; print CPU seconds, compilation in them, and the peak of memory in MB."""
    import resource

    from flax import nnx

    from diffbio.data import write_simulated
    from diffbio.operators.singlecell import DifferentiableSimulator, SimulationConfig

    simulator = DifferentiableSimulator(SimulationConfig(**EXAMPLE), rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        write_simulated(simulator, Path(folder) / "cells.h5ad", n_cells=n_cells)
        print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main() -> None:
    """Print the tables; exit with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--write", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.write:
        write(args.write)
        return
    missed = [cost()] if args.cost else [law(), statistics()]
    if any(missed):
        sys.exit(1)


if __name__ == "__main__":
    main()
