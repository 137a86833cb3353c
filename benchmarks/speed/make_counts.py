"""Negative-binomial counts for the speed and memory benchmarks; needs numpy only.

    python -m benchmarks.speed.make_counts --out benchmarks/cache/speed/counts_20000x2000.npz

Cells of 12 types in 3 batches of unequal size, with type, batch, type-in-batch and continuous
programmes on top of a wide spread of gene means, and a dispersion of its own for every gene.
With the default depth about one entry in ten is not zero. Equal arguments give equal counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 1000


@dataclass(frozen=True)
class Model:
    """Parameters of the simulated experiment, drawn once."""

    log_mean: np.ndarray  # batch x type x gene
    programmes: np.ndarray  # programme x gene
    theta: np.ndarray  # gene
    type_share: np.ndarray  # batch x type
    batch_share: np.ndarray  # batch


@dataclass(frozen=True)
class Counts:
    """A CSR matrix in three arrays, with batch, type and a fixed split of the cells."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]
    batch: np.ndarray
    cell_type: np.ndarray
    train: np.ndarray
    held_out: np.ndarray

    @property
    def density(self) -> float:
        """Share of entries that are not zero."""
        return len(self.data) / (self.shape[0] * self.shape[1])


def make_model(n_genes: int, n_batches: int, n_types: int, rng: np.random.Generator) -> Model:
    """Draw the parameters that all cells share."""
    base = rng.normal(0.0, 2.3, n_genes)
    lineage = rng.normal(0.0, 0.5, (4, n_genes)) * (rng.random((4, n_genes)) < 0.35)
    by_type = rng.normal(0.0, 0.65, (n_types, n_genes)) * (rng.random((n_types, n_genes)) < 0.15)
    by_batch = rng.normal(0.0, 0.35, (n_batches, 1, n_genes))
    by_both = rng.normal(0.0, 0.10, (n_batches, n_types, n_genes))
    share = 0.8 ** np.arange(n_types)
    batch_share = 0.6 ** np.arange(n_batches)
    return Model(
        log_mean=base + lineage[np.arange(n_types) % 4] + by_type + by_batch + by_both,
        programmes=rng.normal(0.0, 0.25, (6, n_genes)) * (rng.random((6, n_genes)) < 0.2),
        theta=np.exp(rng.normal(0.7, 0.8, n_genes)),
        type_share=rng.dirichlet(30.0 * share / share.sum(), n_batches),
        batch_share=batch_share / batch_share.sum(),
    )


def draw_block(
    model: Model, n_cells: int, depth: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the dense counts, batches and types of some cells."""
    n_batches, n_types, _ = model.log_mean.shape
    batch = rng.choice(n_batches, n_cells, p=model.batch_share)
    cumulated = model.type_share.cumsum(axis=1)[batch]
    cell_type = (rng.random((n_cells, 1)) > cumulated).sum(axis=1).clip(max=n_types - 1)
    activity = rng.normal(0.0, 1.0, (n_cells, len(model.programmes)))
    rate = np.exp(model.log_mean[batch, cell_type] + activity @ model.programmes)
    library = depth * np.exp(rng.normal(0.0, 0.45, n_cells))
    mean = rate / rate.sum(axis=1, keepdims=True) * library[:, None]
    counts = rng.poisson(rng.gamma(model.theta, mean / model.theta))
    empty = np.flatnonzero(counts.sum(axis=1) == 0)
    counts[empty, mean[empty].argmax(axis=1)] = 1  # no cell is left without a count
    return counts.astype(np.int32), batch.astype(np.int32), cell_type.astype(np.int32)


def blocks(
    n_cells: int, n_genes: int, *, n_batches: int, n_types: int, depth: float, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield dense counts, batches and types, 1000 cells at a time, in bounded memory."""
    model_rng, cell_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    model = make_model(n_genes, n_batches, n_types, model_rng)
    for start in range(0, n_cells, BLOCK):
        yield draw_block(model, min(BLOCK, n_cells - start), depth, cell_rng)


def make_counts(
    n_cells: int = 20_000,
    n_genes: int = 2_000,
    *,
    n_batches: int = 3,
    n_types: int = 12,
    depth: float = 530.0,
    held_out: float = 0.1,
    seed: int = 0,
) -> Counts:
    """Return counts with batches, types and the split into training and held-out cells."""
    values, columns, lengths, batches, types = [], [], [], [], []
    for counts, batch, cell_type in blocks(
        n_cells, n_genes, n_batches=n_batches, n_types=n_types, depth=depth, seed=seed
    ):
        rows, cols = np.nonzero(counts)
        values.append(counts[rows, cols].astype(np.float32))
        columns.append(cols.astype(np.int32))
        lengths.append(np.bincount(rows, minlength=len(counts)))
        batches.append(batch)
        types.append(cell_type)
    order = np.random.default_rng([seed, 2]).permutation(n_cells)
    n_held_out = round(held_out * n_cells)
    return Counts(
        data=np.concatenate(values),
        indices=np.concatenate(columns),
        indptr=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        shape=(n_cells, n_genes),
        batch=np.concatenate(batches),
        cell_type=np.concatenate(types),
        train=np.sort(order[n_held_out:]),
        held_out=np.sort(order[:n_held_out]),
    )


def save_counts(counts: Counts, path: Path) -> None:
    """Write the counts as one uncompressed npz file under the field names of `Counts`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **(vars(counts) | {"shape": np.asarray(counts.shape)}))
    temporary.replace(path)


def load_counts(path: Path) -> Counts:
    """Read a file of `save_counts`."""
    with np.load(path) as file:
        fields = {key: file[key] for key in file.files}
    fields["shape"] = tuple(int(size) for size in fields["shape"])
    return Counts(**fields)


def main() -> None:
    """Write one file and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--depth", type=float, default=530.0, help="median counts of a cell")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = make_counts(args.cells, args.genes, n_batches=args.batches, depth=args.depth, seed=args.seed)
    save_counts(counts, args.out)
    total = float(counts.data.sum())
    summary = {
        "file": str(args.out),
        "shape": counts.shape,
        "density": round(counts.density, 4),
        "counts_per_cell": round(total / counts.shape[0], 1),
        "cells_per_batch": np.bincount(counts.batch).tolist(),
        "held_out": len(counts.held_out),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
