"""Ligand-receptor scores beside LIANA 1.10.0, and planted communication: one table from one run.

    uv run python -m benchmarks.quality.communication          # both; about three CPU minutes
    uv run python -m benchmarks.quality.communication --cost   # 50,000 cells

LIANA runs in its own environment (peers/make_liana_env.sh); without it, the rows of the stored references stand in (the
folder named in DIFFBIO_REFERENCES, else `../shared/peers/ref`: its 500 highest means, its 300 best by the consensus).

- pbmc3k: the nine cell types, human pairs of `ligand_receptor_pairs.csv` (LIANA's consensus resource), 10 % expressed.
  means: largest difference over all rows of LIANA's table. p-values: with LIANA's own 100 permutations given to ours,
  and with 100 and 1,000 of our own; dp: largest difference. consensus: Spearman over all rows, and how many of LIANA's
  first 100 are among our first 100, by the magnitude rank. "as LIANA" ranks NATMI's product twice, as LIANA 1.10 does
  (config.product_twice), which turns one of its three lists around; "once" is our default. Baseline: the mean alone.
- planted: real counts of `starmap_mpfc_two_slices`, 6 nearest neighbours in a slice, 40 pairs of genes drawn from those
  in 10-60 % of the cells, of which 10 act: in a receiver with the receptor, 4 response genes each get additional
  Poisson counts of mean effect x max(mean of the gene, 0.5) x share of neighbours that have the ligand. Scored without
  knowing types: "pairs", AUROC of `pair_strengths` for the 10 that act among the 40; "edges", AUROC of
  `communication_scores` for the acting pairs, over all (edge, pair) in which sender has ligand and receiver has
  receptor. Baseline: the product of ligand and receptor (its mean over edges for pairs), as co-expression methods have.
- cost: CPU-seconds and peak memory of a process of its own; LIANA's seconds are those of the run or stored.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmarks.quality.integration_data import REPO, RESULTS, data_dir

PEER_PYTHON = REPO / "benchmarks" / "envs" / "liana" / "bin" / "python"
PEER_RESULTS = RESULTS / "communication_liana.json"
CACHE = REPO / "benchmarks" / "cache" / "communication"
KEYS = ["source", "target", "ligand_complex", "receptor_complex"]
HEAD = ("data", "measure", "ours", "LIANA 1.10.0", "baseline", "bar")
WIDTHS = (26, 44, 18, 14, 16, 22)
N_LIANA = 100  # permutations
SEEDS, EFFECT, NEIGHBORS = (0, 1, 2), 2.0, 6


class Planted(NamedTuple):
    """Counts with effects, and the truth."""

    counts: np.ndarray  # (cells, genes)
    pairs: np.ndarray  # (pairs, 2)
    acting: np.ndarray  # (pairs,)
    graph: np.ndarray  # (2, edges)


def references() -> Path:
    """Folder of the stored results."""
    return Path(os.environ.get("DIFFBIO_REFERENCES", REPO.parent / "shared" / "peers" / "ref"))


def human_pairs() -> Any:
    """The resource, as a table."""
    from diffbio.data.lr_resource import read_pairs

    return read_pairs(data_dir() / "ligand_receptor_pairs.csv", species="human")


def liana() -> tuple[Any, Any, dict[str, float], str]:
    """CellPhoneDB's table, the consensus, CPU seconds, and whether they are of this run."""
    import pandas as pd

    if not PEER_PYTHON.exists():
        tables = [pd.read_csv(references() / f"liana_{name}.csv") for name in ("cpdb_top500", "rank_aggregate_top300")]
        seconds = json.loads(PEER_RESULTS.read_text()) if PEER_RESULTS.exists() else {}
        return *tables, seconds, "stored"
    CACHE.mkdir(parents=True, exist_ok=True)
    human_pairs().to_csv(CACHE / "human.csv", index=False)
    folder = CACHE / "pbmc3k"
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    subprocess.run(
        [PEER_PYTHON, REPO / "benchmarks" / "peers" / "run_liana.py", data_dir() / "pbmc3k.h5ad", CACHE / "human.csv",
         folder], check=True, env={**os.environ, **one}, capture_output=True,
    )  # fmt: skip
    seconds = json.loads((folder / "seconds.json").read_text())
    PEER_RESULTS.write_text(json.dumps(seconds, indent=1) + "\n")
    return *(pd.read_csv(folder / f"{name}.csv") for name in ("cellphonedb", "rank_aggregate")), seconds, "live"


