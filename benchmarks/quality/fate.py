"""Fate probabilities beside CellRank 2.3.3, a direct solve and simple baselines: one table from one run.

    uv run python -m benchmarks.quality.fate                # absorption, macrostates, clones; two CPU minutes
    uv run python -m benchmarks.quality.fate --cost         # 10,000, 50,000 and 200,000 cells, both sides
    uv run python -m benchmarks.quality.fate --oracle       # writes the reference that the tests read

Both need CellRank's environment (peers/make_cellrank_env.sh); results/fate_cellrank.json keeps its figures, which
stand in, marked as stored, where it is missing.

- branching s0-s2: generated, 1500 x 30, three branches (stored references in the folder named in DIFFBIO_REFERENCES,
  else `../shared/peers/ref`); terminal: the 20 latest cells of each branch. pancreas: `pancreas_endocrinogenesis`, 30
  principal components; terminal: the 30 latest cells of Alpha, Beta, Delta and Epsilon. Pseudotime: scanpy's, given to
  both sides. Each side makes its own graph of 15 neighbours and its own chain from the same points.
- direct: largest difference of a probability from a sparse LU of the same chain in double precision; GMRES of CellRank
  at tolerance 1e-8 (its default is 1e-6).
- baseline: the terminal state nearest in the points.
- macrostates: crispness of the memberships, 0-1, and how pure in type the surest 30 cells of each are.
- clones: `larry_haematopoiesis_clones`, day 4 to day 6, protocol of the transport row: correlation of predicted with
  clonal fates over 151 cells, and mass on cells of the same clone. A walk from a cell of day 4 ends in the first cell
  of day 6 that it meets. Intervals: 95 %, 2000 bootstraps of clones. No setting was chosen on these labels. CellRank's
  clone mass is a direct solve of its chain. Baselines: the 15 nearest cells of day 6; the independent coupling.
- cost: CPU-seconds of one thread of kernel and probabilities, graph and pseudotime given; with the time to compile
  where it says first. Difference: of a probability from CellRank's at its default tolerance, on CellRank's chain and
  each on its own; "hard" chains differ in a few rows, whose edges compare equal in float32 (pseudotime or weight).
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from benchmarks.quality.integration_data import REPO, RESULTS, data_dir

PEER_PYTHON = REPO / "benchmarks" / "envs" / "cellrank" / "bin" / "python"
PEER_RESULTS = RESULTS / "fate_cellrank.json"
CACHE = REPO / "benchmarks" / "cache" / "fate"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
KERNELS = ("connectivity", "hard", "soft")
ENDS = ("Alpha", "Beta", "Delta", "Epsilon")
CELLS = (10_000, 50_000, 200_000)
HEAD = ("data", "kernel", "measure", "ours", "CellRank 2.3.3", "baseline", "bar")


def references() -> Path:
    """Folder of the stored results."""
    return Path(os.environ.get("DIFFBIO_REFERENCES", REPO.parent / "shared" / "peers" / "ref"))


def branching(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The generated branching set at any size: points, true time, branch (peers/scripts/p06_traj.py)."""
    rng = np.random.default_rng(seed)
    ways = rng.normal(size=(4, 30)) / np.sqrt(30) * 6
    t, branch = rng.uniform(0, 1, n_cells), rng.integers(0, 3, n_cells)
    points = np.minimum(t, 0.4)[:, None] * ways[3] + np.maximum(t - 0.4, 0)[:, None] * ways[branch] * 1.5
    points += 0.35 * rng.normal(size=points.shape) * 0.5
    return points.astype(np.float32), t, branch


def pseudotime(points: np.ndarray, root: int) -> np.ndarray:
    """Diffusion pseudotime by scanpy."""
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(points)
    adata.obsm["X_pca"] = points
    sc.pp.neighbors(adata, n_neighbors=15, use_rep="X_pca", random_state=0)
    sc.tl.diffmap(adata, random_state=0)
    adata.uns["iroot"] = root
    sc.tl.dpt(adata)
    return adata.obs["dpt_pseudotime"].to_numpy(float)


