"""A loss on the trajectory trains the imputer and the normaliser before it: gain on cells that training did not see.

    uv run python -m benchmarks.quality.trajectory_training

Mouse embryonic stem cells after LIF withdrawal (mesc_lif_withdrawal_timecourse, 1,000 cells, days 0, 2, 4, 7), with all
molecules and thinned to a share of them. Diffusion imputer -> VAE normaliser -> diffusion pseudotime from the cell
nearest the centre of day 0. First the normaliser is trained by its own objective on one half of the cells. Then a loss
on the order of these cells trains imputer and normaliser together, 30 steps of Adam: the share of pairs of cells of
different days that are the wrong way round, made smooth, and the normaliser's own objective beside it. The gradient
goes through the eigenvectors of the cells' graph.

Reported is Spearman's correlation of pseudotime and day on the other half, whose counts and days training never saw,
before and after, mean and range over halvings. "placed": an unseen cell takes the mean rank of the 15 seen cells that
are nearest in the normaliser's latent space, as a new cell takes its place in an atlas. "by themselves": pseudotime of
the unseen cells in a graph of their own; with 500 cells that hangs on which axis of the data its first eigenvector
takes. "control": as many more steps of the normaliser's own objective, without the loss on the order. Baseline:
scanpy's steps, the normalised counts' principal components, without imputer, VAE or training.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.quality.integration_data import data_dir
from flax import nnx
from scipy.stats import spearmanr

FILE, SHARES, HALVINGS = "mesc_lif_withdrawal_timecourse.h5ad", (1.0, 0.1, 0.02), 3
SOFTNESS = 0.3  # of the loss, in median absolute deviations of pseudotime
STEPS, EPOCHS = 30, 60
LEARNING_RATES = {"imputer": 0.05, "normalizer": 5e-4}
NEAREST, N_COMPONENTS = 15, 30
COLUMNS = ("placed: scanpy", "before", "control", "after", "by themselves: before", "after ")


class Cells(NamedTuple):
    """Some of the cells, with the root among them."""

    counts: jax.Array
    day: jax.Array
    root: jax.Array


class Chain(nnx.Module):
    """Counts to pseudotime, one operator after the other."""

    def __init__(self, n_genes: int) -> None:
        from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
        from diffbio.operators.singlecell import DifferentiableDiffusionImputer, DiffusionImputerConfig

        rngs = nnx.Rngs(0)
        config = VAENormalizerConfig(n_genes=n_genes, latent_dim=10, hidden_dims=(64,), likelihood="poisson")
        self.imputer = DifferentiableDiffusionImputer(DiffusionImputerConfig(), rngs=rngs)
        self.normalizer = VAENormalizer(config, rngs=rngs)

    def imputed(self, cells: Cells) -> jax.Array:
        """Counts after diffusion."""
        return self.imputer.apply({"counts": cells.counts})[0]["imputed_counts"]

    def embedded(self, cells: Cells) -> jax.Array:
        """Latent positions."""
        return self.normalizer.apply({"counts": self.imputed(cells)})[0]["latent_mean"]

    def loss(self, cells: Cells, own_scale: float, weight: float) -> jax.Array:
        """Smooth share of the pairs that are the wrong way round, and the normaliser's own objective."""
        time = pseudotime(self.embedded(cells), cells.root)
        time = jnp.where(jnp.isfinite(time), time, 1.0)  # parts that the root is not in come last
        width = jax.lax.stop_gradient(SOFTNESS * jnp.median(jnp.abs(time - jnp.median(time))))
        wrong = jax.nn.sigmoid((time[:, None] - time) / width)
        earlier = cells.day[:, None] < cells.day
        own = self.normalizer.objective({"counts": jax.lax.stop_gradient(self.imputed(cells))})[0]
        return weight * (wrong * earlier).sum() / earlier.sum() + own / own_scale


def pseudotime(embeddings: jax.Array, root: jax.Array) -> jax.Array:
    """DPT with the operator's defaults."""
    from diffbio.operators.singlecell import DifferentiablePseudotime, PseudotimeConfig

    op = DifferentiablePseudotime(PseudotimeConfig(), rngs=nnx.Rngs(0))
    return op.apply({"embeddings": embeddings, "root_cell_index": root})[0]["pseudotime"]


@jax.jit
def placed(seen: jax.Array, root: jax.Array, unseen: jax.Array) -> jax.Array:
    """Mean rank of the nearest seen cells."""
    from diffbio.math.neighbors import nearest

    rank = jnp.argsort(jnp.argsort(pseudotime(seen, root))).astype(jnp.float32)
    return rank[nearest(seen, NEAREST, queries=unseen)].mean(axis=1)