def pbmc() -> dict[str, Any]:
    """What the operator reads of pbmc3k, and names."""
    import anndata

    from diffbio.data.lr_resource import pair_columns
    from diffbio.data.transform import shifted_log
    from diffbio.tl.ligand_receptor import dense, memberships, used_genes

    adata = anndata.read_h5ad(data_dir() / "pbmc3k.h5ad")
    found = pair_columns(human_pairs(), list(adata.var_names))
    genes, columns = used_genes(found.columns)
    names, groups = memberships(adata, "cell_type", "benchmark")
    values = dense(shifted_log(adata.X, total=1e4)[:, genes])
    return {"counts": values, "lr_pairs": columns, "cluster_assignments": groups, "names": names, "table": found.table}


def scored(cells: dict[str, Any], permutations: np.ndarray | None = None, **settings: Any) -> dict[str, Any]:
    """All outputs of the operator, jitted."""
    import jax
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiableLigandReceptor, LRScoringConfig

    op = DifferentiableLigandReceptor(LRScoringConfig(**settings), rngs=nnx.Rngs(0))
    data = {key: cells[key] for key in ("counts", "lr_pairs", "cluster_assignments")}
    data |= {} if permutations is None else {"permutations": permutations}
    graph, state = nnx.split(op)
    run = jax.jit(lambda state, data: nnx.merge(graph, state).apply(data)[0])
    found: dict[str, Any] = jax.device_get(run(state, data))
    return found


def joined(cells: dict[str, Any], found: dict[str, Any], table: Any) -> tuple[Any, int]:
    """Our values beside the rows of LIANA's table, and how many rows we have."""
    import pandas as pd

    pair, source, target = np.nonzero(found["lr_expressed"] > 0.5)
    names = np.array(cells["names"])
    scores = [key for key in found if key.startswith("lr_") and key != "lr_pairs"]
    ours = pd.DataFrame({key: found[key][pair, source, target] for key in scores})
    ours[KEYS] = np.column_stack([
        names[source], names[target], cells["table"]["ligand"].to_numpy(str)[pair],
        cells["table"]["receptor"].to_numpy(str)[pair],
    ])  # fmt: skip
    return table.merge(ours, on=KEYS), len(ours)


def spearman(a: Any, b: Any) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def shared_top(a: Any, b: Any, n: int = 100) -> int:
    """How many of the first n by one are among the first n by the other; the lowest first."""
    first = [set(np.argsort(np.asarray(x), kind="stable")[:n].tolist()) for x in (a, b)]
    return len(first[0] & first[1])


