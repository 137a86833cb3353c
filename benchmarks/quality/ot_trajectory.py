"""Waddington-OT beside POT, wot 1.0.8 and moscot 0.5.2: one table.

    uv run python -m benchmarks.quality.ot_trajectory                  # about two CPU minutes
    uv run python -m benchmarks.quality.ot_trajectory --peer           # first runs the peers (peers/make_ot_env.sh)
    uv run python -m benchmarks.quality.ot_trajectory --sensitivity    # the two clone figures under other settings
    uv run python -m benchmarks.quality.ot_trajectory --cost           # CPU s and memory, 10,000 to 200,000 cells

- plan: largest difference from POT's plan at equal epsilon and lambdas, times the number of cells.
- fate correlation: of the fates that the plan gives the cells of day 4 with those of their clones (151 cells, six
  fates), as in shared/peers/scripts/p09c_wot.py. Clone mass: share of a cell's descendants that are of its own clone
  (180 cells). 95 % intervals by 2000 draws of clones. Settings are the defaults of `tl.ot_trajectory`, on all genes.
- W2: Wasserstein-2 distance of the interpolated population to the true cells of a day that was left out, in 30
  principal components (unit variance) of the other days. Baselines: random pairs of the days on either side,
  interpolated linearly (wot's null, mean of 10 draws); the cells of the day before, and of the day after; and, to see
  what the coupling itself adds, our form of interpolation with every cell coupled to every other. Intervals of the
  difference from random pairs by 40 draws of the true cells. Every population is represented by as many points as make
  about 1000.

Data: `larry_haematopoiesis_clones`, `mesc_lif_withdrawal_timecourse`. results/ot_peer.json keeps what the peers gave.
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
from typing import Any

import numpy as np
from benchmarks.quality.integration_data import REPO, RESULTS, data_dir

PEER_PYTHON = REPO / "benchmarks" / "envs" / "ot" / "bin" / "python"
PEER_RESULTS = RESULTS / "ot_peer.json"
CACHE = REPO / "benchmarks" / "cache" / "ot"
LARRY, MESC = "larry_haematopoiesis_clones", "mesc_lif_withdrawal_timecourse"
BARS = {"plan": 1e-4, "fate": 0.594, "mass": 0.0324}
N_COMPONENTS, POINTS = 30, 1000


def loaded(name: str) -> Any:
    """The data set; all its genes are variable ones already."""
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    adata.obs["day"] = adata.obs["day"].astype(str).astype(float)
    adata.var["diffbio_highly_variable"] = True
    return adata


def trajectory(adata: Any, **settings: Any) -> Any:
    """Of `tl.ot_trajectory`, with its defaults."""
    from diffbio import tl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tl.ot_trajectory(adata, "day", **settings)


class Clones:
    """What the clones of the cells of day 4 say of a plan."""

    def __init__(self, adata: Any) -> None:
        day = adata.obs["day"].to_numpy()
        self.early, self.late = np.flatnonzero(day == 4), np.flatnonzero(day == 6)
        self.names = [str(name) for name in adata.uns["clonal_fate_names"]]
        kinds, clone = (adata.obs[key].astype(str).to_numpy() for key in ("cell_type", "clone"))
        self.late_kind, self.clone = kinds[self.late], clone[self.early]
        fate = np.asarray(adata.obsm["clonal_fate"], float)[self.early]
        self.known = np.isfinite(fate).all(axis=1) & (np.nan_to_num(fate).sum(axis=1) > 0)
        self.fate = fate[self.known] / fate[self.known].sum(axis=1, keepdims=True)
        self.same = clone[self.early][:, None] == clone[self.late]
        self.kept = self.same.any(axis=1)

    def of(self, plan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fates (151, 6) and clone mass (180,) of the cells."""
        rows = plan / np.maximum(plan.sum(axis=1, keepdims=True), 1e-300)
        fate = np.stack([rows[:, self.late_kind == name].sum(axis=1) for name in self.names], axis=1)[self.known]
        fate = fate / np.maximum(fate.sum(axis=1, keepdims=True), 1e-12)
        return fate, (rows * self.same).sum(axis=1)[self.kept]

    def scores(self, plan: np.ndarray) -> tuple[float, float]:
        """Fate correlation, mean clone mass."""
        fate, mass = self.of(plan)
        return _correlation(fate, self.fate), float(mass.mean())

    def intervals(self, plan: np.ndarray, draws: int = 2000) -> tuple[np.ndarray, np.ndarray]:
        """Both scores of as many draws of clones, for intervals and paired differences."""
        fate, mass = self.of(plan)
        rng, found = np.random.default_rng(0), []
        for labels, score in (
            (self.clone[self.known], lambda rows: _correlation(fate[rows], self.fate[rows])),
            (self.clone[self.kept], lambda rows: float(mass[rows].mean())),
        ):
            members = [np.flatnonzero(labels == name) for name in np.unique(labels)]
            picks = rng.integers(len(members), size=(draws, len(members)))
            found.append(np.array([score(np.concatenate([members[k] for k in pick])) for pick in picks]))
        return found[0], found[1]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _interval(values: np.ndarray) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:.4f}, {high:.4f}]"