def latest(groups: np.ndarray, when: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the latest cells of each group, -1 for others; groups are numbered, -1 is none."""
    found = np.full(len(groups), -1)
    for group in range(groups.max() + 1):
        cells = np.flatnonzero(groups == group)
        found[cells[np.argsort(-when[cells], kind="stable")[:count]]] = group
    return found


def data_sets() -> dict[str, dict[str, Any]]:
    """Points, pseudotime, terminal states, and the true group of cells."""
    import anndata
    import scanpy as sc

    found: dict[str, dict[str, Any]] = {}
    for seed in range(3):
        stored = np.load(references() / f"traj_sim_s{seed}.npz")
        x, t, branch = stored["X"], stored["t"], stored["br"]
        found[f"branching s{seed}"] = {
            "points": x, "pseudotime": pseudotime(x, int(stored["root"])), "terminal": latest(branch, t, 20),
            "late": np.where(t > 0.55, branch, -1), "groups": np.where(t < 0.4, 3, branch), "macrostates": 4,
        }  # fmt: skip
    adata = anndata.read_h5ad(data_dir() / "pancreas_endocrinogenesis.h5ad")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=30, random_state=0)
    points = np.asarray(adata.obsm["X_pca"], np.float32)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    ductal = np.flatnonzero(types == "Ductal")
    center = points[types == "Ductal"].mean(axis=0) - points[np.isin(types, ENDS)].mean(axis=0)
    root = int(ductal[np.argmax(points[ductal] @ center)])
    when = pseudotime(points, root)
    groups = np.unique(types, return_inverse=True)[1]
    ends = np.full(len(types), -1)
    for code, name in enumerate(ENDS):
        ends[types == name] = code
    found["pancreas"] = {
        "points": points, "pseudotime": when, "terminal": latest(ends, when, 30), "groups": groups, "macrostates": 6,
    }  # fmt: skip
    return found


def kernel_of(graph: Any, when: np.ndarray, name: str) -> Any:
    """Our chain, edges."""
    import jax.numpy as jnp

    from diffbio.math.kernels import connectivity_kernel, pseudotime_kernel

    if name == "connectivity":
        return connectivity_kernel(graph, len(when))
    return pseudotime_kernel(graph, jnp.asarray(when, jnp.float32), scheme=name)


def fates_of(chain: Any, terminal: np.ndarray) -> np.ndarray:
    """By our operator."""
    import jax.numpy as jnp
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiableFateProbability, FateProbabilityConfig

    config = FateProbabilityConfig(n_macrostates=int(terminal.max()) + 1)
    op = DifferentiableFateProbability(config, rngs=nnx.Rngs(0))
    data = {"transition_rows": chain.rows, "transition_columns": chain.columns, "transition_weights": chain.weights}
    return np.asarray(op.apply(data | {"terminal_states": jnp.asarray(terminal)})[0]["fate_probabilities"], float)


def direct(chain: sp.csr_array, terminal: np.ndarray) -> np.ndarray:
    """Sparse LU in double precision; rows of the chain are made to sum to 1 first."""
    chain = sp.diags_array(1 / np.asarray(chain.sum(axis=1)).ravel()) @ chain
    inner = terminal < 0
    found = (terminal[:, None] == np.arange(terminal.max() + 1)).astype(float)
    part = chain.tocsr()[inner]
    system = (sp.eye_array(int(inner.sum())) - part[:, inner]).tocsc()
    found[inner] = sp.linalg.splu(system).solve(part @ found)
    return found


def peer(name: str, given: dict[str, Any], kernels: tuple[str, ...], *, tol: float, macrostates: int = 0) -> Any:
    """CellRank's results, and its peak memory in GiB; None without its environment."""
    if not PEER_PYTHON.exists():
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    source, target = CACHE / f"{name}.npz", CACHE / f"{name}_cellrank.npz"
    np.savez(source, **given, kernels=kernels, tol=tol, macrostates=macrostates)
    command = [str(PEER_PYTHON), "benchmarks/peers/run_cellrank.py", str(source), str(target)]
    peak = child(command)
    return dict(np.load(target)) | {"peak": peak}


def child(command: list[str]) -> float:
    """Runs a command on one thread; its peak memory in GiB."""
    run = subprocess.Popen(command, cwd=REPO, env={**os.environ, **ONE_THREAD}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(run.pid, 0)
    if status:
        msg = f"{' '.join(command)} ended with {status}"
        raise RuntimeError(msg)
    return used.ru_maxrss / 2**20


def chain_of(found: dict[str, Any], kernel: str) -> sp.csr_array:
    """CellRank's transition matrix."""
    parts = [found[f"{kernel}_chain_{part}"] for part in ("data", "indices", "indptr")]
    return sp.csr_array((parts[0].astype(float), *parts[1:]), shape=(len(parts[2]) - 1,) * 2)


def nearest_end(points: np.ndarray, terminal: np.ndarray) -> np.ndarray:
    """One-hot: the terminal state with the nearest mean."""
    means = np.stack([points[terminal == code].mean(axis=0) for code in range(terminal.max() + 1)])
    gaps = ((points[:, None] - means) ** 2).sum(axis=2)
    return (gaps.argmin(axis=1)[:, None] == np.arange(len(means))).astype(float)


def absorption_rows(name: str, data: dict[str, Any], stored: dict[str, Any]) -> list[tuple[str, ...]]:
    """Against a direct solve and CellRank; macrostates."""
    import jax.numpy as jnp

    from diffbio.math.macrostates import core_cells, macrostates
    from diffbio.math.transitions import connectivities, to_scipy

    terminal, k = data["terminal"], data["macrostates"]
    given = {key: data[key] for key in ("points", "pseudotime", "terminal")}
    found = peer(name.replace(" ", "_"), given, KERNELS, tol=1e-8, macrostates=k)
    graph = connectivities(jnp.asarray(data["points"]), 15)
    inner, rows = terminal < 0, []
    baseline = nearest_end(data["points"], terminal)
    for kernel in KERNELS:
        chain = kernel_of(graph, data["pseudotime"], kernel)
        fates = fates_of(chain, terminal)
        matrix = to_scipy(chain, len(terminal))
        rows.append((name, kernel, "direct", f"{np.abs(fates - direct(matrix, terminal)).max():.1e}"))
        states = macrostates(sp.csr_array(sp.diags_array(1 / np.asarray(matrix.sum(axis=1)).ravel()) @ matrix), k)
        mine = {
            "crispness": f"{states.crispness:.4f}",
            "purity": f"{purity(core_cells(states.memberships, 30), data['groups']):.3f}",
        }
        theirs = stored.setdefault(name, {}).get(kernel, {})
        if found is not None:
            other, own = found[f"{kernel}_fates"], chain_of(found, kernel)
            theirs = {
                "direct": f"{np.abs(other - direct(own, terminal)).max():.1e}",
                "crispness": f"{float(found[f'{kernel}_crispness']):.4f}",
                "purity": f"{purity(core_cells(found[f'{kernel}_memberships'], 30), data['groups']):.3f}",
                "macrostates CPU s": f"{float(found[f'{kernel}_macro_seconds']):.1f}",
            }
            stored[name][kernel] = theirs
            rows.append((name, kernel, "chain, largest difference", f"{abs(matrix - own).max():.1e}"))
            same = [np.corrcoef(x[inner].ravel(), other[inner].ravel())[0, 1] for x in (fates, baseline)]
            rows.append((name, kernel, "correlation", f"{same[0]:.6f}", "1", f"{same[1]:.3f}", "0.99"))
        mark = "" if found is not None else " stored"
        place = next(i for i, row in enumerate(rows) if row[:3] == (name, kernel, "direct"))
        rows[place] = (*rows[place], theirs.get("direct", "-") + mark, "-", "1e-5")
        if "late" in data:
            late = data["late"] >= 0
            right = [float((x[late].argmax(axis=1) == data["late"][late]).mean()) for x in (fates, baseline)]
            rows.append((name, kernel, "late cells right", f"{right[0]:.4f}", "-", f"{right[1]:.4f}", "1.0"))
        rows += [(name, kernel, f"{what}, {k} macrostates", mine[what], theirs.get(what, "-") + mark) for what in mine]
    return rows


def purity(cores: np.ndarray, groups: np.ndarray) -> float:
    """Mean share of the largest group among the cells of a macrostate."""
    shares = [np.bincount(groups[cores == state]).max() / (cores == state).sum() for state in range(cores.max() + 1)]
    return float(np.mean(shares))


def larry() -> dict[str, Any]:
    """Cells of days 4 and 6: points, types, fates, clones."""
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(data_dir() / "larry_haematopoiesis_clones.h5ad")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=30, random_state=0)
    day = adata.obs["day"].astype(str).astype(float).to_numpy()
    kept = day >= 4
    return {
        "points": np.asarray(adata.obsm["X_pca"], np.float32)[kept], "day": day[kept],
        "type": adata.obs["cell_type"].astype(str).to_numpy()[kept],
        "clone": adata.obs["clone"].astype(str).to_numpy()[kept],
        "fate": np.asarray(adata.obsm["clonal_fate"], float)[kept],
        "names": [str(name) for name in adata.uns["clonal_fate_names"]],
    }  # fmt: skip


def scores(plan: np.ndarray, cells: dict[str, Any]) -> dict[str, np.ndarray]:
    """What `evaluate` of peers/scripts/p09b_wot.py compares: predicted and true fates, mass on the own clone."""
    early, late = cells["day"] == 4, cells["day"] == 6
    plan = plan / np.maximum(plan.sum(axis=1, keepdims=True), 1e-300)
    toward = np.stack([plan[:, cells["type"][late] == name].sum(axis=1) for name in cells["names"]], axis=1)
    truth = cells["fate"][early]
    known = np.isfinite(truth).all(axis=1) & (truth.sum(axis=1) > 0)
    same = cells["clone"][early][:, None] == cells["clone"][late]
    has = same.any(axis=1)
    return {
        "predicted": toward[known] / np.maximum(toward[known].sum(axis=1, keepdims=True), 1e-12),
        "true": truth[known] / truth[known].sum(axis=1, keepdims=True),
        "fate clone": cells["clone"][early][known], "mass": (plan * same).sum(axis=1)[has],
        "mass clone": cells["clone"][early][has],
    }  # fmt: skip


def correlation(predicted: np.ndarray, true: np.ndarray) -> float:
    """Over cells and fates."""
    return float(np.corrcoef(predicted.ravel(), true.ravel())[0, 1])


def interval(clones: np.ndarray, value: Any) -> str:
    """Of `value(cells)`, where whole clones are drawn with replacement."""
    rng, names = np.random.default_rng(0), np.unique(clones)
    members = {name: np.flatnonzero(clones == name) for name in names}
    drawn = [value(np.concatenate([members[name] for name in rng.choice(names, len(names))])) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{low:.3f}-{high:.3f}" if high > 0.1 else f"{low:.4f}-{high:.4f}"


def clone_rows(stored: dict[str, Any]) -> list[tuple[str, ...]]:
    """The Markov chain beside CellRank's and baselines."""
    import jax.numpy as jnp

    from diffbio.math.neighbors import knn
    from diffbio.math.transitions import connectivities

    cells = larry()
    points, early, late = cells["points"], cells["day"] == 4, cells["day"] == 6
    stem = np.flatnonzero((cells["type"] == "undiff") & early)
    ends = points[late & (cells["type"] != "undiff")].mean(axis=0)
    root = int(stem[np.argmax(((points[stem] - ends) ** 2).sum(axis=1))])
    when = pseudotime(points, root)
    each = np.full(len(points), -1)
    each[late] = np.arange(late.sum())
    codes = {name: code for code, name in enumerate(sorted(set(cells["type"][late])))}
    by_type = np.where(late, [codes.get(name, -1) for name in cells["type"]], -1)
    found = peer("larry", {"points": points, "pseudotime": when, "terminal": by_type}, KERNELS, tol=1e-8)
    graph = connectivities(jnp.asarray(points), 15)
    near = np.zeros((early.sum(), late.sum()))
    np.put_along_axis(near, knn(points[late], 15, queries=points[early]).indices, 1.0, axis=1)
    baselines = {"nearest 15": near, "independent": np.ones_like(near)}
    rows = []
    for kernel in KERNELS:
        # all day-6 cells at once as one state each: fates by type are sums of it, clone mass is read off
        plan = fates_of(kernel_of(graph, when, kernel), each)[early]
        mine, theirs = scored(plan, cells), stored.setdefault("larry", {}).get(kernel, {})
        if found is not None:
            theirs = scored(direct(chain_of(found, kernel), each)[early], cells)
            by_gmres = found[f"{kernel}_fates"][early][:, [codes[name] for name in cells["names"]]]
            known = scores(plan, cells)
            truth = cells["fate"][early]
            ok = np.isfinite(truth).all(axis=1) & (truth.sum(axis=1) > 0)
            share = by_gmres[ok] / np.maximum(by_gmres[ok].sum(axis=1, keepdims=True), 1e-12)
            theirs["fate correlation"] = (
                f"{correlation(share, known['true']):.3f} "
                f"({interval(known['fate clone'], lambda c, s=share, k=known: correlation(s[c], k['true'][c]))})"
            )
            stored["larry"][kernel] = theirs
        mark = "" if found is not None else " stored"
        for what in mine:
            rows.append(("LARRY 4 to 6", kernel, what, mine[what], theirs.get(what, "-") + mark))
    for name, plan in baselines.items():
        rows += [("LARRY 4 to 6", name, what, "-", "-", value) for what, value in scored(plan, cells).items()]
    return rows


def scored(plan: np.ndarray, cells: dict[str, Any]) -> dict[str, str]:
    """Fate correlation and clone mass with their intervals."""
    found = scores(plan, cells)
    p, t, mass = found["predicted"], found["true"], found["mass"]
    fate = f"{correlation(p, t):.3f} ({interval(found['fate clone'], lambda c: correlation(p[c], t[c]))})"
    clone = f"{mass.mean():.4f} ({interval(found['mass clone'], lambda c: float(mass[c].mean()))})"
    return {"fate correlation": fate, "clone mass": clone}


def ours_side(source: str, target: str) -> None:
    """Our side of `--cost`, in a process of its own."""
    import jax
    import jax.numpy as jnp

    from diffbio.math.absorption import absorption_probabilities
    from diffbio.math.transitions import from_scipy

    given = dict(np.load(source))
    n = len(given["terminal"])
    graph = from_scipy(sp.csr_array((given["data"], given["indices"], given["indptr"]), shape=(n, n)))
    out: dict[str, Any] = {}
    for kernel in map(str, given["kernels"]):
        seconds = []
        for _ in range(2):
            start = time.process_time()
            chain = jax.block_until_ready(kernel_of(graph, given["pseudotime"], kernel))
            middle = time.process_time()
            fates = fates_of(chain, given["terminal"])
            seconds.append([middle - start, time.process_time() - middle])
        ends, states = jnp.asarray(given["terminal"]), int(given["terminal"].max()) + 1

        def loss(weights: Any, chain: Any = chain, ends: Any = ends, states: int = states) -> Any:
            return (absorption_probabilities(chain._replace(weights=weights), ends, states)[:, 0] ** 2).sum()

        start = time.process_time()
        jax.block_until_ready(jax.grad(loss)(chain.weights))
        out[f"{kernel}_gradient"] = np.array(time.process_time() - start)
        out[f"{kernel}_seconds"], out[f"{kernel}_fates"] = np.array(seconds), fates
    np.savez(target, **out)


def oracle() -> None:
    """tests/oracles/cellrank.npz: CellRank on 120 cells of the branching set."""
    points, t, branch = branching(120, 0)
    given = {"points": points, "pseudotime": t, "terminal": latest(branch, t, 4)}
    found = peer("oracle", given, KERNELS, tol=1e-12, macrostates=4)
    assert found is not None, "make CellRank's environment first"
    kept = dict(given)
    for kernel in KERNELS:
        chain = chain_of(found, kernel).tocoo()
        kept |= {
            f"{kernel}_rows": chain.coords[0].astype(np.uint8), f"{kernel}_columns": chain.coords[1].astype(np.uint8),
            f"{kernel}_weights": chain.data.astype(np.float32), f"{kernel}_fates": found[f"{kernel}_fates"],
            f"{kernel}_crispness": found[f"{kernel}_crispness"], f"{kernel}_coarse": found[f"{kernel}_coarse"],
        }  # fmt: skip
    np.savez_compressed(REPO / "tests" / "oracles" / "cellrank.npz", **kept)


def cost_rows(sizes: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
    """CPU-seconds and memory of both sides."""
    import jax.numpy as jnp

    from diffbio.math.absorption import absorbed
    from diffbio.math.transitions import connectivities, to_scipy

    for n_cells in sizes:
        points, t, branch = branching(n_cells, 0)
        graph = to_scipy(connectivities(jnp.asarray(points), 15), n_cells)
        graph.sum_duplicates()
        given = {"data": graph.data.astype(np.float32), "indices": graph.indices, "indptr": graph.indptr}
        given |= {"pseudotime": t, "terminal": latest(branch, t, 30)}
        kernels = ("connectivity", "hard")
        found = peer(f"cost_{n_cells}", given, kernels, tol=0.0)
        source, target = CACHE / f"cost_{n_cells}.npz", CACHE / f"cost_{n_cells}_ours.npz"
        peak = child([sys.executable, "-m", "benchmarks.quality.fate", "--side", str(source), str(target)])
        mine = dict(np.load(target))
        for kernel in kernels:
            first, again = mine[f"{kernel}_seconds"]
            theirs = ("-", "-")
            if found is not None:
                seconds = found[f"{kernel}_seconds"]
                theirs = (f"{seconds[0]:.1f} + {seconds[1]:.1f}", f"{found['peak']:.2f}")
                same = absorbed(chain_of(found, kernel), given["terminal"], 3, tolerance=1e-8)[0]
                gaps = [np.abs(found[f"{kernel}_fates"] - x).max() for x in (same, mine[f"{kernel}_fates"])]
                yield (f"{n_cells}", kernel, "difference, one chain", f"{gaps[0]:.1e}")
                yield (f"{n_cells}", kernel, "difference, own chains", f"{gaps[1]:.1e}")
            split = f"{again[0]:.1f} + {again[1]:.1f}"
            yield (f"{n_cells}", kernel, "CPU s, kernel + fates", split, theirs[0], "-", "peer's")
            yield (f"{n_cells}", kernel, "first, compiled", f"{first[0]:.1f} + {first[1]:.1f}")
            yield (f"{n_cells}", kernel, "fates and gradient", f"{float(mine[f'{kernel}_gradient']):.1f}")
        yield (f"{n_cells}", "both", "peak GiB", f"{peak:.2f}", theirs[1])


def say(row: tuple[str, ...]) -> None:
    """One line of the table."""
    widths = (14, 13, 26, 22, 22, 22, 8)
    full = (*row, *["-"] * (len(widths) - len(row)))
    print("  ".join(f"{entry:<{width}}" for entry, width in zip(full, widths, strict=True)).rstrip(), flush=True)


def main() -> None:
    """Prints the table, or the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--cells", type=int, nargs="*", default=CELLS)
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.side:
        ours_side(*arguments.side)
        return
    if arguments.oracle:
        oracle()
        return
    say(HEAD)
    if arguments.cost:
        for row in cost_rows(tuple(arguments.cells)):
            say(row)
        return
    stored = json.loads(PEER_RESULTS.read_text()) if PEER_RESULTS.exists() else {}
    for name, data in data_sets().items():
        for row in absorption_rows(name, data, stored):
            say(row)
    for row in clone_rows(stored):
        say(row)
    PEER_RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
