"""RNA velocity beside scVelo: gamma, direction on real cells, simulated rates and times, known edges, cost.

    bash benchmarks/peers/make_scvelo_env.sh
    uv run python -m benchmarks.quality.velocity --peer    # runs scVelo, too; without it, its kept results are scored
    uv run python -m benchmarks.quality.velocity --dynamical
    uv run python -m benchmarks.quality.velocity --cost 50000

scVelo 0.3.4 prepares the data (filter, normalisation, 30 components, 30 neighbours) and both sides read the same
counts and neighbours. "Forward" is the share of cells that are not of the last stage whose expected stage after one
step of the chain is later than their own. Baseline of the time: the first principal component, its sign chosen by the
truth. On the generated sets (`scvelo.datasets.simulation`, 500 cells x 30 genes, five seeds) the error is the median
over genes of |ratio / true - 1| of gamma / beta. DS8 is SERGIO's: type 0 differentiates to 1 and 2; "flow" is the mean
probability of a step from a cell of type 0 to one of the other, beside that of the way back.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import resource
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.quality.integration_data import data_dir
from scipy import sparse
from scipy.stats import spearmanr

HERE = Path(__file__).resolve().parents[1]
CACHE, PYTHON = HERE / "cache" / "velocity", HERE / "envs" / "scvelo" / "bin" / "python"
SEEDS = 5
MODES = {"steady_state": "deterministic", "stochastic": "stochastic"}  # and scVelo's name of it
GAMMA, FORWARD, TIME = 1e-4, 0.766, 0.781
STEADY_ERROR, DYNAMICAL_ERROR, LATENT_TIME = 0.031, 0.10, 0.611
EDGES = (("type0", "type1"), ("type0", "type2"))


def ours(data: Any, mode: str, **settings: Any) -> dict[str, Any]:
    """The operator's outputs, and the CPU-seconds of a second call under `seconds`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from diffbio.math.velocity_graph import distinct_candidates
    from diffbio.operators.singlecell import DifferentiableVelocity, VelocityConfig

    config = VelocityConfig(n_genes=data["spliced"].shape[1], kinetics_model=mode, normalize=False, **settings)
    op = DifferentiableVelocity(config, rngs=nnx.Rngs(0))
    inputs = {key: jnp.asarray(data[key], jnp.float32) for key in ("spliced", "unspliced")}
    near = np.asarray(data["neighbors"])
    inputs["neighbor_indices"] = jnp.asarray(near)
    inputs["candidate_indices"] = jnp.asarray(distinct_candidates(near, reach=config.reach))
    run = jax.jit(lambda data: op.apply(data)[0])
    found = jax.device_get(run(inputs))
    start = time.process_time()
    jax.block_until_ready(run(inputs))
    return {**found, "seconds": time.process_time() - start}


def chain_of(rows: Any, columns: Any, weights: Any, n: int) -> sparse.csr_array:
    """The Markov chain."""
    return sparse.csr_array((weights, (rows, columns)), shape=(n, n))


def forward(chain: sparse.csr_array, rank: np.ndarray) -> float:
    """Share of the cells before the last stage that are expected to move to a later one."""
    return float(((chain @ rank - rank) > 0)[rank < rank.max()].mean())


def direction(name: str) -> None:
    """Forward moves and times on one of the pancreas sets."""
    data = np.load(CACHE / f"{name}.npz")
    rank, n = data["stage_rank"], len(data["stage_rank"])
    first = abs(spearmanr(data["pca"][:, 0], rank).statistic)
    print(f"\n{name}, {n} cells x {data['spliced'].shape[1]} genes; first component and stage: {first:.3f}")
    print(f"{'':28} {'ours':>9} {'scVelo':>9} {'bar':>9}")
    for mode, theirs in MODES.items():
        found = ours(data, mode)
        if mode == "steady_state":
            used = data["deterministic_genes"]
            off = np.abs(found["gamma"] / data["deterministic_gamma"] - 1)[used].max()
            print(f"{'gamma, largest relative diff.':28} {off:>9.1e} {'':>9} {GAMMA:>9.0e}")
        chain = chain_of(found["transition_rows"], found["transition_columns"], found["transition_weights"], n)
        peer = chain_of(data[theirs + "_rows"], data[theirs + "_columns"], data[theirs + "_weights"], n)
        when, peers = (spearmanr(t, rank).statistic for t in (found["latent_time"], data[theirs + "_pseudotime"]))
        bar = name == "pancreas_velocity"
        rows = {
            "forward": (forward(chain, rank), forward(peer, rank), FORWARD if bar else np.nan),
            "time": (when, peers, TIME if bar else np.nan),
            "confidence": (found["velocity_confidence"].mean(), data[theirs + "_confidence"].mean(), np.nan),
        }
        for what, values in rows.items():
            print(
                f"{mode + ', ' + what:28}" + "".join(f" {v:>9.3f}" if np.isfinite(v) else f" {'':>9}" for v in values)
            )
        if mode == "dynamical":
            theirs_time = spearmanr(data["dynamical_latent_time"], rank).statistic
            print(f"{'  scVelo latent time':28} {'':>9} {theirs_time:>9.3f}")
        print(f"{'  CPU-s, compiled':28} {found['seconds']:>9.2f}")