def lr_rows() -> None:
    """Rows on pbmc3k."""
    means, ranks, seconds, how = liana()
    cells = pbmc()
    n = len(cells["counts"])
    rng = np.random.default_rng(0)
    orders = np.stack([np.argsort(rng.permutation(n)) for _ in range(N_LIANA)]).astype(np.int32)
    start = time.process_time()
    same = scored(cells, orders, n_permutations=N_LIANA, product_twice=True)
    taken = time.process_time() - start
    own = scored(cells, n_permutations=N_LIANA)
    many = scored(cells, n_permutations=1000)
    data = f"pbmc3k ({how})"
    table, rows = joined(cells, same, means)
    worst = np.abs(table["lr_scores"] - table["lr_means"]).max()
    say((data, "rows: expressed pairs", str(rows), str(len(means)), "", "equal"))
    say((data, f"means: largest difference, {len(table)} rows", f"{worst:.1e}", "0", "", "<= 1e-5"))
    for what, found in (("LIANA's permutations", same), ("own 100", own), ("own 1,000", many)):
        table, _ = joined(cells, found, means)
        p, q = table["lr_pvalues"], table["cellphone_pvals"]
        mostly = np.quantile(np.abs(p - q), 0.99)
        text = f"{spearman(p, q):.4f}, {np.abs(p - q).max():.3f} ({mostly:.3f})"
        say((data, f"p, {what}: Spearman, dp (99 %)", text, "1, 0", "", ">= 0.98, <= 0.1"))
    table, _ = joined(cells, many, means)
    text = f"{spearman(table['lr_analytic_pvalues'], table['lr_pvalues']):.4f}, "
    text += f"{np.abs(table['lr_analytic_pvalues'] - table['lr_pvalues']).max():.3f}"
    say((data, "analytic p against own 1,000: Spearman, dp", text, "", "", ""))
    for what, found in (("as LIANA", same), ("once", many)):
        table, _ = joined(cells, found, ranks)
        m, mine, alone = table["magnitude_rank"], table["lr_magnitude_rank"], -table["lr_scores"]
        text, base = (f"{spearman(x, m):.4f}, {shared_top(x, m)}" for x in (mine, alone))
        say((data, f"consensus, {what}: Spearman, top 100", text, "1, 100", base, ">= 0.9, >= 80"))
    table, _ = joined(cells, same, ranks)
    both = table["specificity_rank"], table["lr_specificity_rank"]
    say((data, "consensus of specificity: Spearman, top 100", f"{spearman(*both):.4f}, {shared_top(*both)}", "1, 100",
         f"{spearman(both[0], -table['lr_specificity']):.4f}", ">= 0.9"))  # fmt: skip
    theirs = f"{seconds.get('rank_aggregate', float('nan')):.1f}"
    say((data, "CPU seconds, all scores, 100 permutations", f"{taken:.1f} (compiles)", theirs, "", ""))


