"""Preprocessing that adapts to damaged, shallow cells: thresholds, diffusion time and gene gates learned from a task.

    uv run python -m benchmarks.quality.trained_as_one --rows preprocessing

Cells of `damaged_cells`, half of them with types, the other half never seen in training; each half is the seen one in
turn, and a seed's figure is the mean of both. Chain: quality filter
(weights) -> diffusion imputer -> library size normaliser -> stochastic gates of the genes. Behind it, in every arm, one
kernel classifier: each seen cell votes for its type by its weight from the filter, a type's votes are divided by its
total weight. Unseen cells are diffused among themselves, and are called by the seen ones; of four widths of the kernel
the one with the least loss is taken. Scored are cells, intact or dying, not the near-empty droplets.

The loss sees the seen half only: its cells are divided into two folds, each with a graph of its own, and those of one
fold are called by those of the other, so that no cell is smoothed together with the cells that call it. It is the cross
entropy, mean of the types' means, with 10 % of doubt in the labels (in the manner of neighbourhood components,
Goldberger et al. 2005). A cell that the filter leaves out costs what guessing costs: a filter that drops all that is
difficult gains nothing.

- tutorial thresholds: 200 to 2,500 genes, 5 % mitochondrial; t = 3; the 1,000 most variable of 2,000 genes.
- MAD thresholds: those with which the quality filter starts (5 and 3 median absolute deviations); the rest the same.
- grid: hard thresholds x t x number of variable genes (2,000 points in random order), the least loss of one division
  into folds among those that fit into the CPU-seconds that "joint" took, its coarse search and divisions included.
- joint: a coarse search, which is the first points of that same order, then the gradient from the best of them: its
  genes open and the others nearly closed, its thresholds made soft, all parameters by the loss plus a price of open
  gates. Each step takes the next of several divisions into folds, so that the gates cannot fit one of them; the
  parameters are the mean of those after the last steps.
- stage-wise: the operators of "joint" from the same start, each by its own objective on what the ones before give, for
  half as many epochs again as each prefers (about as long as "joint").
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.quality.damaged_cells import DROPLET, Cells, damaged
from flax import nnx

TITLE = "adapted preprocessing"
MEASURE = "balanced accuracy on unseen damaged cells"
DATA = ("pbmc3k", "pbmc4k_ambient")
ARMS = ("tutorial thresholds", "MAD thresholds", "grid", "stage-wise", "joint")
BEAT = ("tutorial thresholds", "MAD thresholds", "grid", "stage-wise")

N_GENES, TOP = 2000, 1000
DIVISIONS = 4  # of the seen cells into two folds
STEPS = 24  # of the gradient
LAST = 8  # steps whose parameters are averaged
LONGER = 1.5  # times the epochs that each operator of "stage-wise" prefers
FIRST = 24  # points of the grid, from the best of which the gradient starts
OPEN, CLOSED = 1.0, -0.3  # where gates start: with noise of 0.5, one in four of the closed ones opens in a step
SOFT = 0.5  # of the thresholds in training, in median absolute deviations
RATES = {"quality": 0.4, "imputer": 0.1, "gates": 0.1}  # thresholds are in median absolute deviations
WIDTHS = (3.0, 10.0, 30.0, 100.0)  # of the classifier's kernel, chosen on the seen half in every arm
WIDTH = 30.0  # in training and in the searches
DOUBT = 0.1
HARD = 1e-3  # softness of the quality filter, in median absolute deviations
PRICE = 0.1  # of the share of open gates, beside the loss
GRID = (
    (10.0, 25.0, 40.0, 60.0, 80.0, 100.0, 150.0, 200.0),
    (0.05, 0.08, 0.12, 0.2, 1.0),
    (1.0, 1.5, 2.0, 3.0, 5.0),
    (25, 50, 75, 100, 150, 200, 300, 500, 1000, 2000),
)


class Problem(NamedTuple):
    """A damaged data set of which one half is seen, ready for the chain."""

    seen: dict[str, np.ndarray]
    divisions: list[dict[str, jax.Array]]  # the seen cells in two folds, each with a graph of its own
    unseen: dict[str, np.ndarray]
    types: np.ndarray  # of the unseen cells
    real: np.ndarray  # which of them are cells
    order: np.ndarray  # genes, the most variable first
    n_types: int
    draw: int  # seed of everything that an arm draws
    spent: float  # CPU-seconds that the divisions but the first took: a part of what "joint" costs


class Setting(NamedTuple):
    """What a search may set; the defaults are the operators' own."""

    genes_min: float = 200.0
    mitochondrial_max: float = 0.05
    t: float = 3.0
    n_top: int = TOP


