"""Slice alignment beside POT 0.9.7 on the same costs: one table.

    uv run python -m benchmarks.quality.alignment                # runs POT too (peers/make_ot_env.sh)
    uv run python -m benchmarks.quality.alignment --cost         # CPU s and memory, 3,000 to 50,000 spots a slice

- objective: fused Gromov-Wasserstein of slices 1 and 2 of `breast_four_serial_slices` on the costs of
  shared/peers/ref/paste_s12.npz (alpha 0.1, distances as they are); baseline the plan that couples everything alike.
- matching: slice 1 against itself, rotated by 0.9 rad, its spots in another order, its counts drawn anew from the
  multinomial of counts + pseudocount (as shared/peers/scripts/p08_paste.py): mass on the true pairs, and how far the
  rotation is off; baseline expression only (POT, alpha 0).
- labels: `starmap_mpfc_two_slices`, layers of BZ5 carried to BZ9 by the plan (the layer of most mass); distances over
  their maximum at alpha 0, 0.1, 0.5, 0.9, and in the default unit at the default alpha. Baseline the largest layer.

Ours is the operator with its defaults (single precision, epsilon 0.005).
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
from benchmarks.quality.integration_data import REPO, data_dir
from scipy.spatial.distance import cdist

PEER_PYTHON = REPO / "benchmarks" / "envs" / "ot" / "bin" / "python"
CACHE = REPO / "benchmarks" / "cache" / "alignment"
ANGLE = 0.9
ALPHAS = (0.0, 0.1, 0.5, 0.9)


def dense(adata: Any) -> np.ndarray:
    return np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, float)


def kl(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As PASTE has it, written here once more so that POT's costs do not come from our code."""
    x, y = (v + 0.01 for v in (x, y))
    x, y = (v / v.sum(axis=1, keepdims=True) for v in (x, y))
    return (x * np.log(x)).sum(axis=1)[:, None] - x @ np.log(y).T


def objective(given: dict[str, Any], plan: np.ndarray) -> float:
    cost, left, right, alpha = (given[key] for key in ("M", "C1", "C2", "alpha"))
    plan = plan.astype(float)
    a, b = plan.sum(axis=1), plan.sum(axis=0)
    quadratic = a @ left**2 @ a + b @ right**2 @ b - 2 * ((left @ plan @ right) * plan).sum()
    return float((1 - alpha) * (cost * plan).sum() + alpha * quadratic)


def operator(data: dict[str, Any], **settings: Any) -> tuple[dict[str, np.ndarray], float]:
    """Outputs of the operator, and CPU seconds with compilation."""
    from flax import nnx

    from diffbio.operators.singlecell import DifferentiablePASTEAlignment, PASTEAlignmentConfig

    begun = time.process_time()
    op = DifferentiablePASTEAlignment(PASTEAlignmentConfig(**settings), rngs=nnx.Rngs(0))
    found = op.apply(data, {}, None)[0]
    return {key: np.asarray(value) for key, value in found.items()}, time.process_time() - begun


def breast() -> tuple[dict[str, Any], np.ndarray, float, float]:
    """The stored problem, our plan for it, its marginal error, CPU seconds."""
    import jax
    import jax.numpy as jnp

    from diffbio.math.gromov import FusedSettings, fused_plan, fused_problem

    with np.load(REPO.parent / "shared" / "peers" / "ref" / "paste_s12.npz") as stored:
        given = {key: stored[key].astype(float) for key in ("M", "C1", "C2")} | {"alpha": 0.1}
    begun = time.process_time()
    problem, _ = fused_problem(*(jnp.asarray(given[key], jnp.float32) for key in ("M", "C1", "C2")), 0.1)
    plan = np.asarray(jax.block_until_ready(fused_plan(problem, FusedSettings(0.005, 20))).plan)
    return given, plan, marginal_error(plan), time.process_time() - begun


def marginal_error(plan: np.ndarray) -> float:
    n, m = plan.shape
    return float(np.abs(plan.sum(axis=1) - 1 / n).sum() + np.abs(plan.sum(axis=0) - 1 / m).sum())


