"""Gradient report of the chain of `joint_integration`, as the joint phase begins, by cells in a minibatch.

    uv run python -m benchmarks.quality.joint_integration_gradients

Signal to noise and agreement say how alike the gradients of different minibatches are. Minibatches of 512 of some 700
cells share many of them, which makes them more alike than new cells would.
"""

from __future__ import annotations

import argparse
import warnings

from benchmarks.quality import joint_integration as row

import diffbio

COLUMNS = ("out", "into", "gain", "condition", "signal_to_noise", "agreement")
SIZES = (128, 256, 512)


def main() -> None:
    """Prints a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["kang_pbmc_ifnb", "pbmc_three_chemistries"], choices=row.DATA)
    parser.add_argument("--seed", type=int, default=100)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in asked.data:
        data = row.load(name)
        seen, _ = row.halves(data, asked.seed)
        cells = row.table_of(data, seen)
        chain = row.started(data, seen, asked.seed)
        chain["groups"].init_from({"embeddings": chain.apply(cells)[0]["blended_embeddings"]})
        print(f"\n{name}\n| cells | part | {' | '.join(COLUMNS)} | verdict |\n{'|---' * (len(COLUMNS) + 3)}|")
        for size in SIZES:
            for part, found in diffbio.gradients(chain, cells, batch_size=size, n_batches=8).iterrows():
                numbers = " | ".join(f"{found[column]:.2f}" for column in COLUMNS)
                print(f"| {size} | {part} | {numbers} | {found['verdict']} |", flush=True)


if __name__ == "__main__":
    main()