def votes(at: Any, to: Any, weight: Any, label: Any, width: Any, n_types: int, vote: Any = None) -> Any:
    """Probabilities (cells, types): the share of each type's weight that lies near the cell.

    vote: which cells of `to` are asked, (cells, cells of `to`); None is all.
    """
    d = (at**2).sum(axis=1)[:, None] + (to**2).sum(axis=1) - 2 * at @ to.T
    kernel = -width * d / jnp.maximum(d.mean(), 1e-12)
    kernel = kernel if vote is None else jnp.where(vote, kernel, -jnp.inf)
    kernel = jnp.exp(kernel - jax.lax.stop_gradient(kernel.max(axis=1, keepdims=True)))
    weighted = weight[:, None] * jax.nn.one_hot(label, n_types)
    total = weighted.sum(axis=0) if vote is None else vote @ weighted
    found = kernel @ weighted / jnp.maximum(total, 1e-3)
    return found / jnp.maximum(found.sum(axis=1, keepdims=True), 1e-20)


def crossed(gated: Any, weight: Any, label: Any, fold: Any, width: float, n_types: int) -> Any:
    """The loss: each cell of a fold by the votes of the other."""
    label = label.astype(int)
    found = votes(gated, gated, weight, label, width, n_types, fold[:, None] != fold)
    return cross_entropy(found, weight, label)


def cross_entropy(probabilities: Any, weight: Any, label: Any) -> Any:
    """Mean of the types' means; a share of the labels may be wrong, and a cell that is left out counts as guessed."""
    n_types = probabilities.shape[1]
    chosen = jnp.take_along_axis(probabilities, label[:, None], axis=1)[:, 0]
    lost = -jnp.log((1 - DOUBT) * chosen + DOUBT / n_types)
    lost = weight * lost + (1 - weight) * math.log(n_types)
    types = jax.nn.one_hot(label, n_types)
    number = types.sum(axis=0)
    return ((lost @ types) / jnp.maximum(number, 1)).sum() / (number > 0).sum()


def problem(name: str, seed: int, half: int) -> Problem:
    """The data; the graph of the cells is made once per half and division, by MAGIC's components of the counts."""
    from scipy import sparse

    from diffbio.data.genes import highly_variable_genes

    data = damaged(name, seed, half, n_genes=N_GENES)
    scores = highly_variable_genes(sparse.csr_matrix(data.seen.counts), n_top_genes=TOP)["variances_norm"].to_numpy()
    rng = np.random.default_rng([seed, half, 5])
    divisions, began = [], 0.0
    for number in range(DIVISIONS):
        made = prepared(data.seen, rng.permutation(len(data.seen.types)) % 2)
        divisions.append({key: jnp.asarray(value) for key, value in made.items()})
        began = began if number else time.process_time()
    spent = time.process_time() - began
    return Problem(
        prepared(data.seen), divisions,
        prepared(data.unseen), data.unseen.types, data.unseen.state != DROPLET,
        np.argsort(-scores, kind="stable"), int(max(data.seen.types.max(), data.unseen.types.max())) + 1,
        2 * seed + half, spent,
    )  # fmt: skip