def resampled(pseudocount: float) -> tuple[dict[str, Any], np.ndarray]:
    """Slice 1 and its rotated copy; number in slice 1 of each spot of the copy."""
    import anndata

    adata = anndata.read_h5ad(data_dir() / "breast_four_serial_slices.h5ad")
    adata = adata[adata.obs["batch"].astype(str) == "layer1"]
    counts, place, rng = dense(adata), np.asarray(adata.obsm["spatial"], float), np.random.default_rng(0)
    counts = counts[:, counts.sum(axis=0) >= 15]
    order, share = rng.permutation(len(counts)), counts + pseudocount
    share = share / share.sum(axis=1, keepdims=True)
    drawn = np.stack([rng.multinomial(int(k), row) for k, row in zip(counts.sum(axis=1), share, strict=True)])
    turn = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
    data = {
        "slice1_counts": counts, "slice1_coords": place, "slice2_counts": drawn[order].astype(float),
        "slice2_coords": (place @ turn.T)[order],
    }  # fmt: skip
    return data, order


def starmap() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Both slices, and the layers of their cells."""
    import anndata

    adata = anndata.read_h5ad(data_dir() / "starmap_mpfc_two_slices.h5ad")
    parts = [adata[adata.obs["batch"].astype(str) == name] for name in ("BZ5", "BZ9")]
    data = {f"slice{k}_counts": dense(part) for k, part in enumerate(parts, start=1)}
    data |= {f"slice{k}_coords": np.asarray(part.obsm["spatial"], float) for k, part in enumerate(parts, start=1)}
    first, second = (part.obs["domain"].astype(str).to_numpy() for part in parts)
    return data, first, second


def costs(data: dict[str, Any], alpha: float, *, largest: bool) -> dict[str, Any]:
    place = [cdist(data[key], data[key]) for key in ("slice1_coords", "slice2_coords")]
    left, right = (v / v.max() for v in place) if largest else place
    return {"M": kl(data["slice1_counts"], data["slice2_counts"]), "C1": left, "C2": right, "alpha": alpha}


def carried(plan: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    names = np.unique(first)
    return float((names[(plan.T @ (first[:, None] == names)).argmax(axis=1)] == second).mean())


def peers(problems: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """POT's plans and CPU seconds; where its environment is missing those of its last run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if PEER_PYTHON.exists():
        flat = {f"{name}/{key}": value for name, given in problems.items() for key, value in given.items()}
        np.savez(CACHE / "problems.npz", **flat)
        command = [PEER_PYTHON, REPO / "benchmarks/peers/run_paste.py", CACHE / "problems.npz", CACHE / "plans.npz"]
        subprocess.run([*map(str, command)], check=True)
    return dict(np.load(CACHE / "plans.npz"))


