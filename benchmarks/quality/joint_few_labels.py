"""Five labels per type train ambient removal and normaliser before the classifier, on cells that training did not see.

    uv run python -m benchmarks.quality.trained_as_one --rows few_labels

Counts -> ambient removal -> VAE normaliser -> soft k-means with a centroid per type, whose memberships are the types.
A quarter of the cells is unseen. Ambient removal and normaliser learn alone, from the counts of the other cells, for
FIRST epochs each. Which cells are labelled is then drawn DRAWS times, and a seed's score is the mean over its draws.
With each draw, for SECOND epochs, two arms go on from there with the same losses on the types: cross entropy of the
labelled cells, and a mixture prior of the latent space with one Gaussian per type (VaDE, Jiang et al. 2017; a labelled
cell belongs to its own). "frozen": the losses train the centroids. "joint": they train all three parts, beside the
objectives of the first two. "frozen, means" are the centroids at the mean of their labelled cells, where both arms
start. "PCA + kNN" and "PCA + logistic" see the same labels in 30 principal components of the seen cells.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.quality.integration_data import data_dir
from flax import nnx

TITLE = "few labels"
MEASURE = "accuracy on unseen cells, 5 labels per type"
DATA = ("pbmc_three_chemistries", "pbmc3k")
ARMS = ("PCA + kNN", "PCA + logistic", "frozen, means", "frozen", "joint")
BEAT = ("frozen", "frozen, means")

PER_TYPE, DRAWS, SEEN, N_GENES, LATENT = 5, 2, 0.75, 1000, 20
FIRST, SECOND = 40, 40  # epochs
VARIANCE = 0.25  # of the Gaussian of a type, where the standard normal has 1
LABEL_WEIGHT = 50.0  # of the cross entropy beside objectives of hundreds of nats a cell
RATES = {"frozen": 3e-3, "joint": 3e-4}
HOW: dict[str, Any] = {"batch_size": 128, "validation": 0.0}


def load(name: str) -> dict[str, Any]:
    """Counts of variable genes, types and batches as numbers."""
    import anndata
    import pandas as pd

    from diffbio.data.genes import highly_variable_genes

    adata = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    batches = pd.Categorical(adata.obs["batch"]).codes.astype(int)
    top = highly_variable_genes(adata.X, n_top_genes=N_GENES, batch_labels=batches)["highly_variable"].to_numpy()
    counts = np.asarray(adata.to_df().to_numpy()[:, top], np.float32)
    kept = counts.sum(axis=1) > 0
    types = pd.Categorical(adata.obs["cell_type"]).codes.astype(int)[kept]
    return {"counts": counts[kept], "types": types, "batch_labels": batches[kept]}


def divided(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of seen and of unseen cells."""
    order = np.random.default_rng(seed).permutation(n_cells)
    seen, unseen = np.split(order, [int(SEEN * n_cells)])
    return seen, unseen