def prepared(cells: Cells, fold: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What the chain reads; cells of different folds are no neighbours."""
    imputer = chain_of(np.ones(N_GENES), 2, 0)["imputer"]
    fold = np.zeros(len(cells.types), int) if fold is None else fold
    rows = [np.flatnonzero(fold == number) for number in np.unique(fold)]
    width = min(imputer.config.n_pca_components, *(len(r) for r in rows))
    embeddings = np.zeros((len(fold), width), np.float32)
    near = np.zeros((len(fold), imputer.config.n_neighbors * imputer.config.reach), int)
    for own in rows:
        embeddings[own] = imputer.embedded_on_host(cells.counts[own])
        near[own] = own[imputer.neighbors_on_host(embeddings[own])]
    graph = {"embeddings": embeddings, "neighbor_indices": near, "fold": fold.astype(np.float32)}
    return {"counts": cells.counts, **cells.totals, **graph, "label": cells.types.astype(np.float32)}


def chain_of(gates: np.ndarray, n_types: int, seed: int) -> Any:
    """Quality filter, imputer, normaliser and gates; the classifier is the loss."""
    from diffbio.operators.normalization import (
        LibrarySizeConfig,
        LibrarySizeNormalizer,
        StochasticGateConfig,
        StochasticGateSelector,
    )
    from diffbio.operators.singlecell import (
        DifferentiableDiffusionImputer,
        DifferentiableQualityFilter,
        DiffusionImputerConfig,
        QualityFilterConfig,
    )
    from diffbio.pipelines import Chain, Part, Term

    def task(gated: Any, weight: Any, label: Any, fold: Any) -> Any:
        return crossed(gated, weight, label, fold, WIDTH, n_types)

    rngs = nnx.Rngs(seed)
    selector = StochasticGateSelector(StochasticGateConfig(n_genes=len(gates)), rngs=rngs, init_gate=gates)
    normalizer = LibrarySizeNormalizer(LibrarySizeConfig(), rngs=rngs)
    parts = [
        Part(DifferentiableQualityFilter(QualityFilterConfig(), rngs=rngs), "quality"),
        Part(DifferentiableDiffusionImputer(DiffusionImputerConfig(), rngs=rngs), "imputer"),
        Part(normalizer, "normalizer", reads={"counts": "imputed_counts"}),
        Part(selector, "gates", reads={"features": "normalized"}),
    ]
    price = Term("price", lambda n_open: n_open / len(gates), reads=("l0_penalty",), weight=PRICE)
    return Chain(parts, terms=[Term("task", task, reads=("gated", "cell_weights", "label", "fold")), price])


def start(p: Problem) -> Any:
    """The chain with the operators' own start."""
    chain = chain_of(gates_of(p, TOP), p.n_types, p.draw)
    chain["quality"].init_from(p.seen)
    for name in chain.names:
        chain[name].mark_fitted()
    chain.eval_mode()
    return chain


def gates_of(p: Problem, n_top: int) -> np.ndarray:
    """1 for the most variable genes, 0 for the others."""
    found = np.zeros(len(p.order), np.float32)
    found[p.order[:n_top]] = 1
    return found


def put(chain: Any, p: Problem, s: Setting) -> None:
    """Sets the operators' parameters."""
    quality, imputer = chain["quality"], chain["imputer"]
    middle, scale = np.asarray(quality.median[...]), np.asarray(quality._scale())
    limits = [-np.inf, math.log1p(s.genes_min), np.inf, math.log1p(2500), s.mitochondrial_max]
    of = [0, 1, 0, 1, 2]
    far = [(v - middle[m]) / scale[m] if np.isfinite(v) else np.sign(v) * 100 for v, m in zip(limits, of, strict=True)]
    quality.location[...] = jnp.asarray(far, jnp.float32)
    quality.log_slope[...] = jnp.full(5, -math.log(HARD))
    imputer.t[...] = jnp.asarray(s.t, jnp.float32)
    chain["gates"].mu[...] = jnp.asarray(gates_of(p, s.n_top))


def grid(draw: int) -> Iterator[Setting]:
    """All points, in random order."""
    points = [Setting(*point) for point in itertools.product(*GRID)]
    return iter([points[i] for i in np.random.default_rng([draw, 7]).permutation(len(points))])


def opened(chain: Any, p: Problem, s: Setting) -> None:
    """Sets the operators' parameters so that the gradient can move them away from this point.

    Thresholds are soft; one beyond all cells stands just outside the last. Gates that are closed may open.
    """
    put(chain, p, s)
    quality = chain["quality"]
    found = quality.apply({key: jnp.asarray(p.seen[key]) for key in quality.requires if key in p.seen})[0]
    metrics = np.stack([found[key] for key in ("log_counts", "log_genes", "mitochondrial_fraction")], axis=1)
    z = (metrics - np.asarray(quality.median[...])) / np.asarray(quality._scale())
    of = [0, 1, 0, 1, 2]
    limits = np.clip(np.asarray(quality.location[...]), z.min(axis=0)[of] - 1, z.max(axis=0)[of] + 1)
    quality.location[...] = jnp.asarray(limits, jnp.float32)
    quality.log_slope[...] = jnp.full(5, -math.log(SOFT))
    chain["gates"].mu[...] = jnp.where(jnp.asarray(gates_of(p, s.n_top)) > 0, OPEN, CLOSED)


def searched(p: Problem, points: Iterator[Setting], seconds: float) -> tuple[Any, Setting, int]:
    """The chain at the point of the least loss on the seen half, it, and how many fitted into the CPU-seconds."""
    began = time.process_time()
    chain = start(p)
    graph = nnx.graphdef(chain)
    loss = jax.jit(lambda state, data: nnx.merge(graph, state).objective(data)[1]["task"])
    best, at, n = np.inf, Setting(), 0
    for point in points:
        put(chain, p, point)
        found = float(loss(nnx.state(chain), p.divisions[0]))
        n += 1
        if found < best:
            best, at = found, point
        if time.process_time() - began > seconds:
            break
    put(chain, p, at)
    return chain, at, n


def coarse(p: Problem) -> Any:
    """The chain at the best of the first points of the grid, ready for the gradient."""
    chain, at, _ = searched(p, itertools.islice(grid(p.draw), FIRST), math.inf)
    opened(chain, p, at)
    return chain


def stage_wise(p: Problem) -> Any:
    """Each operator by its own objective."""
    import diffbio
    from diffbio.pipelines import Stage

    chain = coarse(p)
    graph = ("embeddings", "neighbor_indices")  # these know the molecules that the imputer's objective holds out
    data = {key: value for key, value in p.seen.items() if key not in graph}
    epochs = {name: round(LONGER * chain[name].fit_defaults["max_epochs"]) for name in RATES}
    stages = [Stage(parts=(name,), max_epochs=number) for name, number in epochs.items()]
    diffbio.fit(chain, data, seed=p.draw, stages=stages, progress=False)
    return chain


def joint(p: Problem) -> Any:
    """All parameters by the task's loss, of one division after the other."""
    import optax

    from diffbio.pipelines.chain_stages import part_by_part

    chain = coarse(p)
    chain.train_mode()
    parts: tuple[Any, ...] = nnx.split(chain, nnx.Param, ...)
    graph, params, rest = parts
    optimizer = part_by_part(RATES, optax.set_to_zero())

    @jax.jit
    def step(params: Any, rest: Any, state: Any, data: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            kept: tuple[Any, ...] = nnx.split(model, nnx.Param, ...)
            return model.objective(data)[0], kept[2]

        (value, rest), slope = jax.value_and_grad(loss, has_aux=True)(params)
        # as diffbio.fit does: a step that is not finite is left out
        good = jnp.stack([jnp.isfinite(leaf).all() for leaf in (value, *jax.tree.leaves(slope))]).all()
        moved, after = optimizer.update(slope, state, params)
        found, kept = (optax.apply_updates(params, moved), after), (params, state)
        params, state = jax.tree.map(lambda new, old: jnp.where(good, new, old), found, kept)
        return params, rest, state

    state, seen = optimizer.init(params), []
    for number in range(STEPS):
        params, rest, state = step(params, rest, state, p.divisions[number % DIVISIONS])
        seen.append(params)
    nnx.update(chain, jax.tree.map(lambda *steps: sum(steps) / LAST, *seen[-LAST:]))
    chain.eval_mode()
    return chain


def scored(chain: Any, p: Problem) -> tuple[float, float]:
    """Mean recall of the types among the unseen cells that are cells, by the kernel classifier, and cross entropy."""
    graph, state = nnx.split(chain)

    @jax.jit
    def run(state: Any, data: Any) -> tuple[Any, Any]:
        found = nnx.merge(graph, state).apply(data)[0]
        return found["gated"], found["cell_weights"]

    def of(data: Mapping[str, Any]) -> tuple[Any, Any]:
        return run(state, {key: jnp.asarray(value) for key, value in data.items() if key not in ("label", "fold")})

    (to, weight), (at, _) = of(p.seen), of(p.unseen)
    label = jnp.asarray(p.seen["label"]).astype(int)

    @jax.jit
    def losses(gated: Any, weight: Any, fold: Any) -> Any:
        return jnp.stack([crossed(gated, weight, label, fold, width, p.n_types) for width in WIDTHS])

    total = np.stack([losses(*of(data), data["fold"]) for data in p.divisions]).sum(axis=0)
    width = WIDTHS[int(np.argmin(total))]
    found = votes(at, to, weight, label, width, p.n_types)[np.flatnonzero(p.real)]
    called, types = np.asarray(found).argmax(axis=1), p.types[p.real]
    recall = float(np.mean([(called[types == t] == t).mean() for t in np.unique(types)]))
    return recall, float(cross_entropy(found, jnp.ones(len(types)), jnp.asarray(types)))


def learned(chain: Any, p: Problem) -> dict[str, float]:
    """Thresholds, diffusion and gates in words of the data."""
    inputs = {key: jnp.asarray(value) for key, value in p.seen.items() if key in chain["quality"].requires}
    found = chain["quality"].apply(inputs)[0]
    limits, gates = np.asarray(found["thresholds"]), np.asarray(chain["gates"].mu[...])
    return {
        "genes_min": float(np.expm1(limits[1])), "counts_min": float(np.expm1(limits[0])),
        "mitochondrial_max": float(limits[4]), "weight": float(np.mean(found["cell_weights"])),
        "t": float(chain["imputer"].steps()), "bandwidth": float(np.exp(chain["imputer"].log_bandwidth[...])),
        "decay": float(np.exp(chain["imputer"].log_decay[...])), "open_gates": float((gates > 0).sum()),
    }  # fmt: skip


def measured(name: str, seed: int) -> dict[str, float]:
    """Of every arm, the mean accuracy of both halves; of each half, its accuracy, CPU-seconds, and what it ended at."""
    halves = [of_half(name, seed, half) for half in (0, 1)]
    row = {key: float(np.mean([found[key] for found in halves])) for arm in ARMS for key in (arm, f"loss_{arm}")}
    return row | {f"{key} of half {half}": value for half, found in enumerate(halves) for key, value in found.items()}


def of_half(name: str, seed: int, half: int) -> dict[str, float]:
    """The same with one of the halves as the seen one."""
    p = problem(name, seed, half)
    row: dict[str, float] = {}

    def note(arm: str, chain: Any, spent: float) -> None:
        (row[arm], row[f"loss_{arm}"]), row[f"cpu_{arm}"] = scored(chain, p), round(spent, 1)
        row.update({f"{key}_{arm}": round(value, 4) for key, value in learned(chain, p).items()})
        told = f"{name} seed {seed} half {half} {arm}: {row[arm]:.3f}, {row[f'loss_{arm}']:.3f}, {spent:.0f} CPU-s"
        print(f"  {told}", file=sys.stderr, flush=True)

    chain = start(p)
    note("MAD thresholds", chain, 0.0)
    put(chain, p, Setting())
    note("tutorial thresholds", chain, 0.0)
    began = time.process_time()
    chain = joint(p)
    spent = p.spent + time.process_time() - began
    note("joint", chain, spent)
    began = time.process_time()
    chain, _, row["points_grid"] = searched(p, grid(p.draw), spent)
    note("grid", chain, time.process_time() - began)
    began = time.process_time()
    chain = stage_wise(p)
    note("stage-wise", chain, time.process_time() - began)
    return row
