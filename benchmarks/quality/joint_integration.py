"""Normaliser, batch correction and clustering trained together: clustering and integration total on unseen cells.

    uv run python -m benchmarks.quality.trained_as_one --rows integration

Counts -> VAE normaliser -> Harmony -> strength of the correction, a number for each batch -> soft k-means. Half of
every batch is seen in training; the other half goes through the trained chain (encoder, the stored correction, the
centroids) and is scored with scib-metrics: 0.6 bio + 0.4 batch, exactly as in `score_integration.py`, in the
environment `scib` that `benchmarks/peers/make_env.sh` makes. Both halves are seen in turn, and a seed's score is the
mean of the two. Both arms start from one VAE (FIRST steps of its own
objective) and Harmony on it, and have the same parameters, minibatches and SECOND further steps of the VAE:

- stage-wise: the VAE goes on by its own objective, then the strength learns by its own (batches mixed among a cell's
  neighbours) and the centroids by theirs, from k-means on, for SECOND steps each on what the parts before give;
- joint: all four parts learn together from the VAE's and the clusters' own objectives and three losses at the end:
  `BatchMixingLoss` on the corrected cells, the share of their variance that is `within` clusters, and of that the share
  that is `between` batches. k-means starts their centroids first; halfway Harmony is learned anew.

Both know the number of cell types (clusters of k-means); the peers' Leiden clusters (resolution 1) do not. So the
totals with Leiden's clusters at the best of 20 resolutions, of every arm, are stored beside them (`leiden <arm>`).
scVI trains on the seen half with scvi-tools' defaults (400 epochs) and encodes the unseen one; harmonypy cannot place
new cells and runs on the counts of both halves. The 2,000 genes were chosen on all cells, for every arm.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from benchmarks.quality.integration import environment, run_module
from benchmarks.quality.integration_data import DATASETS, REPO, IntegrationData, half_path, halves, load
from flax import nnx

TITLE = "clustering and integration"
MEASURE = "total of scib-metrics (0.6 bio + 0.4 batch) on unseen cells"
DATA = DATASETS
PEERS = {"scvi": "scVI + Leiden", "harmonypy": "harmonypy + Leiden"}
ENVIRONMENTS = {"scvi": "scvi", "harmonypy": "scib"}
ARMS = (*PEERS.values(), "stage-wise", "joint")
BEAT = (*PEERS.values(), "stage-wise")
PARTS = ("nmi", "ari", "asw_label", "clisi", "asw_batch", "ilisi", "graph_connectivity")  # of the total

LATENT, HIDDEN, RATE = 10, 128, 1e-3
FIRST, SECOND = (300, 256), (100, 512)  # steps and cells of a step, of the two phases
MIXING, WITHIN, BETWEEN = 450.0, 150.0, 100.0  # weights beside the VAE's objective, of hundreds of nats a cell


def within(cells: Any, memberships: Any) -> Any:
    """Share of the variance that is within clusters."""
    from diffbio.math.distances import squared_euclidean

    mass = memberships.sum(axis=0)
    means = memberships.T @ cells / jnp.maximum(mass, 1e-6)[:, None]
    left = (memberships * squared_euclidean(cells, means)).sum(axis=1).mean()
    return left / ((cells - cells.mean(axis=0)) ** 2).sum(axis=1).mean()


def between(n_batches: int) -> Any:
    """Share of the variance within clusters that is between batches."""

    def loss(cells: Any, labels: Any, memberships: Any) -> Any:
        mass = memberships.sum(axis=0)
        means = memberships.T @ cells / jnp.maximum(mass, 1e-6)[:, None]
        of = (labels[:, None] == jnp.arange(n_batches))[:, :, None] * memberships[:, None]  # cells, batches, clusters
        per = of.sum(axis=0)
        centre = jnp.einsum("ibk,if->bkf", of, cells) / jnp.maximum(per, 1e-6)[..., None]
        apart = (per * ((centre - means) ** 2).sum(axis=-1)).sum(axis=0)
        whole = (memberships * ((cells[:, None] - means) ** 2).sum(axis=-1)).sum(axis=0)
        return (mass * apart / jnp.maximum(whole, 1e-6)).sum() / mass.sum()

    return loss


def chain_of(data: IntegrationData, n_seen: int, seed: int) -> Any:
    """Normaliser, batch correction and its strength, clustering."""
    from diffbio.losses import BatchMixingLoss
    from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
    from diffbio.operators.singlecell import (
        BatchCorrectionConfig,
        CorrectionStrength,
        CorrectionStrengthConfig,
        DifferentiableHarmony,
        SoftClusteringConfig,
        SoftKMeansClustering,
    )
    from diffbio.pipelines import Chain, Own, Part, Term

    rngs, n_batches = nnx.Rngs(seed), data.n_batches
    vae = VAENormalizerConfig(
        n_genes=data.counts.shape[1], latent_dim=LATENT, hidden_dims=(HIDDEN,), n_batches=n_batches, likelihood="nb"
    )
    harmony = BatchCorrectionConfig(n_clusters=max(1, round(n_seen / 30)), n_features=LATENT, n_batches=n_batches)
    groups = SoftClusteringConfig(n_clusters=data.n_cell_types, n_features=LATENT)
    strength = CorrectionStrength(CorrectionStrengthConfig(n_batches=n_batches), rngs=rngs)
    final = ("blended_embeddings", "batch_labels")
    return Chain(
        [
            Part(VAENormalizer(vae, rngs=rngs), "vae"),
            Part(DifferentiableHarmony(harmony, rngs=rngs), "harmony", reads={"embeddings": "latent_mean"}),
            Part(strength, "strength", reads={"embeddings": "latent_mean"}),
            Part(SoftKMeansClustering(groups, rngs=rngs), "groups", reads={"embeddings": "blended_embeddings"}),
        ],
        terms=[
            Own("vae"), Own("strength"), Own("groups"),
            Term("mixing", BatchMixingLoss(n_batches=n_batches, n_neighbors=5), reads=final, weight=MIXING),
            Term("within", within, reads=("blended_embeddings", "cluster_assignments"), weight=WITHIN),
            Term("between", between(n_batches), reads=(*final, "cluster_assignments"), weight=BETWEEN),
        ],
    )  # fmt: skip


def table_of(data: IntegrationData, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the chain reads of these cells."""
    return {"counts": data.counts[rows].toarray(), "batch_labels": data.batch[rows].astype(np.int32)}


