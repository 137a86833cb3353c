"""Pseudotime beside scanpy's dpt, Palantir and two plain baselines: one table.

    uv run python -m benchmarks.quality.pseudotime                # about two CPU minutes
    uv run python -m benchmarks.quality.pseudotime --peer         # first runs palantir (peers/make_palantir_env.sh)
    uv run python -m benchmarks.quality.pseudotime --cost 50000   # CPU seconds and peak memory, scanpy in the same run

Spearman is the rank correlation of pseudotime with the truth; scanpy 1.12 runs here, palantir 1.4.5 in an environment
of its own, whose result stands in results/pseudotime_palantir.json (0.9937 was stored with the references before).
Baselines: the first principal component (either sign), and the Euclidean distance from the root.

- tree: generated, a trunk and three branches, 1500 x 30, three seeds (mean); truth the simulated time. Its reference
  inputs lie in the folder named in DIFFBIO_REFERENCES, else `../shared/peers/ref` beside the repository.
- krumsiek11: scanpy's, 640 x 11, Spearman of each of the four branches.
- pancreas_velocity (stage), mesc_lif_withdrawal_timecourse (day): 30 principal components of log-normalised counts of
  at most 2000 variable genes; root: of the first stage, the cell farthest from the last stage's mean.
- scmix_nine_cell_mixture: wells on a designed path, from 9 H2228 cells by way of 3 of each line to 9 of another; truth
  the step, 0 to 6; prepared alike.
- mesc, depth out: after a linear regression of the components on the logarithm of the cell's counts: days 2 and 4 of
  this set were sequenced at half the depth, which is its first component.
- mesc, learned: weights of the components trained by diffbio.fit on the days of a random half of the cells; Spearman of
  the other half, whose days were not seen: "among" when they are in the graph that is trained on, "apart" when weights
  come from the known half alone. Mean and least of five halves.
- equality: Pearson's correlation with scanpy's dpt on the same graph, all cells.
- gradient: largest relative difference of the directional derivative from central differences, in double precision.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import argparse
import json
import resource
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.quality.integration_data import REPO, RESULTS, data_dir
from scipy.stats import spearmanr

PEER_PYTHON = REPO / "benchmarks" / "envs" / "palantir" / "bin" / "python"
PEER_RESULTS = RESULTS / "pseudotime_palantir.json"
CACHE = REPO / "benchmarks" / "cache" / "pseudotime"
STORED_PALANTIR = 0.993666
HALVES = 5
Row = tuple[str, str, str, str, str, str]


def references() -> Path:
    """Folder of the stored inputs and results."""
    return Path(os.environ.get("DIFFBIO_REFERENCES", REPO.parent / "shared" / "peers" / "ref"))


def ours(x: np.ndarray, root: int, **settings: Any) -> dict[str, np.ndarray]:
    """Outputs of the operator."""
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

    op = DifferentiablePseudotime(PseudotimeConfig(root_cell_index=int(root), **settings), rngs=nnx.Rngs(0))
    return {key: np.asarray(value) for key, value in op.apply({"embeddings": np.asarray(x, np.float32)})[0].items()}


def scanpys(x: np.ndarray, root: int, n_neighbors: int = 15) -> np.ndarray:
    """Pseudotime of scanpy's dpt."""
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(np.asarray(x, np.float32))
    adata.obsm["X_pca"] = adata.X
    sc.pp.neighbors(adata, n_neighbors=n_neighbors, use_rep="X_pca", random_state=0)
    sc.tl.diffmap(adata, n_comps=15, random_state=0)
    adata.uns["iroot"] = int(root)
    sc.tl.dpt(adata, n_dcs=10)
    return adata.obs["dpt_pseudotime"].to_numpy()


def rho(found: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's correlation of the finite entries."""
    seen = np.isfinite(found)
    return float(spearmanr(found[seen], truth[seen])[0])


def baseline(x: np.ndarray, root: int, truth: np.ndarray) -> str:
    """Of the first principal component, and of the distance from the root."""
    centred = x - x.mean(axis=0)
    first = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    return f"{abs(rho(first, truth)):.3f} / {rho(np.linalg.norm(x - x[root], axis=1), truth):.3f}"


def prepared(name: str, keep: Any = None) -> Any:
    """AnnData of variable genes with 30 principal components, by scanpy, as the stored results were made."""
    import anndata
    import scanpy as sc
    import scipy.sparse as sp

    adata = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    adata.X = sp.csr_matrix(adata.X)
    if keep is not None:
        adata = adata[keep(adata.obs)].copy()
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel()
    sc.pp.filter_genes(adata, min_cells=3)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars - 1))
    adata = adata[:, adata.var.highly_variable].copy()
    sc.pp.pca(adata, n_comps=30, random_state=0)
    return adata