def some(counts: np.ndarray, day: np.ndarray, rows: np.ndarray) -> Cells:
    """These cells; their root is the one of day 0 that is nearest the centre of that day."""
    counts, day = counts[rows], day[rows]
    scaled = log_scaled(counts)
    first = np.flatnonzero(day == 0)
    apart = ((scaled[first] - scaled[first].mean(axis=0)) ** 2).sum(axis=1)
    return Cells(jnp.asarray(counts), jnp.asarray(day), jnp.asarray(first[apart.argmin()]))


def log_scaled(counts: np.ndarray) -> np.ndarray:
    """Normalised as by scanpy."""
    return np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def spearman(time: Any, cells: Cells) -> float:
    """Rank correlation with the day; cells of infinite pseudotime come last."""
    return float(spearmanr(np.nan_to_num(np.asarray(time), posinf=2.0), np.asarray(cells.day)).statistic)


def scores(chain: Chain, seen: Cells, unseen: Cells) -> tuple[float, float]:
    """Of the unseen cells: placed, and by themselves."""
    embed = jax.jit(lambda cells: chain.embedded(cells))
    ours, theirs = embed(seen), embed(unseen)
    alone = jax.jit(pseudotime)(theirs, unseen.root)
    return spearman(placed(ours, seen.root, theirs), unseen), spearman(alone, unseen)


def train(chain: Chain, cells: Cells, weight: float = 1.0) -> Chain:
    """The chain at the step of least loss; with `weight` 0 without the loss on the order."""
    graph, params, rest = nnx.split(chain, nnx.Param, ...)
    own_scale = float(chain.normalizer.objective({"counts": chain.imputed(cells)})[0])

    @jax.jit
    def loss_of(params: Any, cells: Cells) -> Any:
        return jax.value_and_grad(lambda p: nnx.merge(graph, p, rest, copy=True).loss(cells, own_scale, weight))(params)

    parts = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)
    optimizer = optax.multi_transform({part: optax.adam(rate) for part, rate in LEARNING_RATES.items()}, parts)
    state, best = optimizer.init(params), (np.inf, params)
    for _ in range(STEPS):
        value, gradient = loss_of(params, cells)
        if value < best[0]:
            best = float(value), params
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
    return nnx.merge(graph, best[1], rest, copy=True)


def measured(share: float, halvings: int) -> np.ndarray:
    """A row for each halving: the columns of the table."""
    import anndata
    from sklearn.decomposition import PCA

    import diffbio

    adata = anndata.read_h5ad(data_dir() / FILE)
    counts, day = np.asarray(adata.to_df()).astype(np.int64), adata.obs["day"].astype(str).astype(np.float32).to_numpy()
    thinned = np.random.default_rng(0).binomial(counts, share).astype(np.float32)
    thinned = thinned[:, (thinned > 0).sum(axis=0) >= 3]
    rows = []
    for seed in range(halvings):
        order = np.random.default_rng(seed).permutation(len(day))
        seen, unseen = (some(thinned, day, part) for part in np.array_split(order, 2))
        pca = PCA(N_COMPONENTS, random_state=0).fit(log_scaled(np.asarray(seen.counts)))
        plain = [jnp.asarray(pca.transform(log_scaled(np.asarray(cells.counts)))) for cells in (seen, unseen)]
        chain = Chain(thinned.shape[1])
        diffbio.fit(chain.normalizer, {"counts": np.asarray(chain.imputed(seen))}, max_epochs=EPOCHS, progress=False)
        before = scores(chain, seen, unseen)
        control = scores(train(chain, seen, 0.0), seen, unseen)
        chain = train(chain, seen)
        after = scores(chain, seen, unseen)
        scanpys = spearman(placed(plain[0], seen.root, plain[1]), unseen)
        rows.append([scanpys, before[0], control[0], after[0], before[1], after[1]])
        print(
            f"  {share:.0%}, halving {seed}: t {float(chain.imputer.steps()):.2f}",
            *np.round(rows[-1], 3),
            file=sys.stderr,
        )
    return np.array(rows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halvings", type=int, default=HALVINGS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    print("Spearman of pseudotime and day on cells that training did not see, mean (range) over halvings")
    print(f"{'molecules':>10}" + "".join(f" {name:>22}" for name in COLUMNS))
    for share in asked.shares:
        found = measured(share, asked.halvings).T
        print(f"{share:>10.0%}" + "".join(f" {f'{v.mean():.3f} ({v.min():.3f}-{v.max():.3f})':>22}" for v in found))


if __name__ == "__main__":
    main()