def started(data: IntegrationData, seen: np.ndarray, seed: int) -> Any:
    """The chain after the phase that both arms share: the VAE by its own objective, Harmony on what it gives."""
    import diffbio
    from diffbio.pipelines import Stage

    chain = chain_of(data, len(seen), seed)
    first = Stage(parts="vae", **how(len(seen), *FIRST))
    diffbio.fit(chain, table_of(data, seen), seed=seed, stages=[first], progress=False)
    chain["groups"].fitted = False  # k-means has not run yet: it starts where an arm's cells are by then
    return chain


def how(n_cells: int, steps: int, batch: int) -> dict[str, Any]:
    """Settings of a stage: so many epochs that it takes about so many steps."""
    epochs = max(1, round(steps / max(1, n_cells // batch)))
    return {"max_epochs": epochs, "batch_size": batch, "learning_rate": RATE, "validation": 0.0}


def trained(chain: Any, data: IntegrationData, seen: np.ndarray, seed: int, arm: str) -> Any:
    """A copy of the started chain, after one arm's training."""
    import diffbio
    from diffbio.pipelines import Stage

    chain, settings = nnx.clone(chain), how(len(seen), *SECOND)
    if arm == "joint":  # in two halves, so that Harmony is learned anew between them
        half = {**settings, "max_epochs": -(-settings["max_epochs"] // 2)}
        stages = [Stage(terms=("vae", "groups", "mixing", "within", "between"), **half)] * 2
    else:
        stages = [Stage(parts="vae", terms=("vae",), **settings)]
        stages += [Stage(parts=part, **settings) for part in ("strength", "groups")]
    warm = {"vae.kl_weight": lambda _: 1.0}  # the warm-up is over after the first phase
    diffbio.fit(chain, table_of(data, seen), seed=seed, stages=stages, schedules=warm, progress=False)
    return chain


def measured(name: str, seed: int) -> dict[str, float]:
    """Mean over both turns of `one_turn`; CPU seconds are those of one."""
    turns = [one_turn(name, seed, turn) for turn in (0, 1)]
    return {key: float(np.mean([scores[key] for scores in turns])) for key in turns[0]}


def one_turn(name: str, seed: int, turn: int) -> dict[str, float]:
    """Totals of the arms, those with Leiden's best clusters, CPU seconds, and the strengths that were learned."""
    data = load(name)
    seen, unseen = halves(data, seed, turn)
    files = {title: peer_file(peer, name, seed, turn) for peer, title in PEERS.items()}
    scores: dict[str, float] = {}
    start = time.process_time()
    shared = started(data, seen, seed)
    first = time.process_time() - start
    for arm in ("stage-wise", "joint"):
        start = time.process_time()
        chain = trained(shared, data, seen, seed, arm)
        scores[f"cpu_{arm}"] = first + time.process_time() - start
        found = chain.apply(table_of(data, unseen))[0]
        files[arm] = half_path(name, arm, seed, turn)
        np.savez_compressed(
            files[arm], dataset=name, unseen=unseen, embedding=np.asarray(found["blended_embeddings"]),
            clusters=np.asarray(found["cluster_labels"]),
        )  # fmt: skip
        for batch, strength in zip(data.batch_names, np.asarray(chain["strength"].strength[...]), strict=True):
            scores[f"strength {arm} {batch}"] = float(strength)
    metrics = scored(list(files.values()), seed)
    for arm, path in files.items():
        of_arm = metrics[str(path)]
        scores |= {arm: of_arm["total"], f"leiden {arm}": of_arm["leiden_total"]}
        scores |= {f"{key} {arm}": of_arm[key] for key in (*PARTS, "bio", "batch")}
    return scores


def peer_file(peer: str, name: str, seed: int, turn: int) -> Path:
    """Where a peer's positions of the unseen cells lie; made if they are not there."""
    path = half_path(name, peer, seed, turn)
    if not path.exists():
        chosen = ("--datasets", name, "--seeds", str(seed))
        run_module(ENVIRONMENTS[peer], "benchmarks.peers.run_joint_integration", peer, *chosen)
    return path


def scored(files: list[Path], seed: int) -> dict[str, dict[str, float]]:
    """All metrics of these files, from the scib environment."""
    command = [environment("scib"), "-m", "benchmarks.quality.score_halves", str(seed), *map(str, files)]
    told = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, float]] = json.loads(told.strip().splitlines()[-1])
    return found