def neighbors(points: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """Senders and receivers (2, edges)."""
    from diffbio.math.neighbors import knn

    senders = np.empty((len(points), NEIGHBORS), int)
    for code in np.unique(slices):
        cells = np.flatnonzero(slices == code)
        senders[cells] = cells[np.asarray(knn(points[cells], NEIGHBORS).indices)]
    return np.stack([senders.ravel(), np.repeat(np.arange(len(points)), NEIGHBORS)]).astype(np.int32)


def planted(seed: int, *, effect: float = EFFECT, n_pairs: int = 40, n_acting: int = 10, n_genes: int = 4) -> Planted:
    """Real cells with effects of some pairs, as the head of this file says."""
    import anndata

    adata = anndata.read_h5ad(data_dir() / "starmap_mpfc_two_slices.h5ad")
    counts = np.asarray(adata.X.todense(), float)
    graph = neighbors(np.asarray(adata.obsm["spatial"]), adata.obs["batch"].to_numpy(str))
    rng = np.random.default_rng(seed)
    share = (counts > 0).mean(axis=0)
    genes = rng.permutation(np.flatnonzero((share > 0.1) & (share < 0.6)))
    ligands, receptors = genes[:25], genes[25:50]
    others = np.setdiff1d(np.flatnonzero(share > 0.1), genes[:50])
    pairs: list[tuple[int, int]] = []
    while len(pairs) < n_pairs:
        pair = int(rng.choice(ligands)), int(rng.choice(receptors))
        if pair not in pairs:
            pairs.append(pair)
    result, around = counts.copy(), graph[0].reshape(-1, NEIGHBORS)
    for ligand, receptor in pairs[:n_acting]:
        response = rng.choice(others, n_genes, replace=False)
        signal = (counts[:, receptor] > 0) * (counts[around, ligand] > 0).mean(axis=1)
        level = effect * np.maximum(counts[:, response].mean(axis=0), 0.5)
        result[:, response] += rng.poisson(level * signal[:, None])
    return Planted(result, np.array(pairs, np.int32), np.arange(n_pairs) < n_acting, graph)


def trained(cells: Planted, **settings: Any) -> tuple[dict[str, Any], float]:
    """The operator fitted on log-normalised counts: what it found, CPU seconds."""
    import jax
    from flax import nnx

    import diffbio
    from diffbio.data.transform import shifted_log
    from diffbio.operators.singlecell import CellCommunicationConfig, DifferentiableCellCommunication

    values = shifted_log(cells.counts, total=1e4)
    data = {"counts": values, "lr_pairs": cells.pairs, "spatial_graph": cells.graph}
    config = CellCommunicationConfig(n_genes=values.shape[1], n_lr_pairs=len(cells.pairs), **settings)
    op = DifferentiableCellCommunication(config, rngs=nnx.Rngs(0))
    start = time.process_time()
    diffbio.fit(op, data, progress=False)
    seconds = time.process_time() - start
    found: dict[str, Any] = jax.device_get(op.apply(data)[0])
    return found, seconds


def planted_rows() -> None:
    """Rows on generated effects."""
    from sklearn.metrics import roc_auc_score

    for effect, seeds in ((EFFECT, SEEDS), (1.0, SEEDS[:1])):
        scores: dict[str, list[float]] = {"pairs": [], "edges": [], "base pairs": [], "base edges": []}
        seconds = 0.0
        for seed in seeds:
            cells = planted(seed, effect=effect)
            found, taken = trained(cells)
            seconds += taken / len(seeds)
            (senders, receivers), values = cells.graph, found["counts"]
            product = values[senders][:, cells.pairs[:, 0]] * values[receivers][:, cells.pairs[:, 1]]
            some = product > 0
            truth = np.broadcast_to(cells.acting, product.shape)[some]
            scores["pairs"].append(roc_auc_score(cells.acting, found["pair_strengths"]))
            scores["edges"].append(roc_auc_score(truth, found["communication_scores"][some]))
            scores["base pairs"].append(roc_auc_score(cells.acting, product.mean(axis=0)))
            scores["base edges"].append(roc_auc_score(truth, product[some]))
        data = f"planted, effect {effect:g}"
        for what in ("pairs", "edges"):
            ours, base = (", ".join(f"{x:.3f}" for x in scores[key]) for key in (what, f"base {what}"))
            bar = ">= 0.95" if effect == EFFECT else "(half the effect)"
            say((data, f"AUROC of {what}, seeds {seeds}", ours, "", base, bar))
        say((data, "CPU seconds of training", f"{seconds:.0f}", "", "", ""))


def cost(what: str) -> None:
    """One side of the cost, in a process of its own."""
    rng = np.random.default_rng(0)
    n = 50_000
    if what == "pairs":
        cells = pbmc()
        rows = rng.integers(0, len(cells["counts"]), n)
        cells |= {key: cells[key][rows] for key in ("counts", "cluster_assignments")}
        start = time.process_time()
        scored(cells, n_permutations=1000)
        text = f"{len(cells['lr_pairs'])} pairs, {cells['counts'].shape[1]} genes, 1,000 permutations"
    else:
        small = planted(0)
        rows = rng.integers(0, len(small.counts), n)
        graph = neighbors(rng.uniform(size=(n, 2)), np.zeros(n))
        start = time.process_time()
        trained(small._replace(counts=small.counts[rows], graph=graph))
        text = f"{len(small.pairs)} pairs, {small.counts.shape[1]} genes, 300 epochs"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = f"{time.process_time() - start:.0f} s, {peak:.1f} GB"
    say((f"cost, 50,000 {'cells' if what == 'pairs' else 'spots'}", text, seconds, "", "", "minutes, < 8 GB"))


def say(row: tuple[str, ...]) -> None:
    """One line of the table."""
    print("  ".join(f"{entry:<{width}}" for entry, width in zip(row, WIDTHS, strict=True)).rstrip(), flush=True)


def main() -> None:
    """Prints the table, or the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--part", choices=("pairs", "planted"))
    parser.add_argument("--side", choices=("pairs", "network"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.side:
        cost(arguments.side)
        return
    say(HEAD)
    if arguments.cost:
        for side in ("pairs", "network"):
            subprocess.run([sys.executable, "-m", "benchmarks.quality.communication", "--side", side], check=True)
        return
    if arguments.part != "planted":
        lr_rows()
    if arguments.part != "pairs":
        planted_rows()


if __name__ == "__main__":
    main()
