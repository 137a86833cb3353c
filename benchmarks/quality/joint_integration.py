"""Normaliser, batch correction and clustering trained together: clustering and integration total on unseen cells.

    uv run python -m benchmarks.quality.trained_as_one --rows integration

Counts -> VAE normaliser -> Harmony -> strength of the correction, a number for each batch -> soft k-means. Half of
every batch is seen in training; the other half goes through the trained chain (encoder, the stored correction, the
centroids) and is scored with scib-metrics: 0.6 bio + 0.4 batch, exactly as in `score_integration.py`, in the
environment `scib` that `benchmarks/peers/make_env.sh` makes. Both arms start from one VAE (STEPS steps of its own
objective), a fresh Harmony and k-means on it, and have the same parameters, minibatches and STEPS further steps:

- stage-wise: the VAE goes on by its own objective, then the strength learns by its own (batches mixed among a cell's
  neighbours) and the centroids by theirs, each on what the parts before give;
- joint: the VAE's objective and two losses at the end reach all of them: `BatchMixingLoss` on the corrected cells, and
  `neighbourhoods`, how far a cell is from the nearest cells of every batch.

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

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.quality.integration import environment, run_module
from benchmarks.quality.integration_data import CACHE, DATASETS, REPO, IntegrationData, halves, load
from flax import nnx

TITLE = "clustering and integration"
MEASURE = "total of scib-metrics (0.6 bio + 0.4 batch) on unseen cells"
DATA = DATASETS
PEERS = {"scvi": "scVI + Leiden", "harmonypy": "harmonypy + Leiden"}
ENVIRONMENTS = {"scvi": "scvi", "harmonypy": "scib"}
ARMS = (*PEERS.values(), "stage-wise", "joint")
BEAT = (*PEERS.values(), "stage-wise")

LATENT, HIDDEN, BATCH, RATE = 10, 128, 256, 1e-3
STEPS = 300  # of either phase
MIXING, CLOSE, TIGHT = 1000.0, 300.0, 10.0  # weights beside the VAE's objective, of hundreds of nats a cell
NEAREST, WIDTH = 3, 0.03  # of `neighbourhoods`: cells of every batch; share of the mean squared distance


def neighbourhoods(n_batches: int) -> Any:
    """The loss of continuous clusters (Shah and Koltun 2018) on neighbours that are balanced over batches.

    d / (d + w) of the squared distance d to the nearest cells of every batch (Polanski et al. 2020), mean: a robust
    penalty, which draws near cells together and lets go of far ones; w is a share of the mean squared distance, so
    that a smaller embedding gains nothing.
    """
    from diffbio.math.distances import squared_euclidean

    def loss(cells: Any, labels: Any) -> Any:
        n_cells = len(cells)
        distance = squared_euclidean(cells, cells)
        width = WIDTH * distance.sum() / (n_cells * (n_cells - 1))
        others = jnp.where(jnp.eye(n_cells, dtype=bool), jnp.inf, distance)
        terms = []
        for batch in range(n_batches):
            near = -jax.lax.top_k(-jnp.where(labels == batch, others, jnp.inf), NEAREST)[0]
            there = jnp.isfinite(near)
            near = jnp.where(there, near, 0)
            terms.append(jnp.where(there, near / (near + width), 1).mean())
        return jnp.stack(terms).mean()

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
            Own("vae"), Own("strength"), Own("groups", weight=TIGHT),
            Term("mixing", BatchMixingLoss(n_batches=n_batches, n_neighbors=5), reads=final, weight=MIXING),
            Term("close", neighbourhoods(n_batches), reads=final, weight=CLOSE),
        ],
    )  # fmt: skip


def table_of(data: IntegrationData, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the chain reads of these cells."""
    return {"counts": data.counts[rows].toarray(), "batch_labels": data.batch[rows].astype(np.int32)}


def started(data: IntegrationData, seen: np.ndarray, seed: int) -> Any:
    """The chain after the phase that both arms share: the VAE by its own objective, k-means on what it gives."""
    import diffbio
    from diffbio.pipelines import Stage

    chain = chain_of(data, len(seen), seed)
    first = Stage(parts="vae", **how(len(seen)))
    diffbio.fit(chain, table_of(data, seen), seed=seed, stages=[first], progress=False)
    return chain


def how(n_cells: int) -> dict[str, Any]:
    """Settings of every stage: so many epochs that it takes STEPS steps."""
    epochs = round(STEPS / max(1, n_cells // BATCH))
    return {"max_epochs": epochs, "batch_size": BATCH, "learning_rate": RATE, "validation": 0.0}


def trained(chain: Any, data: IntegrationData, seen: np.ndarray, seed: int, arm: str) -> Any:
    """A copy of the started chain, after one arm's training."""
    import diffbio
    from diffbio.pipelines import Stage

    chain, settings = nnx.clone(chain), how(len(seen))
    if arm == "joint":  # Harmony is learned anew after either half, and k-means starts in the second
        half = {**settings, "max_epochs": -(-settings["max_epochs"] // 2)}
        stages = [
            Stage(parts=("vae", "strength"), terms=("vae", "mixing", "close"), **half),
            Stage(terms=("vae", "mixing", "close", "groups"), **half),
        ]
    else:
        stages = [Stage(parts="vae", terms=("vae",), **settings)]
        stages += [Stage(parts=part, **settings) for part in ("strength", "groups")]
    warm = {"vae.kl_weight": lambda epoch: 1.0 + 0 * epoch}  # the warm-up is over after the first phase
    diffbio.fit(chain, table_of(data, seen), seed=seed, stages=stages, schedules=warm, progress=False)
    return chain


def measured(name: str, seed: int) -> dict[str, float]:
    """Totals of the arms, those with Leiden's best clusters, CPU seconds, and the strengths that were learned."""
    data = load(name)
    seen, unseen = halves(data, seed)
    files = {title: peer_file(peer, name, seed) for peer, title in PEERS.items()}
    scores: dict[str, float] = {}
    start = time.process_time()
    shared = started(data, seen, seed)
    first = time.process_time() - start
    for arm in ("stage-wise", "joint"):
        start = time.process_time()
        chain = trained(shared, data, seen, seed, arm)
        scores[f"cpu_{arm}"] = first + time.process_time() - start
        found = chain.apply(table_of(data, unseen))[0]
        files[arm] = CACHE / "halves" / f"{name}__{arm}__{seed}.npz"
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
        scores |= {f"{key} {arm}": of_arm[key] for key in ("bio", "batch")}
    return scores


def peer_file(peer: str, name: str, seed: int) -> Path:
    """Where a peer's positions of the unseen cells lie; made if they are not there."""
    path = CACHE / "halves" / f"{name}__{peer}__{seed}.npz"
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
