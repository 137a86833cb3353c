"""Ordering in time: the days of some cells train imputation, normalisation and pseudotime; measured on other cells.

    uv run python -m benchmarks.quality.trained_as_one --rows ordering

Diffusion imputer -> VAE normaliser -> diffusion pseudotime in a linear metric that learns, from the cell of the first
day that is nearest that day's centre. Half of the cells train, all of them in every step. First phase, shared: the
imputer by molecular cross-validation, the VAE by its evidence bound, then the metric from the days, by pseudotime's own
objective, 1 - Pearson's correlation of pseudotime and day. Then, 40 steps more for every part:

stage-wise: imputer, VAE and metric go on one after the other, each by its own objective on what is before it.
joint: pseudotime's objective reaches metric, VAE and imputer in every step, beside the VAE's evidence bound, whose
    gradient stays within the VAE.

An unseen cell takes the mean pseudotime rank of the 15 seen cells that are nearest in the learned metric, as a new cell
takes its place in an atlas; unseen counts are imputed among unseen cells. Also stored: "<arm>, by themselves",
pseudotime in a graph of the unseen cells alone; "<arm>, seen"; "steps_<arm>", the imputer's t; "ceiling", the largest
correlation that an order without ties can have with these days.

"scanpy's steps": principal components of normalised counts and DPT, placed alike, without days. "ridge on components":
the day regressed on these components, supervised by the same days as both arms, but no trajectory. "ridge on genes":
the same on log(1 + counts) of all genes.

`--shares` prints mESC thinned to shares of its molecules instead (halvings 0 to 2):

    uv run python -m benchmarks.quality.joint_ordering --shares 0.1 0.02
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.quality.integration_data import data_dir
from flax import nnx
from scipy.stats import spearmanr

TITLE = "ordering in time"
MEASURE = "Spearman of pseudotime and day on unseen cells"
DATA = ("mesc_lif_withdrawal_timecourse", "larry_haematopoiesis_clones")
ARMS = ("scanpy's steps", "ridge on components", "ridge on genes", "first phase", "stage-wise", "joint")
BEAT = ("stage-wise", "first phase", "scanpy's steps")

HIDDEN, LATENT, DROPOUT = (64,), 10, 0.5
FIRST_EPOCHS = 60  # of the VAE, in minibatches of 128
STEPS = 40  # of the metric in the first phase, and of every part in the second
RATES = {"imputer": 0.1, "vae": 5e-3, "pseudotime": 0.03}
ORDER_WEIGHT = 1e5  # of 1 - r beside the evidence bound, of some hundred to thousand nats a cell
N_NEIGHBORS = 60  # of pseudotime's graph: with the default 15, days come apart in it, where the loss has no gradient
NEAREST, N_COMPONENTS = 15, 30


class Cells(NamedTuple):
    """Some of the cells; the root is one of the first day."""

    counts: np.ndarray
    day: np.ndarray
    root: int

    def without_day(self) -> dict[str, Any]:
        """What the chain reads."""
        return {"counts": self.counts, "root_cell_index": np.asarray(self.root)}


def loaded(name: str, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Counts, thinned to a share of the molecules, and days."""
    import anndata

    adata = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    counts = np.asarray(adata.to_df()).astype(np.int64)
    counts = counts if share == 1 else np.random.default_rng(0).binomial(counts, share)
    return counts.astype(np.float32), adata.obs["day"].astype(str).astype(np.float32).to_numpy()


def halves(counts: np.ndarray, day: np.ndarray, seed: int) -> tuple[Cells, Cells]:
    """Cells of training and unseen cells, with the genes that at least three of training express."""
    seen, unseen = np.array_split(np.random.default_rng(seed).permutation(len(day)), 2)
    genes = (counts[seen] > 0).sum(axis=0) >= 3
    return some(counts[seen][:, genes], day[seen]), some(counts[unseen][:, genes], day[unseen])


def some(counts: np.ndarray, day: np.ndarray) -> Cells:
    """These cells; their root is the one of the first day that is nearest its centre."""
    scaled = log_scaled(counts)
    first = np.flatnonzero(day == day.min())
    apart = ((scaled[first] - scaled[first].mean(axis=0)) ** 2).sum(axis=1)
    return Cells(counts, day, int(first[apart.argmin()]))


def log_scaled(counts: np.ndarray) -> np.ndarray:
    """Normalised as by scanpy."""
    return np.asarray(np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)))


def chain_of(n_genes: int, seed: int) -> Any:
    """Imputer, normaliser and pseudotime in a metric that learns."""
    from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
    from diffbio.operators.singlecell import (
        DifferentiableDiffusionImputer,
        DifferentiablePseudotime,
        DiffusionImputerConfig,
        PseudotimeConfig,
    )
    from diffbio.pipelines import Chain, Own, Part

    rngs = nnx.Rngs(seed)
    vae = VAENormalizerConfig(
        n_genes=n_genes, latent_dim=LATENT, hidden_dims=HIDDEN, likelihood="poisson", dropout_rate=DROPOUT
    )
    metric = PseudotimeConfig(n_neighbors=N_NEIGHBORS, learn_metric="linear", n_features=LATENT)
    parts = [
        Part(DifferentiableDiffusionImputer(DiffusionImputerConfig(), rngs=rngs), "imputer"),
        Part(VAENormalizer(vae, rngs=rngs), "vae", reads={"counts": "imputed_counts"}),
        Part(DifferentiablePseudotime(metric, rngs=rngs), "pseudotime", reads={"embeddings": "latent_mean"}),
    ]
    terms = [Own("vae", local=True), Own("pseudotime", weight=ORDER_WEIGHT)]
    return Chain(parts, terms=terms, inputs=("counts", "root_cell_index", "time"))