def table() -> list[tuple[str, ...]]:
    """Rows (measure, ours, POT, baseline, bar)."""
    given, plan, error, cpu = breast()
    copies = {pseudocount: resampled(pseudocount) for pseudocount in (2.0,)}
    layers, first, second = starmap()
    problems = {"breast": given, "expression": costs(copies[2.0][0], 0.0, largest=False)}
    problems |= {"copy": costs(copies[2.0][0], 0.1, largest=False)}
    problems |= {f"layers {alpha}": costs(layers, alpha, largest=True) for alpha in ALPHAS}
    pot = peers(problems)
    alike = np.full(plan.shape, 1 / plan.size)
    rows = [("measure", "ours", "POT 0.9.7", "baseline", "bar")]
    peer = objective(given, pot["breast/plan"])
    rows.append(
        ("breast 1-2: objective", f"{objective(given, plan):.4f}", f"{peer:.4f}", f"{objective(given, alike):.3f}",
         "<= 2.380")
    )  # fmt: skip
    rows.append(
        ("  marginals, L1", f"{error:.1e}", f"{marginal_error(pot['breast/plan'].astype(float)):.1e}", "-", "<= 1e-4")
    )
    rows.append(("  CPU s", f"{cpu:.1f} (compiled anew)", f"{pot['breast/cpu']:.2f}", "-", "-"))
    data, order = copies[2.0]
    for scaling in ("none", "spacing"):
        found, _ = operator(data, distance_scaling=scaling)
        turn = found["rotation"]
        off = abs(np.degrees(np.arctan2(turn[1, 0], turn[0, 0]) + ANGLE))
        spots = np.arange(len(order))
        true = {name: float(pot[f"{name}/plan"][order, spots].sum()) for name in ("copy", "expression")}
        ours = found["transport_plan"]
        best = (ours.argmax(axis=0) == order).mean()
        rows.append(
            (f"copy: mass on true pairs, {scaling}", f"{ours[order, spots].sum():.4f}", f"{true['copy']:.4f}",
             f"{true['expression']:.4f}", ">= 0.99")
        )  # fmt: skip
        rows.append(("  matching accuracy", f"{best:.4f}", "-", "-", "1.0"))
        rows.append(("  rotation off by, degrees", f"{off:.4f}", "-", "-", "<= 1"))
    most = f"{max((second == name).mean() for name in np.unique(second)):.3f}"
    for alpha in ALPHAS:
        found, cpu = operator(layers, alpha=alpha, distance_scaling="max")
        score, theirs = (carried(v, first, second) for v in (found["transport_plan"], pot[f"layers {alpha}/plan"]))
        bar = ">= 0.83" if alpha == 0.9 else "rises with alpha"
        rows.append((f"layers carried over, max, alpha {alpha:g}", f"{score:.4f}", f"{theirs:.4f}", most, bar))
        given = problems[f"layers {alpha}"]
        seconds = f"{cpu:.1f} s, POT {pot[f'layers {alpha}/cpu']:.1f} s"
        rows.append(
            ("  objective (CPU)", f"{objective(given, found['transport_plan']):.4f}",
             f"{objective(given, pot[f'layers {alpha}/plan']):.4f}", "-", seconds)
        )  # fmt: skip
        rows.append(("  marginals, L1", f"{marginal_error(found['transport_plan'].astype(float)):.1e}", "-", "-", ""))
    found, _ = operator(layers)
    rows.append(("layers, default unit and alpha", f"{carried(found['transport_plan'], first, second):.4f}", "-", most,
                 "-"))  # fmt: skip
    return rows


def cost_of(n: int) -> None:
    """Of coupling two slices of n spots: a generated tissue of 500 genes and the same one shaken and rotated."""
    from scipy import sparse

    from diffbio.math.slice_coupling import Slice, couple_slices
    from diffbio.tl.align_slices import motion_between

    rng = np.random.default_rng(0)
    place = rng.random((n, 2)) * np.sqrt(n)  # one spot a unit of area
    waves, phase = rng.normal(size=(2, 500)) * 8 / np.sqrt(n), rng.random(500) * 2 * np.pi

    def counts(where: np.ndarray) -> Any:
        return sparse.csr_matrix(rng.poisson(np.exp(np.sin(where @ waves + phase) - 1)).astype(np.float32))

    shaken = place[rng.permutation(n)] + 0.3 * rng.normal(size=(n, 2))
    turn = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
    first, second = Slice(counts(place), place), Slice(counts(shaken), shaken @ turn.T + 5)
    begun, wall = time.process_time(), time.perf_counter()
    found = couple_slices(first, second)
    cpu, wall = time.process_time() - begun, time.perf_counter() - wall
    rotation, _ = motion_between(first.coords, second.coords, found.plan)
    off = np.degrees(np.arctan2(rotation[1, 0], rotation[0, 0]) + ANGLE)
    to = (found.plan @ shaken) / np.asarray(found.plan.sum(axis=1)).reshape(-1, 1)
    print(
        f"{n:>7} spots a slice  {'exact' if found.exact else 'landmarks'}  {cpu:.0f} CPU s  {wall:.0f} s  peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB  marginals off {found.error:.1e}  "
        f"rotation off {off:.3f} degrees  spots land {np.linalg.norm(to - place, axis=1).mean():.2f} spacings away  "
        f"{found.plan.nnz / n:.0f} entries a spot",
        flush=True,
    )


def main() -> None:
    """Prints the table or the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", nargs="*", type=int)
    arguments = parser.parse_args()
    if arguments.cost is not None:
        sizes = arguments.cost or [3_000, 10_000, 50_000]
        if len(sizes) == 1:
            cost_of(sizes[0])
            return
        for size in sizes:  # a process each, so that the peak is its own
            subprocess.run([sys.executable, "-m", "benchmarks.quality.alignment", "--cost", str(size)], check=True)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in table():
            print("  ".join(f"{entry:<34}" if k == 0 else f"{entry:<22}" for k, entry in enumerate(row)).rstrip())


if __name__ == "__main__":
    main()