def root_of(x: np.ndarray, truth: np.ndarray) -> int:
    """Of the first stage, the cell farthest from the mean of the last."""
    first = np.flatnonzero(truth == np.nanmin(truth))
    last = x[truth == np.nanmax(truth)].mean(axis=0)
    return int(first[((x[first] - last) ** 2).sum(axis=1).argmax()])


def step_of(obs: Any) -> np.ndarray:
    """How far a well is from 9 cells of H2228: 9, 7, 5, 3 of them are 0 to 3, then 5, 7, 9 of another line 4 to 6."""
    start = obs["n_H2228"].to_numpy()
    other = obs[["n_H1975", "n_HCC827"]].to_numpy().max(axis=1)
    return np.where(start >= 3, (9 - start) / 2, (other + 3) / 2)


def trees() -> list[tuple[np.ndarray, np.ndarray, int]]:
    """The generated branching sets: points, time, root."""
    found = [np.load(references() / f"traj_sim_s{seed}.npz") for seed in range(3)]
    return [(z["X"], z["t"], int(z["root"])) for z in found]


def generated_rows() -> list[Row]:
    """The trees and krumsiek11."""
    import scanpy as sc

    sets = trees()
    dpt = [rho(ours(x, root)["pseudotime"], t) for x, t, root in sets]
    peer = [rho(scanpys(x, root), t) for x, t, root in sets]
    palantir = [rho(ours(x, root, method="palantir", n_waypoints=500)["pseudotime"], t) for x, t, root in sets]
    wider = [rho(ours(x, root, method="palantir", n_neighbors=20)["pseudotime"], t) for x, t, root in sets]
    if PEER_RESULTS.exists():
        stored = json.loads(PEER_RESULTS.read_text())["tree"]
        said = f"{np.mean(stored):.4f} palantir"
    else:
        said = f"{STORED_PALANTIR:.4f} stored"
    plain = baseline(sets[0][0], sets[0][2], sets[0][1]) + " (s0)"
    rows = [
        ("tree", "dpt", f"{np.mean(dpt):.4f}", f"{np.mean(peer):.4f} scanpy", plain, ">= scanpy, 0.979"),
        ("tree", "palantir", f"{np.mean(palantir):.4f}", said, plain, ">= 0.994"),
        ("tree", "palantir, 20 neighbours", f"{np.mean(wider):.4f}", said, plain, ">= 0.994"),
    ]
    adata = sc.datasets.krumsiek11()
    x, order = np.asarray(adata.X), np.arange(160)
    named = {
        "dpt": (ours(x, 0, n_neighbors=20)["pseudotime"], scanpys(x, 0, 20)),
        "palantir": (ours(x, 0, method="palantir")["pseudotime"], None),
    }
    flat = np.linalg.norm(x - x[0], axis=1)

    def branches(found: np.ndarray) -> str:
        return " ".join(f"{rho(found[160 * i : 160 * (i + 1)], order):.3f}" for i in range(4))

    for method, (mine, other) in named.items():
        said = "-" if other is None else branches(other) + " scanpy"
        bar = ".977 .975 .981 .871" if method == "dpt" else "-"
        rows.append(("krumsiek11", method, branches(mine), said, branches(flat) + " distance", bar))
    return rows


