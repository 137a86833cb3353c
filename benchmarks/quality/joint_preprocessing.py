"""Preprocessing that adapts to damaged, shallow cells."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.quality.damaged_cells import DROPLET, Cells, Damaged, damaged
from flax import nnx

N_GENES, TOP = 2000, 1000
WIDTHS = (3.0, 10.0, 30.0, 100.0)  # of the classifier's kernel, chosen on the training half in every arm
WIDTH = 30.0  # in training
DOUBT = 0.1  # labels that the loss takes to be noise


def votes(at: Any, to: Any, weight: Any, label: Any, width: Any, n_types: int, *, leave_one_out: bool) -> Any:
    """Probabilities (cells, types) of a kernel classifier: weighted share of each type's reference cells nearby."""
    d = (at**2).sum(axis=1)[:, None] + (to**2).sum(axis=1) - 2 * at @ to.T
    kernel = -width * d / d.mean()
    own = jnp.eye(*d.shape, dtype=bool) if leave_one_out else jnp.zeros(d.shape, bool)
    kernel = jnp.where(own, -jnp.inf, kernel)
    kernel = jnp.exp(kernel - jax.lax.stop_gradient(kernel.max(axis=1, keepdims=True)))
    types = jax.nn.one_hot(label, n_types)
    there = weight @ types - own.any(axis=1)[:, None] * (weight[:, None] * types if leave_one_out else 0.0)
    found = kernel @ (weight[:, None] * types) / jnp.maximum(there, 1e-3)
    return found / jnp.maximum(found.sum(axis=1, keepdims=True), 1e-20)


def loss_of(probabilities: Any, label: Any) -> Any:
    """Cross entropy, mean of the types' means; a share of the labels may be wrong."""
    n_types = probabilities.shape[1]
    chosen = jnp.take_along_axis(probabilities, label[:, None], axis=1)[:, 0]
    lost = -jnp.log((1 - DOUBT) * chosen + DOUBT / n_types)
    types = jax.nn.one_hot(label, n_types)
    number = types.sum(axis=0)
    return ((lost @ types) / jnp.maximum(number, 1)).sum() / (number > 0).sum()


def prepared(cells: Cells) -> dict[str, np.ndarray]:
    """What the chain reads; the graph of the cells is made once, by MAGIC's components of the counts."""
    imputer = imputer_of(0)
    embeddings = imputer.embedded_on_host(cells.counts)
    graph = {"embeddings": embeddings, "neighbor_indices": imputer.neighbors_on_host(embeddings)}
    return {"counts": cells.counts, **cells.totals, **graph, "label": cells.types.astype(np.float32)}


def imputer_of(seed: int) -> Any:
    from diffbio.operators.singlecell import DifferentiableDiffusionImputer, DiffusionImputerConfig

    return DifferentiableDiffusionImputer(DiffusionImputerConfig(), rngs=nnx.Rngs(seed))


def chain_of(data: Damaged, seed: int, gates: np.ndarray, *, price: float = 0.0, sigma: float = 0.5) -> Any:
    """Quality filter, imputer, normaliser, gates; the classifier is the loss."""
    from diffbio.operators.normalization import (
        LibrarySizeConfig, LibrarySizeNormalizer, StochasticGateConfig, StochasticGateSelector,
    )
    from diffbio.operators.singlecell import DifferentiableQualityFilter, QualityFilterConfig
    from diffbio.pipelines import Chain, Part, Term, Own

    n_types = int(data.seen.types.max()) + 1
    n_genes = data.seen.counts.shape[1]

    def task(gated: Any, weight: Any, label: Any) -> Any:
        label = label.astype(int)
        return loss_of(votes(gated, gated, weight, label, WIDTH, n_types, leave_one_out=True), label)

    rngs = nnx.Rngs(seed)
    parts = [
        Part(DifferentiableQualityFilter(QualityFilterConfig(), rngs=rngs), "quality"),
        Part(imputer_of(seed), "imputer"),
        Part(LibrarySizeNormalizer(LibrarySizeConfig(learnable=True), rngs=rngs), "normalizer",
             reads={"counts": "imputed_counts"}),
        Part(StochasticGateSelector(StochasticGateConfig(n_genes=n_genes, sigma=sigma), rngs=rngs, init_gate=gates), "gates",
             reads={"features": "normalized"}),
    ]
    terms = [Term("task", task, reads=("gated", "cell_weights", "label"))]
    if price:
        terms.append(Term("price", lambda n: n / n_genes, reads="l0_penalty", weight=price))
    return Chain(parts, terms=terms)


def accuracy(truth, found):
    return float(np.mean([(found[truth == t] == t).mean() for t in np.unique(truth)]))


def score(chain: Any, data: Damaged, seen: dict, unseen: dict) -> float:
    n_types = int(data.seen.types.max()) + 1
    out = chain.apply({k: v for k, v in seen.items() if k != "label"})[0]
    new = chain.apply({k: v for k, v in unseen.items() if k != "label"})[0]
    to, weight, label = out["gated"], out["cell_weights"], jnp.asarray(data.seen.types)
    found = [float(loss_of(votes(to, to, weight, label, w, n_types, leave_one_out=True), label)) for w in WIDTHS]
    width = WIDTHS[int(np.argmin(found))]
    p = np.asarray(votes(new["gated"], to, weight, label, width, n_types, leave_one_out=False)).argmax(axis=1)
    real = data.unseen.state != DROPLET
    intact = data.unseen.state == 0
    return accuracy(data.unseen.types[real], p[real]), accuracy(data.unseen.types[intact], p[intact]), width, min(found)