def problem(adata: Any) -> dict[str, np.ndarray]:
    """Cells of days 4 and 6 as the peers get them."""
    from diffbio.data.transform import shifted_log
    from diffbio.math.couplings import median_distance, squared_distances
    from diffbio.math.linalg import pca

    day = adata.obs["day"].to_numpy()
    # as p09c_wot.py: normalised and components over all three days
    log = shifted_log(adata.X, total=1e4).toarray().astype(float)
    components = pca(log, N_COMPONENTS).scores.astype(float)
    rows = np.concatenate([np.flatnonzero(day == 4), np.flatnonzero(day == 6)])
    early = day[rows] == 4
    x, y = components[rows][early], components[rows][~early]
    scaled = log[rows] - log[rows].mean(axis=0)
    spread = scaled.std(axis=0)
    scaled = np.minimum(scaled / np.where(spread > 0, spread, 1), 10)
    cost = squared_distances(x, y) / median_distance(x, y)
    return {"cost": cost, "log": log[rows], "pca": components[rows], "scaled": scaled, "early": early}


def run_peers(given: dict[str, np.ndarray]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(CACHE / "problem.npz", **given)
    command = [PEER_PYTHON, "benchmarks/peers/run_ot.py", CACHE / "problem.npz", CACHE / "plans.npz"]
    subprocess.run([*map(str, command)], check=True, cwd=REPO)


def plan_errors(given: dict[str, np.ndarray], plans: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference of our plans from POT's, times the number of early cells."""
    import jax
    import jax.numpy as jnp

    from diffbio.math.ot import coupling

    found, cost = {}, given["cost"]
    for name, lambda1, lambda2 in (("pot_unbalanced", 1.0, 50.0), ("pot_balanced", np.inf, np.inf)):
        with jax.enable_x64(True):
            own = coupling(
                jnp.asarray(cost),
                jnp.ones(len(cost)),
                epsilon=0.05,
                lambda1=lambda1,
                lambda2=lambda2,
                growth_iterations=1,
            )
        found[name] = float(np.abs(np.asarray(own.plan) - plans[name]).max() * len(cost))
    return found


def clone_rows(adata: Any, peer: dict[str, Any], plans: dict[str, np.ndarray] | None) -> list[tuple[str, ...]]:
    """Rows of the clones."""
    clones = Clones(adata)
    plan = trajectory(adata).transport(4.0, 6.0).to_numpy()
    ours, draws = clones.scores(plan), clones.intervals(plan)
    base = clones.scores(np.ones_like(plan))
    rows = []
    for k, (measure, key, best) in enumerate((("fate correlation", "fate", "wot"), ("clone mass", "mass", "moscot"))):
        told = ", ".join(f"{name} {peer[name][key]:.4f}" for name in ("wot", "moscot", "wot_as_ours") if name in peer)
        rows.append((measure, f"{ours[k]:.4f}", told, f"{base[k]:.4f}", f"> {BARS[key]}"))
        rows.append(("  95 % interval", _interval(draws[k]), "", "", ""))
        if plans is not None:
            difference = draws[k] - clones.intervals(plans[best])[k]
            above = (difference > 0).mean()
            rows.append((f"  minus {best}", _interval(difference), f"above in {above:.0%} of draws", "", ""))
    return rows


def held_out(adata: Any, day: float) -> dict[str, float | str]:
    """W2 of a left-out day from ours and from the baselines."""
    from diffbio.data.transform import shifted_log
    from diffbio.math.couplings import CellCoupling
    from diffbio.math.linalg import pca
    from diffbio.tl.ot_maps import OTTrajectory

    day_of = adata.obs["day"].to_numpy()
    train, true = adata[day_of != day].copy(), np.flatnonzero(day_of == day)
    log = shifted_log(adata.X, total=1e4).toarray().astype(float)
    kept = log[day_of != day].std(axis=0) > 1e-6
    mean, spread = log[day_of != day][:, kept].mean(axis=0), log[day_of != day][:, kept].std(axis=0)
    scaled = np.minimum((log[:, kept] - mean) / spread, 10).astype(np.float32)
    found = pca(scaled[day_of != day], N_COMPONENTS)
    z, target = found.scores.astype(float), ((scaled[true] - found.mean) @ found.components.T).astype(float)
    course = trajectory(train)
    alike = [
        CellCoupling(
            z[a][:, :1] * 0, np.zeros(len(a)), z[b][:, :1] * 0, np.zeros(len(b)), np.arange(len(b)), 1.0, 1.0, 0.0
        )
        for a, b in zip(course.cells, course.cells[1:], strict=False)
    ]
    independent = OTTrajectory(course.names, course.days, course.cells, alike, course.growth)
    k = int(np.searchsorted(course.days, day))
    share = (day - course.days[k - 1]) / (course.days[k] - course.days[k - 1])
    before, after = z[course.cells[k - 1]], z[course.cells[k]]
    size = len(true) * -(-POINTS // len(true))

    def random_pairs(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        x, y = (v[rng.integers(len(v), size=size)] for v in (before, after))
        return (1 - share) * x + share * y

    def distance(points: np.ndarray, weights: np.ndarray | None = None, to: np.ndarray = target) -> float:
        return wasserstein(points, np.ones(len(points)) if weights is None else weights, to, size)

    pairs = [random_pairs(seed) for seed in range(10)]
    own = course.interpolate(z, day)
    rng = np.random.default_rng(0)
    differences = []
    for draw in range(40):
        again = target[rng.integers(len(target), size=len(target))]
        differences.append(distance(pairs[draw % 10], to=again) - distance(own.values, own.weights, to=again))
    straight = course.interpolate(z, day, smooth=False)
    sampled = course.interpolate(z, day, form="sampled", n_cells=size)
    alone = independent.interpolate(z, day)
    return {
        "ours": distance(own.values, own.weights),
        "random pairs": float(np.mean([distance(pair) for pair in pairs])),
        "day before": distance(before),
        "day after": distance(after),
        "ours, straight": distance(straight.values, straight.weights),
        "ours, sampled": distance(sampled.values, sampled.weights),
        "our form, all coupled alike": distance(alone.values, alone.weights),
        "gain": _interval(np.array(differences)),
    }


def wasserstein(points: np.ndarray, weights: np.ndarray, target: np.ndarray, size: int) -> float:
    """W2 of a weighted population, as `size` of its points, from the target's points, each as often as it takes."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    order = np.argsort(points[:, 0])  # neighbours share what the weights leave over
    steps = np.cumsum(weights[order]) / weights.sum()
    picked = order[np.minimum(np.searchsorted(steps, (np.arange(size) + 0.5) / size), len(order) - 1)]
    cost = cdist(points[picked], np.repeat(target, size // len(target), axis=0), "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def table(*, peers: bool) -> list[tuple[str, ...]]:
    """Rows (measure, ours, peers, baseline, bar)."""
    adata = loaded(LARRY)
    given = problem(adata)
    if peers:
        run_peers(given)
        plans = dict(np.load(CACHE / "plans.npz"))
        clones = Clones(adata)
        scores = {name: dict(zip(("fate", "mass"), clones.scores(plan), strict=True)) for name, plan in plans.items()}
        PEER_RESULTS.write_text(json.dumps(scores | {"plan": plan_errors(given, plans)}, indent=1) + "\n")
    peer = json.loads(PEER_RESULTS.read_text())
    cached = (CACHE / "plans.npz").exists()
    plans = dict(np.load(CACHE / "plans.npz")) if cached else None
    errors = plan_errors(given, plans) if plans is not None else peer["plan"]
    said = "measured" if cached else "stored"
    rows = [("measure", "ours", f"peers ({said})", "baseline", "bar")]
    for name, error in errors.items():
        rows.append((f"plan, {name.replace('_', ' ')}", f"{error:.1e}", "0", "-", f"<= {BARS['plan']:.0e}"))
    rows += clone_rows(adata, peer, plans)
    for name, days in ((MESC, (2.0, 4.0)), (LARRY, (4.0,))):
        timed = loaded(name)
        for day in days:
            w2 = held_out(timed, day)
            nulls = {k: w2[k] for k in ("random pairs", "day before", "day after")}
            told = ", ".join(f"{k} {v:.2f}" for k, v in nulls.items())
            rows.append((f"W2, {name[:5]} day {day:g}", f"{w2['ours']:.3f}", "-", told, "< all"))
            rows.append(("  random pairs minus ours", str(w2["gain"]), "", "", "> 0"))
            others = ", ".join(f"{k} {w2[k]:.2f}" for k in list(w2)[4:7])
            rows.append(("  other forms", others, "", "", "-"))
    return rows


def sensitivity() -> None:
    """Both clone figures when one setting or two move away from the defaults."""
    from diffbio.math.couplings import couple, dense
    from diffbio.tl.ot_trajectory import _components, _variable

    adata = loaded(LARRY)
    clones = Clones(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaled = _variable(adata, None)
    log = problem(adata)
    print(
        f"{'genes':<10}{'components':<12}{'epsilon':<9}{'growth iterations':<19}{'fate':<9}mass   (bars 0.594, 0.0324)"
    )
    for genes in ("scaled", "log"):
        for width in (20, 30, 40, 50):
            if genes == "scaled":
                x, y = _components(scaled, clones.early, clones.late, width)
            else:
                from diffbio.math.linalg import pca

                scores = pca(log["log"], width).scores
                x, y = scores[log["early"]], scores[~log["early"]]
            for epsilon in (0.03, 0.04, 0.05, 0.07):
                for iterations in (1, 3):
                    found, _ = couple(x, y, np.ones(len(x)), epsilon=epsilon, growth_iterations=iterations)
                    fate, mass = clones.scores(dense(found))
                    print(f"{genes:<10}{width:<12}{epsilon:<9}{iterations:<19}{fate:<9.4f}{mass:.4f}", flush=True)


def cost_of(n_cells: int) -> None:
    """Of coupling two halves of a generated tree of 30 features, and of the fates of the early half."""
    from diffbio.math.couplings import couple, pull

    rng = np.random.default_rng(0)
    half = n_cells // 2
    axes = rng.normal(size=(6, 30))
    branch = rng.integers(0, 6, 2 * half)
    along = rng.random((2 * half, 1)) * 0.5 + np.repeat([0.0, 0.5], half)[:, None]
    x = 6 * along * axes[branch] + rng.normal(size=(2 * half, 30))
    begun, wall = time.process_time(), time.perf_counter()
    found, _ = couple(x[:half], x[half:], np.ones(half))
    middle = time.process_time()
    fates = pull(found, (branch[half:, None] == np.arange(6)).astype(float))
    right = (fates.argmax(axis=1) == branch[:half])[along[:half, 0] > 0.4].mean()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kind = "exact" if found.exact else f"{len(found.landmarks)} landmarks"
    print(
        f"{n_cells:>8} cells  {kind:<16}  coupling {middle - begun:7.1f} CPU s  fates "
        f"{time.process_time() - middle:6.1f} CPU s  wall {time.perf_counter() - wall:.0f} s  peak {peak:.2f} GiB  "
        f"right branch {right:.3f}",
        flush=True,
    )


def main() -> None:
    """Prints the table, the sensitivity or the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--cost", nargs="*", type=int)
    arguments = parser.parse_args()
    if arguments.cost is not None:
        sizes = arguments.cost or [10_000, 50_000, 200_000]
        if len(sizes) == 1:
            cost_of(sizes[0])
            return
        for size in sizes:  # a process each, so that the peak is its own
            subprocess.run([sys.executable, "-m", "benchmarks.quality.ot_trajectory", "--cost", str(size)], check=True)
        return
    if arguments.sensitivity:
        sensitivity()
        return
    for row in table(peers=arguments.peer):
        print("  ".join(f"{entry:<26}" for entry in row).rstrip(), flush=True)


if __name__ == "__main__":
    main()