def real_rows() -> list[Row]:
    """Pancreas, mESC, and the nine-cell mixture."""
    rows: list[Row] = []
    sets = {
        "pancreas_velocity": ("stage_rank", None, ">= scanpy, 0.947"),
        "mesc_lif_withdrawal_timecourse": ("day", None, ">= scanpy, 0.456"),
        "scmix_nine_cell_mixture": (None, lambda obs: (obs.on_trajectory & ~obs.poor_quality).to_numpy(), ">= scanpy"),
    }
    for name, (key, keep, bar) in sets.items():
        adata = prepared(name, keep)
        truth = step_of(adata.obs) if key is None else adata.obs[key].astype(str).astype(float).to_numpy()
        x = np.asarray(adata.obsm["X_pca"])
        root = root_of(x, truth)
        plain = baseline(x, root, truth)
        peer = rho(scanpys(x, root, 30), truth)
        short = name.split("_")[0]
        mine = rho(ours(x, root, n_neighbors=30)["pseudotime"], truth)
        rows.append((short, "dpt", f"{mine:.3f}", f"{peer:.3f} scanpy", plain, bar))
        mine = rho(ours(x, root, method="palantir")["pseudotime"], truth)
        rows.append((short, "palantir", f"{mine:.3f}", "-", plain, "-"))
        if short == "mesc":
            rows += hidden_by_depth(x, truth, np.log(adata.obs["depth"].to_numpy()))
            rows.append(learned(x, truth))
    return rows


def hidden_by_depth(x: np.ndarray, day: np.ndarray, depth: np.ndarray) -> list[Row]:
    """With the linear effect of depth taken out of the components."""
    design = np.column_stack([np.ones(len(depth)), depth])
    rest = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
    root = root_of(rest, day)
    plain, peer = baseline(rest, root, day), rho(scanpys(rest, root, 30), day)
    found = []
    for method, settings in (("dpt", {"n_neighbors": 30}), ("palantir", {"method": "palantir"})):
        mine = rho(ours(rest, root, **settings)["pseudotime"], day)
        said = f"{peer:.3f} scanpy" if method == "dpt" else "-"
        found.append(("mesc, depth out", method, f"{mine:.3f}", said, plain, "> 0.6, one mode"))
    return found


def learned(x: np.ndarray, day: np.ndarray) -> Row:
    """Weights of the components from the days of half of the cells; the other half's Spearman."""
    from flax import nnx

    from diffbio import fit
    from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

    x = (x / x.std(axis=0).mean()).astype(np.float32)

    def trained(cells: np.ndarray, known: np.ndarray) -> Any:
        config = PseudotimeConfig(n_neighbors=30, learn_metric="weights", n_features=x.shape[1])
        op = DifferentiablePseudotime(config, rngs=nnx.Rngs(0))
        time_of = np.where(known, day, np.nan)[cells].astype(np.float32)
        root = root_of(x[cells], time_of)
        fit(op, {"embeddings": x[cells], "root_cell_index": np.array(root), "time": time_of}, progress=False)
        return op, cells[root]

    among, apart, plain = [], [], []
    everything = np.arange(len(day))
    for seed in range(HALVES):
        known = np.random.default_rng(seed).random(len(day)) < 0.5
        op, root = trained(everything, known)
        found = op.apply({"embeddings": x, "root_cell_index": np.array(root)})[0]["pseudotime"]
        among.append(rho(np.asarray(found)[~known], day[~known]))
        op, root = trained(np.flatnonzero(known), known)
        cells = np.append(root, np.flatnonzero(~known))  # the root is the only known cell in the graph
        found = op.apply({"embeddings": x[cells], "root_cell_index": np.array(0)})[0]["pseudotime"]
        apart.append(rho(np.asarray(found)[1:], day[cells[1:]]))
        design = np.column_stack([np.ones(len(day)), x])  # a plain baseline that sees the same days
        weights = np.linalg.lstsq(design[known], day[known], rcond=None)[0]
        plain.append(rho(design[~known] @ weights, day[~known]))
    mine = ", ".join(f"{name} {np.mean(v):.3f} ({np.min(v):.3f})" for name, v in (("among", among), ("apart", apart)))
    return ("mesc, learned", "dpt", mine, "-", f"{np.mean(plain):.3f} regression on the same days", "> 0.6")


def equality_rows() -> list[Row]:
    """Against scanpy's dpt on the graph of the same components."""
    rows: list[Row] = []
    for name in ("pbmc3k", "pancreas_endocrinogenesis"):
        adata = prepared(name)
        x = np.asarray(adata.obsm["X_pca"])
        root = int(x[:, 0].argmin())
        mine, peer = ours(x, root)["pseudotime"], scanpys(x, root)
        both = np.isfinite(mine) & np.isfinite(peer)
        same = np.corrcoef(mine[both], peer[both])[0, 1]
        off = np.abs(mine[both] - peer[both]).max()
        agree = int((np.isfinite(mine) != np.isfinite(peer)).sum())
        said = f"{same:.7f}, off by {off:.0e}" + (f", {agree} cells infinite in one only" if agree else "")
        rows.append((name, "equal to scanpy's dpt", said, "1", "-", ">= 0.999"))
    return rows


