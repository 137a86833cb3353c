"""Differential distributions beside Wilcoxon, Kolmogorov-Smirnov and plain permutation tests: one table from one run.

    uv run python -m benchmarks.quality.differential_distribution

- alternatives: the generator of peers.md (peers/scripts/p14_more.py): normal mixtures, 150 + 150 cells, 100 genes each;
  share with p < 0.05. "MMD" and "W2" of the baseline are that script's tests, 200 permutations, run here; scDD and
  waddR are R packages and were not run.
- pattern: share of the 100 genes that get the right name, whatever their p-value.
- levels: 500 null genes each. normal; zero-inflated: each value is lost with probability 0.5; library size: negative
  binomial counts (overdispersion 0.3, means 0.3 to 20) of 150 cells at depth exp(N(0, 0.3)) and 150 at twice that,
  log-normalised to the median total; both: half of these counts lost beside. "adjusted": with `library_size`.
- kang: `kang_pbmc_ifnb`, stimulated against control, all cells; ranks of interferon genes by p-value, then statistic.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from typing import Any

import numpy as np
from benchmarks.quality.integration_data import data_dir
from scipy import stats

KINDS = ("DE", "DP", "DM", "DB", "DV")
N, REPEATS, NULLS = 150, 100, 500
HEAD = ("data", "measure", "ours W2", "ours MMD", "Wilcoxon", "KS", "MMD perm.", "W2 perm.", "bar")


def mixture(rng: np.random.Generator, *parts: tuple[float, int]) -> np.ndarray:
    """Normal values of unit variance around several means."""
    return np.concatenate([rng.normal(mean, 1, size) for mean, size in parts])


def pair(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Both conditions of one gene, as in peers/scripts/p14_more.py."""
    n, less, more = N, int(0.35 * N), int(0.65 * N)
    first = [(0.0, less), (4.0, n - less)] if kind == "DP" else [(0.0, n)]
    second = {
        "null": [(0.0, n)], "DE": [(0.7, n)], "DP": [(0.0, more), (4.0, n - more)],
        "DM": [(0.0, n // 2), (4.0, n - n // 2)], "DB": [(-1.6, n // 2), (1.6, n - n // 2)], "DV": [(0.0, n)],
    }[kind]  # fmt: skip
    return np.concatenate([mixture(rng, *first), mixture(rng, *second) * (2.0 if kind == "DV" else 1.0)])


def null_sets(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Expression (cells, genes) and library sizes of the null sets."""
    normal = np.stack([pair(rng, "null") for _ in range(NULLS)], axis=1)
    lost = np.where(rng.random((2 * N, NULLS)) < 0.5, 0.0, np.abs(3.0 + rng.normal(size=(2 * N, NULLS))))
    depth = np.exp(rng.normal(0, 0.3, 2 * N)) * np.repeat([1.0, 2.0], N)
    means = np.exp(rng.uniform(np.log(0.3), np.log(20.0), NULLS)) * depth[:, None]
    counts = rng.poisson(means * rng.gamma(1 / 0.3, 0.3, means.shape))
    dropped = counts * (rng.random(counts.shape) < 0.5)
    sets: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"normal": (normal, None), "zero-inflated": (lost, None)}
    for name, matrix in (("library size", counts), ("both", dropped)):
        total = matrix.sum(axis=1)
        logs = np.log1p(matrix * np.median(total) / total[:, None])
        sets[name] = (logs, None)
        sets[f"{name}, adjusted"] = (logs, total.astype(float))
    return sets


def ours(expression: np.ndarray, labels: np.ndarray, library: np.ndarray | None, statistic: str) -> dict[str, Any]:
    """The operator's outputs."""
    import jax.numpy as jnp
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiableDifferentialDistribution, DifferentialDistributionConfig

    config = DifferentialDistributionConfig(n_genes=expression.shape[1], statistic=statistic)
    op = DifferentiableDifferentialDistribution(config, rngs=nnx.Rngs(0))
    data = {"counts": jnp.asarray(expression, jnp.float32), "condition_labels": jnp.asarray(labels)}
    if library is not None:
        data["library_size"] = jnp.asarray(library, jnp.float32)
    return {key: np.asarray(value) for key, value in op.apply(data)[0].items()}


def plain_tests(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, count: int = 200) -> list[float]:
    """P-values of Wilcoxon, KS, and permutation tests of MMD and W2, as peers/scripts/p14_more.py."""
    z, n = np.r_[x, y], len(x)
    square = (z[:, None] - z) ** 2
    kernel = np.exp(-square / np.median(square[square > 0]))
    signs = np.r_[np.ones(n) / n, -np.ones(len(y)) / len(y)]
    dealt = np.stack([rng.permutation(signs) for _ in range(count)])
    mmd = (1 + ((dealt @ kernel * dealt).sum(axis=1) >= signs @ kernel @ signs).sum()) / (count + 1)
    distance, hits = ((np.sort(x) - np.sort(y)) ** 2).mean(), 0
    for _ in range(count):
        p = rng.permutation(z)
        hits += ((np.sort(p[:n]) - np.sort(p[n:])) ** 2).mean() >= distance
    return [stats.ranksums(x, y).pvalue, stats.ks_2samp(x, y).pvalue, mmd, (1 + hits) / (count + 1)]


def row(name: str, measure: str, expression: np.ndarray, library: np.ndarray | None, bar: str, some: int) -> list[Any]:
    """Rejected shares of all tests; the plain ones on the first `some` genes."""
    labels, rng = np.repeat([0, 1], N), np.random.default_rng(1)
    found = [(ours(expression, labels, library, s)["p_values"] < 0.05).mean() for s in ("wasserstein", "mmd")]
    plain: list[str] = ["-"] * 4
    if library is None:
        p = np.array([plain_tests(*np.split(x, 2), rng) for x in expression.T[:some]])
        plain = [f"{share:.3f}" for share in (p < 0.05).mean(axis=0)]
    return [name, measure, *(f"{share:.3f}" for share in found), *plain, bar]


def kang() -> list[list[Any]]:
    """Ranks of interferon genes."""
    import anndata

    import diffbio

    adata = anndata.read_h5ad(data_dir() / "kang_pbmc_ifnb.h5ad")
    started = time.process_time()
    diffbio.tl.differential_distribution(adata, "condition", groups=["ctrl", "stim"])
    seconds = time.process_time() - started
    table = adata.uns["diffbio_differential_distribution"]
    order = np.lexsort((-table["statistic"], table["pvalue"]))
    rank = {str(name): place + 1 for place, name in enumerate(table.index[order])}
    blank = ["-"] * 5
    known = ("ISG15", "IFI6", "IFIT1")
    rows: list[list[Any]] = [["kang", f"rank of {g}", str(rank[g]), *blank, "on top"] for g in known]
    rows.append(["kang", "top 5", " ".join(map(str, table.index[order[:5]])), *blank, "-"])
    rows.append(["kang", "q < 0.05 of all", f"{(table['qvalue'] < 0.05).sum()} of {len(table)}", *blank, "-"])
    return [*rows, ["kang", "CPU s with compilation", f"{seconds:.0f}", *blank, "-"]]


def main() -> None:
    """Prints the table."""
    from diffbio.math.distribution_patterns import PATTERNS

    rng = np.random.default_rng(0)
    rows = []
    for kind in KINDS:
        expression = np.stack([pair(rng, kind) for _ in range(REPEATS)], axis=1)
        rows.append(row(kind, "power", expression, None, ">= 0.98", REPEATS))
        labels = ours(expression, np.repeat([0, 1], N), None, "wasserstein")["pattern_labels"]
        named = [(labels == code).mean() for code in range(len(PATTERNS))]
        right = named[PATTERNS.index(kind)]
        others = ", ".join(f"{p} {s:.2f}" for p, s in zip(PATTERNS, named, strict=True) if s and p != kind)
        rows.append([kind, f"pattern right ({others or 'no other'})", f"{right:.2f}", *["-"] * 5, ">= 0.80"])
    for name, (expression, library) in null_sets(rng).items():
        rows.append(row(f"null, {name}", "level", expression, library, "0.02-0.06", REPEATS))
    rows += kang()
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for line in rows:
        print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
    main()