def simulated() -> None:
    """Rates and times of generated cells."""
    errors: dict[str, list[float]] = {key: [] for key in ("steady", "their steady", "dynamical", "their dynamical")}
    times: dict[str, list[float]] = {"ours": [], "scVelo": [], "pc": []}
    for seed in range(SEEDS):
        data = np.load(CACHE / f"simulation_{seed}.npz")
        true, when = data["true_ratio"], data["true_t"]
        steady, dynamical = ours(data, "steady_state", reach=1), ours(data, "dynamical", reach=1)
        ratios = (
            steady["gamma"],
            data["deterministic_gamma"],
            dynamical["gamma"] / dynamical["beta"],
            data["dynamical_ratio"],
        )
        for key, ratio in zip(errors, ratios, strict=True):
            errors[key].append(float(np.nanmedian(np.abs(ratio / true - 1))))
        ordered = (dynamical["latent_time"], data["dynamical_latent_time"], data["pca"][:, 0])
        for key, time_ in zip(times, ordered, strict=True):
            times[key].append(float(spearmanr(time_, when).statistic))
    times["pc"] = [abs(v) for v in times["pc"]]
    print(f"\ngenerated, {SEEDS} seeds: first, then mean (range)")
    print(f"{'':28} {'ours':>28} {'scVelo':>28} {'first component':>28} {'bar':>7}")

    def said(values: list[float]) -> str:
        return f"{values[0]:.3f}; {np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"

    for name, one, other, bar in (
        ("steady state, error", errors["steady"], errors["their steady"], STEADY_ERROR),
        ("dynamical, error", errors["dynamical"], errors["their dynamical"], DYNAMICAL_ERROR),
    ):
        print(f"{name:28} {said(one):>28} {said(other):>28} {'':>28} {bar:>7}")
    found = (said(times[key]) for key in ("ours", "scVelo", "pc"))
    print(f"{'latent time':28}" + "".join(f" {values:>28}" for values in found) + f" {LATENT_TIME:>7}")


def known_edges() -> None:
    """Flow along SERGIO's differentiation edges."""
    data = np.load(CACHE / "grn_sergio_ds8.npz")
    kind, n = data["cell_type"], len(data["cell_type"])
    print("\ngrn_sergio_ds8: flow along the edge / back")
    for mode, theirs in MODES.items():
        found = ours(data, mode)
        mine = chain_of(found["transition_rows"], found["transition_columns"], found["transition_weights"], n)
        peer = chain_of(data[theirs + "_rows"], data[theirs + "_columns"], data[theirs + "_weights"], n)
        said = []
        for a, b in EDGES:
            flows = []
            for chain in (mine, peer):
                there, back = (chain[kind == x][:, kind == y].sum() / (kind == x).sum() for x, y in ((a, b), (b, a)))
                flows.append(f"{there:.3f} / {back:.3f}")
            said.append(f"{a}->{b} ours {flows[0]}, scVelo {flows[1]}")
        print(f"{mode:14} " + "; ".join(said))


def cost(n_cells: int) -> None:
    """CPU-seconds and peak memory of steady-state velocities of generated cells, 200 genes."""
    from diffbio.math.neighbors import knn

    data = dict(np.load(CACHE / "pancreas_velocity.npz"))
    rng = np.random.default_rng(0)
    genes = np.argsort(-data["Mu"].sum(axis=0))[:200]
    one, other = rng.integers(0, len(data["pca"]), (2, n_cells))
    share = rng.uniform(0, 1, (n_cells, 1)).astype(np.float32)
    mixed = {key: share * data[key][one] + (1 - share) * data[key][other] for key in ("pca", "Ms", "Mu")}
    start = time.process_time()
    near = knn(mixed["pca"], 29).indices
    search = time.process_time() - start
    cells = {"spliced": rng.poisson(mixed["Ms"][:, genes]), "unspliced": rng.poisson(mixed["Mu"][:, genes])}
    start = time.process_time()
    found = ours({**cells, "neighbors": near}, "steady_state")
    whole = time.process_time() - start - found["seconds"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{n_cells:,} cells x 200 genes: neighbours {search:.1f}, velocities and graph {found['seconds']:.1f} CPU-s ",
        end="",
    )
    print(f"({whole:.1f} with compilation), peak {peak:.1f} GiB")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="run scVelo first")
    parser.add_argument("--cost", type=int, help="number of cells")
    parser.add_argument("--dynamical", action="store_true", help="also on real cells and DS8; minutes")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.dynamical:
        MODES["dynamical"] = "dynamical"
    if asked.peer or not (CACHE / "peer.json").exists():
        script = HERE / "peers" / "run_scvelo.py"
        subprocess.run([PYTHON, script, data_dir(), CACHE, str(SEEDS)], check=True)
    if asked.cost:
        cost(asked.cost)
        return
    simulated()
    for name in ("pancreas_velocity", "pancreas_endocrinogenesis"):
        direction(name)
    known_edges()


if __name__ == "__main__":
    main()