def gradient_rows() -> list[Row]:
    """Directional derivatives beside central differences."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from diffbio.math.graph import Edges
    from diffbio.math.spectrum import spectrum
    from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

    def off(value: Any, at: Any, step: float = 1e-6) -> float:
        way = jax.random.normal(jax.random.key(3), at.shape, at.dtype)
        slope = float((jax.grad(value)(at) * way).sum())
        change = float(value(at + step * way) - value(at - step * way)) / (2 * step)
        return abs(slope - change) / abs(change)

    rows: list[Row] = []
    with jax.enable_x64(True):
        x = jnp.asarray(trees()[0][0][:400], jnp.float64)
        weight = jax.random.normal(jax.random.key(1), (400,), jnp.float64)
        for method in ("dpt", "palantir"):
            op = DifferentiablePseudotime(PseudotimeConfig(method=method, root_cell_index=0), rngs=nnx.Rngs(0))

            def value(x: Any, op: Any = op) -> Any:
                return (op.apply({"embeddings": x})[0]["pseudotime"] * weight).sum()

            rows.append(("tree, 400 cells", f"gradient, {method}", f"{off(value, x):.0e}", "-", "-", "<= 1e-4"))
        n = 40
        cells = jnp.arange(n)
        after = (cells + 1) % n
        start, end = jnp.concatenate([cells, after, cells]), jnp.concatenate([after, cells, cells])
        factor = jax.random.normal(jax.random.key(2), (n, n), jnp.float64)

        def ring(pairs: Any) -> Any:  # of equal weights: eigenvalues but for the first come in pairs
            found = spectrum(Edges(start, end, jnp.concatenate([pairs, pairs, jnp.full(n, 0.3)])), n, 5)
            return (found.scaled @ found.scaled.T * factor).sum()

        at = jnp.full(n, 0.33, jnp.float64)
        rows.append(("ring, equal eigenvalues", "gradient", f"{off(ring, at):.0e}", "-", "-", "<= 1e-4"))
    return rows


def run_peer() -> None:
    """Palantir on the trees."""
    CACHE.mkdir(parents=True, exist_ok=True)
    files = []
    for seed, (x, t, root) in enumerate(trees()):
        files.append(CACHE / f"tree_{seed}.npz")
        np.savez(files[-1], x=x, t=t, root=root)
    command = [PEER_PYTHON, "benchmarks/peers/run_palantir.py", PEER_RESULTS, *files]
    subprocess.run([str(part) for part in command], check=True, cwd=REPO)


def tree_of(n_cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Another draw of the generated tree, of any size: points and time."""
    rng = np.random.default_rng(seed)
    axes = rng.normal(size=(4, 30)) / np.sqrt(30) * 6
    t, branch = rng.uniform(0, 1, n_cells), rng.integers(0, 3, n_cells)
    x = np.minimum(t, 0.4)[:, None] * axes[3] + 1.5 * np.maximum(t - 0.4, 0)[:, None] * axes[branch]
    return (x + 0.175 * rng.normal(size=x.shape)).astype(np.float32), t


