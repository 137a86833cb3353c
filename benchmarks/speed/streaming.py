"""Training SCVI from disk beside training it from memory: speed and peak memory, in one table.

    python -m benchmarks.speed.streaming [--cells 1000000] [--steps 1200] [--likelihood zinb] [--batch-size 128]

The file is a generated .h5ad (gzip, 10 % not zero, 2,000 genes), made chunk by chunk by `stream_counts` and kept in
benchmarks/cache/memory (1,000,000 cells: 0.5 GB, three minutes). Both sides train SCVI, in a process of its own, by
`diffbio.models.SCVI.train` on a backed AnnData and on the first cells of the same file in memory; the steps after the
first 200 (which compile, and meet a cold page cache) are timed. The sides alternate --repeats times; the median counts.
Bars: peak resident memory at most 3 GB, speed at least 80 % of that from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.speed.memory import CACHE, data_file

REPO = Path(__file__).resolve().parents[2]
RESULT = REPO / "benchmarks" / "results" / "streaming.json"
MOST_BYTES, LEAST_SHARE = 3e9, 0.8
BYTES_PER_CELL = 600  # of the file
IN_MEMORY_CELLS = 50_000
WARM_UP = 200  # steps


class Enough(Exception):
    """The steps are done."""


def side(given: argparse.Namespace) -> dict[str, Any]:
    """Trains for some steps; cells per second and peak memory of this process."""
    import resource
    import time

    import anndata

    from diffbio import train
    from diffbio.models import SCVI

    path = data_file(given.cells, given.genes)
    adata = anndata.read_h5ad(path, backed="r")
    if given.side == "memory":
        adata = adata[:IN_MEMORY_CELLS].to_memory()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, gene_likelihood=given.likelihood)
    stamps: list[tuple[float, float]] = []

    def step(shown: Any, *_: Any) -> None:
        stamps.append((time.perf_counter(), time.process_time()))
        if len(stamps) > given.steps:
            raise Enough

    train.Progress.step = step  # type: ignore[method-assign]
    begun = time.perf_counter()
    with contextlib.suppress(Enough):
        model.train(max_epochs=1000, batch_size=given.batch_size, early_stopping=False, train_size=0.99, progress=False)
    warm_up = min(WARM_UP, given.steps // 2)
    wall, cpu = np.subtract(stamps[-1], stamps[warm_up])
    cells = (len(stamps) - 1 - warm_up) * given.batch_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "cells": adata.n_obs, "cells_per_second": cells / wall, "cells_per_cpu_second": cells / cpu, "peak": peak,
        "seconds_to_first_step": stamps[0][0] - begun,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=1_200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--likelihood", choices=("zinb", "nb", "poisson"), default="zinb")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=("disk", "memory"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(side(given)))
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(CACHE).free < 2 * BYTES_PER_CELL * given.cells:
        sys.exit(f"{CACHE} has no room for a file of {BYTES_PER_CELL * given.cells / 1e9:.1f} GB")
    data_file(given.cells, given.genes)
    runs: dict[str, list[dict[str, Any]]] = {"disk": [], "memory": []}
    for _ in range(given.repeats):
        for name in runs:
            command = [sys.executable, "-m", "benchmarks.speed.streaming", *sys.argv[1:], "--side", name]
            done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))

    def median(name: str, what: str) -> float:
        return float(np.median([run[what] for run in runs[name]]))

    speed = [median(name, "cells_per_second") for name in runs]
    cpu = [median(name, "cells_per_cpu_second") for name in runs]
    peak = [max(run["peak"] for run in runs[name]) for name in runs]
    print(f"SCVI, {given.likelihood}, batches of {given.batch_size}, {given.cells:,} x {given.genes:,} on disk, "
          f"{runs['memory'][0]['cells']:,} of them in memory")
    print(f"{'':34}{'from disk':>12}{'from memory':>13}{'bar':>12}")
    print(f"{'cells per second':34}{speed[0]:12,.0f}{speed[1]:13,.0f}")
    print(f"{'the same, share of from memory':34}{speed[0] / speed[1]:12.0%}{'':13}{LEAST_SHARE:12.0%}")
    print(f"{'cells per CPU-second':34}{cpu[0]:12,.0f}{cpu[1]:13,.0f}")
    print(f"{'peak resident memory, GB':34}{peak[0] / 1e9:12.2f}{peak[1] / 1e9:13.2f}{MOST_BYTES / 1e9:12.0f}")
    print(f"{'seconds to the first step':34}{median('disk', 'seconds_to_first_step'):12.1f}"
          f"{median('memory', 'seconds_to_first_step'):13.1f}")
    RESULT.write_text(json.dumps({"arguments": vars(given), "runs": runs}, indent=1) + "\n")
    sys.exit(not (peak[0] <= MOST_BYTES and speed[0] >= LEAST_SHARE * speed[1]))


if __name__ == "__main__":
    main()