def drawn(types: np.ndarray, seen: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """Rows of labelled cells among the seen ones; of a type with fewer cells, all."""
    order = np.random.default_rng([seed, draw]).permutation(seen)
    return np.concatenate([order[types[order] == t][:PER_TYPE] for t in np.unique(types)])


def cross_entropy(memberships: Any, label: Any) -> Any:
    """Of the labelled cells; label: number of the type, -1 where it is not known."""
    known = label >= 0
    return -(jnp.log(jnp.maximum(of_label(memberships, label), 1e-6)) * known).sum() / jnp.maximum(known.sum(), 1)


def mixture_prior(z: Any, centroids: Any, label: Any) -> Any:
    """What a mixture of a Gaussian per type, in place of the standard normal, adds to the negative evidence bound."""
    width = z.shape[1]
    apart = ((z[:, None] - centroids) ** 2).sum(axis=-1) / VARIANCE + width * np.log(VARIANCE)
    log_mixture = jax.nn.logsumexp(-apart / 2, axis=1) - np.log(len(centroids))
    log_prior = jnp.where(label >= 0, -of_label(apart, label) / 2, log_mixture)
    return (-(z**2).sum(axis=1) / 2 - log_prior).mean()


def of_label(values: Any, label: Any) -> Any:
    """A row's value at its label."""
    return jnp.take_along_axis(values, jnp.maximum(label, 0).astype(int)[:, None], axis=1)[:, 0]


def chain_of(data: dict[str, Any], seed: int) -> Any:
    """Ambient removal, normaliser and classifier."""
    from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
    from diffbio.operators.singlecell import (
        AmbientRemovalConfig,
        DifferentiableAmbientRemoval,
        SoftClusteringConfig,
        SoftKMeansClustering,
    )
    from diffbio.pipelines import Chain, Own, Part, Term

    rngs, n_genes = nnx.Rngs(seed), data["counts"].shape[1]
    n_types, n_batches = int(data["types"].max()) + 1, int(data["batch_labels"].max()) + 1
    ambient = AmbientRemovalConfig(n_genes=n_genes, ambient_prior=0.03, hidden_dims=(64,))
    vae = VAENormalizerConfig(n_genes=n_genes, latent_dim=LATENT, hidden_dims=(128,), n_batches=n_batches)
    groups = SoftClusteringConfig(n_clusters=n_types, n_features=LATENT, temperature=2.0)
    return Chain(
        [
            Part(DifferentiableAmbientRemoval(ambient, rngs=rngs), "ambient"),
            Part(VAENormalizer(vae, rngs=rngs), "vae", reads={"counts": "decontaminated_counts"}),
            Part(SoftKMeansClustering(groups, rngs=rngs), "types", reads={"embeddings": "latent_z"}),
        ],
        terms=[
            Own("ambient"),
            Own("vae", local=True),
            Term("labels", cross_entropy, reads=("cluster_assignments", "label"), weight=LABEL_WEIGHT),
            Term("prior", mixture_prior, reads=("latent_z", "centroids", "label")),
        ],
    )


def table_of(data: dict[str, Any], rows: np.ndarray, labelled: np.ndarray, profile: np.ndarray) -> dict[str, Any]:
    """What the chain reads of these cells."""
    label = np.where(np.isin(rows, labelled), data["types"][rows], -1).astype(np.float32)
    table = {"counts": data["counts"][rows], "label": label, "ambient_profile": profile}
    return {**table, "batch_labels": data["batch_labels"][rows]} if data["batch_labels"].max() else table


def first_phase(chain: Any, table: dict[str, Any], seed: int) -> np.ndarray:
    """Ambient removal and normaliser by their own objectives, which see no label; latent means of the cells."""
    import diffbio
    from diffbio.pipelines import Stage

    stages = [Stage(parts=(part,), max_epochs=FIRST, **HOW) for part in ("ambient", "vae")]
    diffbio.fit(chain, table, seed=seed, stages=stages, progress=False)
    chain["types"].mark_fitted()
    return np.asarray(chain.apply(table)[0]["latent_mean"])


def second_phase(chain: Any, table: dict[str, Any], seed: int, arm: str) -> None:
    """The losses on the types train the centroids, or everything."""
    import diffbio
    from diffbio.pipelines import Stage

    terms = ("labels", "prior") if arm == "frozen" else ("ambient", "vae", "labels", "prior")
    parts = ("types",) if arm == "frozen" else ()
    stage = Stage(parts=parts, terms=terms, max_epochs=SECOND, learning_rate=RATES[arm], **HOW)
    over = {f"{part}.kl_weight": lambda _: 1.0 for part in ("ambient", "vae")}  # their warm-up, which every stage has
    diffbio.fit(chain, table, seed=seed, stages=[stage], schedules=over, progress=False)
    chain.eval_mode()


def scores(arm: str, truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Share of right types, and the mean of that share over the types, in which a rare type counts as much."""
    recall = [float((found[truth == t] == t).mean()) for t in np.unique(truth)]
    return {arm: float((found == truth).mean()), f"balanced_{arm}": float(np.mean(recall))}


def baselines(data: dict[str, Any], seen: np.ndarray, labelled: np.ndarray, unseen: np.ndarray) -> dict[str, float]:
    """PCA of the normalised seen cells, then neighbours or a logistic regression of the labelled ones."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    counts, types = data["counts"], data["types"]
    scaled = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    points = PCA(30, random_state=0).fit(scaled[seen]).transform(scaled)
    models = {"PCA + kNN": KNeighborsClassifier(3), "PCA + logistic": LogisticRegression(max_iter=2000)}
    found: dict[str, float] = {}
    for name, model in models.items():
        model.fit(points[labelled], types[labelled])
        found |= scores(name, types[unseen], model.predict(points[unseen]))
    return found


def measured(name: str, seed: int) -> dict[str, float]:
    """Scores of all arms, means over the draws of labelled cells."""
    data = load(name)
    types = data["types"]
    seen, unseen = divided(len(types), seed)
    profile = data["counts"][seen].sum(axis=0)
    profile /= profile.sum()
    new = table_of(data, unseen, unseen[:0], profile)

    def scored(arm: str) -> dict[str, float]:
        return scores(arm, types[unseen], np.asarray(chain.apply(new)[0]["cluster_labels"]))

    chain = chain_of(data, seed)
    start = time.process_time()
    latent = first_phase(chain, table_of(data, seen, seen[:0], profile), seed)
    first = time.process_time() - start
    kept = jax.tree.map(jnp.copy, nnx.state(chain))
    runs = []
    for draw in range(DRAWS):
        labelled = drawn(types, seen, seed, draw)
        table = table_of(data, seen, labelled, profile)
        found = baselines(data, seen, labelled, unseen)
        means = jnp.asarray(np.stack([latent[table["label"] == t].mean(axis=0) for t in np.unique(types)]))
        for arm in ("frozen, means", "frozen", "joint"):
            nnx.update(chain, jax.tree.map(jnp.copy, kept))
            chain["types"].centroids[...] = means
            start = time.process_time()
            if arm != "frozen, means":
                second_phase(chain, table, seed, arm)
                found[f"cpu_{arm}"] = first + time.process_time() - start
            found |= scored(arm)
        runs.append(found)
    return {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
