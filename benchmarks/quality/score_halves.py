"""Score embeddings of some of the cells with scib-metrics; runs in the ``scib`` environment.

    benchmarks/envs/scib/bin/python -m benchmarks.quality.score_halves SEED FILE [FILE ...]

Prints one JSON dict: file name -> metrics, exactly those of `score_integration.score`, of the rows that a file names.
A file is an .npz with `dataset`, `unseen` (rows), `embedding` (their positions) and perhaps `clusters`; without them
the clusters are Leiden's at resolution 1.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings

import numpy as np
from benchmarks.quality.integration_data import IntegrationData, load
from benchmarks.quality.score_integration import score


def part_of(data: IntegrationData, rows: np.ndarray) -> IntegrationData:
    """These cells alone; types and batches that none of them has leave the numbering."""
    batch_names, batch = np.unique(data.batch_names[data.batch[rows]], return_inverse=True)
    type_names, cell_type = np.unique(data.cell_type_names[data.cell_type[rows]], return_inverse=True)
    return dataclasses.replace(
        data, counts=data.counts[rows], batch=batch, batch_names=batch_names,
        cell_type=cell_type, cell_type_names=type_names,
    )  # fmt: skip


def main() -> None:
    """Scores the files."""
    warnings.filterwarnings("ignore")
    seed, found = int(sys.argv[1]), {}
    for path in sys.argv[2:]:
        with np.load(path) as file:
            some = part_of(load(str(file["dataset"])), file["unseen"])
            clusters = file.get("clusters")
            found[path] = score(some, file["embedding"], clusters, seed)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