def fit(chain: Any, seen: Cells, seed: int, stages: list[Any]) -> float:
    """Trains; CPU-seconds."""
    import diffbio

    start = time.process_time()
    diffbio.fit(chain, {**seen.without_day(), "time": seen.day}, seed=seed, stages=stages, progress=False)
    return time.process_time() - start


def trained(seen: Cells, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The chain after each arm's training, and CPU-seconds."""
    from diffbio.pipelines import Stage

    def stage(*parts: str) -> Any:
        every: dict[str, Any] = {"batch_size": len(seen.day), "minibatches": "all", "validation": 0.0}
        return Stage(parts=parts, max_epochs=STEPS, learning_rate=RATES, **every)

    chain = chain_of(seen.counts.shape[1], seed)
    vae = Stage(parts=("vae",), max_epochs=FIRST_EPOCHS, batch_size=128, learning_rate=1e-3, validation=0.0)
    first = fit(chain, seen, seed, [Stage(parts=("imputer",)), vae, stage("pseudotime")])
    arms = {"first phase": chain, "stage-wise": nnx.clone(chain), "joint": nnx.clone(chain)}
    seconds = {
        "first phase": first,
        "stage-wise": first + fit(arms["stage-wise"], seen, seed, [stage(name) for name in RATES]),
        "joint": first + fit(arms["joint"], seen, seed, [stage()]),
    }
    return arms, seconds


def placed(points: np.ndarray, pseudotime: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Mean rank of the nearest points."""
    from diffbio.math.neighbors import nearest

    rank = np.argsort(np.argsort(pseudotime, kind="stable")).astype(float)
    near = nearest(jnp.asarray(points), NEAREST, queries=jnp.asarray(queries))
    return np.asarray(rank[np.asarray(near)].mean(axis=1))


def spearman(found: np.ndarray, day: np.ndarray) -> float:
    """Rank correlation; cells of infinite pseudotime come last."""
    return float(spearmanr(np.nan_to_num(found, posinf=2.0), day).statistic)


def scores(arm: str, chain: Any, seen: Cells, unseen: Cells) -> dict[str, float]:
    """What is measured of one arm."""
    run = jax.jit(lambda cells: chain.apply(cells)[0])
    ours, theirs = run(seen.without_day()), run(unseen.without_day())
    mapped, queries = (np.asarray(chain["pseudotime"].mapped(found["latent_mean"])) for found in (ours, theirs))
    times = np.asarray(ours["pseudotime"])
    return {
        arm: spearman(placed(mapped, times, queries), unseen.day),
        f"{arm}, by themselves": spearman(np.asarray(theirs["pseudotime"]), unseen.day),
        f"{arm}, seen": spearman(times, seen.day),
        f"steps_{arm}": float(chain["imputer"].steps()),
    }


def baselines(seen: Cells, unseen: Cells) -> dict[str, float]:
    """Scanpy's steps, and the day regressed, with the penalty of least leave-one-out error."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV

    from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

    pca = PCA(N_COMPONENTS, random_state=0).fit(log_scaled(seen.counts))
    ours, theirs = (pca.transform(log_scaled(cells.counts)).astype(np.float32) for cells in (seen, unseen))

    def plain(size: int) -> float:
        dpt = DifferentiablePseudotime(PseudotimeConfig(n_neighbors=size), rngs=nnx.Rngs(0))
        times = dpt.apply({"embeddings": ours, "root_cell_index": jnp.asarray(seen.root)})[0]["pseudotime"]
        return spearman(placed(ours, np.asarray(times), theirs), unseen.day)

    penalties = np.logspace(-1, 5, 13)
    components = RidgeCV(penalties).fit(ours, seen.day).predict(theirs)
    genes = RidgeCV(penalties).fit(np.log1p(seen.counts), seen.day).predict(np.log1p(unseen.counts))
    return {
        "scanpy's steps": plain(15),
        f"scanpy's steps, {N_NEIGHBORS} neighbours": plain(N_NEIGHBORS),
        "ridge on components": spearman(components, unseen.day),
        "ridge on genes": spearman(genes, unseen.day),
        "ceiling": spearman(np.argsort(np.argsort(unseen.day, kind="stable")), unseen.day),
    }


def measured(name: str, seed: int, share: float = 1.0) -> dict[str, float]:
    """Of each arm: the score on unseen cells, "cpu_<arm>" seconds of its training, and what the module names."""
    warnings.simplefilter("ignore")
    seen, unseen = halves(*loaded(name, share), seed)
    found = baselines(seen, unseen)
    arms, seconds = trained(seen, seed)
    for arm, chain in arms.items():
        found |= scores(arm, chain, seen, unseen) | {f"cpu_{arm}": seconds[arm]}
    return found


def main() -> None:
    """Prints the table of thinned mESC."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.1, 0.02))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    asked = parser.parse_args()
    print(f"| molecules | {' | '.join(ARMS)} | ceiling |\n|---{'|---' * (len(ARMS) + 1)}|")
    for share in asked.shares:
        rows = []
        for seed in asked.seeds:
            found = measured(DATA[0], seed, share)
            rows.append([found[arm] for arm in (*ARMS, "ceiling")])
            print(f"  {share:.0%}, seed {seed}:", *np.round(rows[-1], 3), file=sys.stderr, flush=True)
        cells = [f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})" for v in np.array(rows).T]
        print(f"| {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
