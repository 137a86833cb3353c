"""Five labels per type train the normaliser before the classifier: joint against frozen features, on unseen cells.

    uv run python -m benchmarks.quality.few_labels

Counts -> VAE normaliser -> soft k-means with one centroid per type, whose memberships are the predicted types. Both
arms have these parameters, data, batches and epochs. "frozen": the VAE learns from all training cells by its own
objective for the whole budget, then the centroids alone learn the labels. "joint": the VAE learns alone for half of
the budget, then VAE and centroids together by its objective and the cross entropy of the labelled cells. Half of the
cells are never seen in training; balanced accuracy (mean recall of the types) is theirs. "PCA + kNN" and "PCA +
logistic" see the same labelled cells in 30 principal components of the training cells.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from benchmarks.quality.integration_data import data_dir
from flax import nnx

FILES = ("pbmc3k.h5ad", "pbmc_three_chemistries.h5ad")
PER_TYPE, N_GENES, LATENT, EPOCHS, SEEDS = 5, 2000, 20, 40, 5
LABELLED_SHARE = 0.2  # of the rows of training: labelled cells are repeated, in both arms, to be in every minibatch
WEIGHT = 20.0  # of the cross entropy beside the VAE's objective, of hundreds of nats a cell


def load(name: str) -> dict[str, Any]:
    """Counts of variable genes, types and batches as numbers."""
    import anndata
    import pandas as pd

    from diffbio.data.genes import highly_variable_genes

    adata = anndata.read_h5ad(data_dir() / name)
    batches = pd.Categorical(adata.obs["batch"]).codes.astype(int)
    top = highly_variable_genes(adata.X, n_top_genes=N_GENES, batch_labels=batches)["highly_variable"].to_numpy()
    counts = np.asarray(adata.to_df().to_numpy()[:, top], np.float32)
    kept = counts.sum(axis=1) > 0
    types = pd.Categorical(adata.obs["cell_type"]).codes.astype(int)[kept]
    return {"counts": counts[kept], "types": types, "batch_labels": batches[kept]}


def divided(data: dict[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of training cells, of the labelled ones among them, and of unseen cells."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data["types"]))
    seen, unseen = np.array_split(order, 2)
    labelled = np.concatenate([seen[data["types"][seen] == t][:PER_TYPE] for t in np.unique(data["types"])])
    return seen, labelled, unseen


def chain_of(data: dict[str, Any], seed: int) -> Any:
    """Normaliser and classifier."""
    from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
    from diffbio.operators.singlecell import SoftClusteringConfig, SoftKMeansClustering
    from diffbio.pipelines import Chain, Own, Part, Term

    rngs = nnx.Rngs(seed)
    n_types, n_batches = int(data["types"].max()) + 1, int(data["batch_labels"].max()) + 1
    config = VAENormalizerConfig(n_genes=data["counts"].shape[1], latent_dim=LATENT, n_batches=n_batches)
    groups = SoftKMeansClustering(SoftClusteringConfig(n_clusters=n_types, n_features=LATENT), rngs=rngs)

    def cross_entropy(memberships: Any, label: Any) -> Any:
        known = label >= 0
        chosen = jnp.take_along_axis(memberships, jnp.maximum(label, 0).astype(int)[:, None], axis=1)[:, 0]
        return -(jnp.log(jnp.maximum(chosen, 1e-6)) * known).sum() / jnp.maximum(known.sum(), 1)

    parts = [Part(VAENormalizer(config, rngs=rngs), "vae"), Part(groups, "types", reads={"embeddings": "latent_mean"})]
    labels = Term("labels", cross_entropy, reads=("cluster_assignments", "label"), weight=WEIGHT)
    return Chain(parts, terms=[Own("vae"), labels])


def trained(data: dict[str, Any], seen: np.ndarray, labelled: np.ndarray, seed: int, arm: str) -> Any:
    """The chain after one arm's training."""
    import diffbio
    from diffbio.pipelines import Stage

    chain = chain_of(data, seed)
    repeats = max(1, round(LABELLED_SHARE * len(seen) / len(labelled)))
    rows = np.concatenate([seen, *[labelled] * repeats])
    label = np.where(np.isin(rows, labelled), data["types"][rows], -1).astype(np.float32)
    table = {"counts": data["counts"][rows], "label": label}
    if data["batch_labels"].max():
        table["batch_labels"] = data["batch_labels"][rows]
    first = EPOCHS if arm == "frozen" else EPOCHS // 2
    how = {"batch_size": 128, "validation": 0.0}
    diffbio.fit(chain, table, seed=seed, stages=[Stage(parts="vae", max_epochs=first, **how)], progress=False)
    start_from_labels(chain, data, labelled)
    if arm == "frozen":
        rest = Stage(parts="types", terms="labels", max_epochs=EPOCHS // 2, learning_rate=1e-2, **how)
    else:
        rest = Stage(terms=("vae", "labels"), max_epochs=EPOCHS // 2, learning_rate=1e-3, **how)
    diffbio.fit(chain, table, seed=seed, stages=[rest], progress=False)
    return chain


def start_from_labels(chain: Any, data: dict[str, Any], labelled: np.ndarray) -> None:
    """Each centroid at the mean of its labelled cells, in both arms."""
    latent = embedded(chain, data, labelled)
    types = data["types"][labelled]
    means = np.stack([latent[types == t].mean(axis=0) for t in range(data["types"].max() + 1)])
    chain["types"].centroids[...] = jnp.asarray(means)
    chain["types"].mark_fitted()


def embedded(chain: Any, data: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """Latent positions."""
    table = {"counts": data["counts"][rows], "batch_labels": data["batch_labels"][rows]}
    return np.asarray(chain["vae"].apply(table)[0]["latent_mean"])


def accuracy(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean recall of the types."""
    return float(np.mean([(found[truth == t] == t).mean() for t in np.unique(truth)]))


def baselines(data: dict[str, Any], seen: np.ndarray, labelled: np.ndarray, unseen: np.ndarray) -> list[float]:
    """PCA of the normalised training cells, then neighbours or a logistic regression of the labelled ones."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    counts = data["counts"]
    scaled = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    pca = PCA(30, random_state=0).fit(scaled[seen])
    points = pca.transform(scaled)
    found = []
    for model in (KNeighborsClassifier(3), LogisticRegression(max_iter=2000)):
        fitted = model.fit(points[labelled], data["types"][labelled])
        found.append(accuracy(data["types"][unseen], fitted.predict(points[unseen])))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--files", nargs="+", default=FILES)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"balanced accuracy on unseen cells, {PER_TYPE} labels per type; mean (lowest to highest) over seeds")
    columns = ("PCA + kNN", "PCA + logistic", "frozen", "joint", "joint - frozen, paired")
    print(f"{'data':<28}" + "".join(f" {column:>22}" for column in columns))
    for name in asked.files:
        data = load(name)
        rows = []
        for seed in range(asked.seeds):
            seen, labelled, unseen = divided(data, seed)
            row = baselines(data, seen, labelled, unseen)
            for arm in ("frozen", "joint"):
                start = time.process_time()
                chain = trained(data, seen, labelled, seed, arm)
                groups = chain["types"].apply({"embeddings": jnp.asarray(embedded(chain, data, unseen))})[0]
                row.append(accuracy(data["types"][unseen], np.asarray(groups["cluster_assignments"]).argmax(axis=1)))
                seconds = time.process_time() - start
                print(f"  {name} seed {seed} {arm}: {row[-1]:.3f}, {seconds:.0f} CPU-s", file=sys.stderr)
            rows.append(row)
        found = np.array(rows)
        gain = found[:, 3] - found[:, 2]
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
        cells = [f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})" for v in found.T]
        told = "".join(f" {c:>22}" for c in cells) + f" {gain.mean():>+12.3f} +- {error:.3f}"
        print(f"{name.removesuffix('.h5ad'):<28}{told}")


if __name__ == "__main__":
    main()