def cost(n_cells: int, *, peer: bool) -> None:
    """CPU seconds of every part, ours first; then scanpy's on the same cells, and on our graph."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

    x, t = tree_of(n_cells)
    root = int(t.argmin())

    def timed(function: Any) -> tuple[Any, float]:
        start = time.process_time()
        return function(), time.process_time() - start

    ours(x[:2000], 0)  # imports and small programs
    mine, seconds = timed(lambda: ours(x, root))
    print(f"{n_cells} cells, ours: dpt {seconds:.1f} CPU s in all (with compilation), ", end="")
    print(f"Spearman {rho(mine['pseudotime'], t):.4f}", flush=True)
    op = DifferentiablePseudotime(PseudotimeConfig(root_cell_index=root), rngs=nnx.Rngs(0))
    graph = _graph_of(mine, n_cells)

    def after_graph() -> Any:
        from diffbio.math import diffusion_maps, spectrum

        edges = diffusion_maps.density_normalized(graph, n_cells)
        matrix = diffusion_maps.symmetric_transitions(edges, n_cells)[0]
        found = spectrum.spectrum(matrix, n_cells, op.config.n_diffusion_components)
        return np.asarray(diffusion_maps.diffusion_distances(found.scaled, jnp.asarray(root)))

    after_graph()
    print(f"  on a given graph, components and distances: {timed(after_graph)[1]:.2f} CPU s", flush=True)

    def slope() -> Any:
        run = jax.grad(lambda x: jnp.sum(op.apply({"embeddings": x})[0]["pseudotime"] ** 2))
        return np.asarray(run(jnp.asarray(x)))

    if n_cells <= 50_000:
        print(f"  value and gradient: {timed(slope)[1]:.1f} CPU s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak {peak:.2f} GiB", flush=True)
    if peer:
        _scanpy_cost(x, t, root, timed)
    found, seconds = timed(lambda: ours(x, root, method="palantir"))
    print(f"  palantir mode: {seconds:.1f} CPU s, Spearman {rho(found['pseudotime'], t):.4f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak {peak:.2f} GiB", flush=True)


def _graph_of(found: dict[str, np.ndarray], n_cells: int) -> Any:
    """Any symmetric graph of the chain's edges."""
    import jax.numpy as jnp

    from diffbio.math.transitions import from_scipy, to_scipy

    chain = to_scipy(
        tuple(found[f"transition_{part}"] for part in ("rows", "columns", "weights")),  # type: ignore[arg-type]
        n_cells,
    )
    edges = from_scipy((chain + chain.T) / 2)
    return edges._replace(weights=edges.weights.astype(jnp.float32))


def _scanpy_cost(x: np.ndarray, t: np.ndarray, root: int, timed: Any) -> None:
    """Scanpy's steps; its `pp.neighbors` fails above 8192 cells with scipy 1.18, so its two calls are made here."""
    import anndata
    import scanpy as sc
    from pynndescent import NNDescent
    from scanpy.neighbors import _connectivity

    def neighbors(x: np.ndarray) -> Any:
        trees, rounds = min(64, 5 + round(len(x) ** 0.5 / 20)), max(5, round(np.log2(len(x))))
        index = NNDescent(x, n_neighbors=15, random_state=0, n_jobs=1, n_trees=trees, n_iters=rounds)
        return _connectivity.umap(*index.neighbor_graph, n_obs=len(x), n_neighbors=15)

    compiling = timed(lambda: neighbors(x[:5000]))[1]
    graph, seconds = timed(lambda: neighbors(x))
    adata = anndata.AnnData(x)
    adata.obsp["connectivities"] = adata.obsp["distances"] = graph.tocsr()
    adata.uns["neighbors"] = {
        "connectivities_key": "connectivities",
        "distances_key": "distances",
        "params": {"n_neighbors": 15, "method": "umap"},
    }
    maps = timed(lambda: sc.tl.diffmap(adata, n_comps=10, random_state=0))[1]
    adata.uns["iroot"] = root
    last = timed(lambda: sc.tl.dpt(adata, n_dcs=10))[1]
    said = rho(adata.obs["dpt_pseudotime"].to_numpy(), t)
    print(
        f"  scanpy: {seconds + maps + last:.1f} CPU s in all, {compiling:.1f} to compile before; of them "
        f"neighbors {seconds:.1f}, diffmap {maps:.2f}, dpt {last:.2f}; Spearman {said:.4f}",
        flush=True,
    )


def main() -> None:
    """Prints the table, or the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="run palantir first")
    parser.add_argument("--cost", type=int, help="cells")
    parser.add_argument("--no-scanpy", action="store_true", help="with --cost: leave scanpy out")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.cost:
        cost(arguments.cost, peer=not arguments.no_scanpy)
        return
    if arguments.peer:
        run_peer()
    head = ("data", "mode", "ours", "peer", "PC1 / distance from the root", "bar")
    print("  ".join(f"{entry:<30}" for entry in head).rstrip(), flush=True)
    for part in (generated_rows, real_rows, equality_rows, gradient_rows):
        for row in part():
            print("  ".join(f"{entry:<30}" for entry in row).rstrip(), flush=True)


if __name__ == "__main__":
    main()
