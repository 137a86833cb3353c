"""Peak memory of `diffbio run --stream` on generated files of two sizes, against the bars.

    python -m benchmarks.speed.memory [--cells 50000 200000] [--genes 2000] [--epochs 1]

Each run is a process of its own with all stages that the data allow (three batches, so Harmony runs); peak
resident memory is what the system counted for it. More epochs take longer, not more memory. Generated files
are kept in benchmarks/cache/memory, the numbers in benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffbio.data.datasets import stream_counts

CACHE = Path(__file__).parents[1] / "cache" / "memory"
RESULT = Path(__file__).parents[1] / "results" / "memory.json"
MOST_BYTES = 3e9
MOST_PER_CELL = 1000.0

# run in the child, which reports its own peak: a parent sees the largest of all its children
CHILD = """
import json, resource, sys
from diffbio.cli import run_command
code = run_command(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"code": code, "peak": peak.ru_maxrss * unit, "cpu": peak.ru_utime + peak.ru_stime}))
"""


def data_file(n_cells: int, n_genes: int) -> Path:
    """Generates the counts once, about 10 % of them non-zero."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"counts_{n_cells}x{n_genes}.h5ad"
    if not path.exists():
        scratch = path.with_suffix(".part.h5ad")
        stream_counts(scratch, n_cells, n_genes, n_batches=3)
        scratch.rename(path)
    return path


def measure(n_cells: int, n_genes: int, epochs: int) -> dict[str, float]:
    """Runs the command line on one file; peak bytes, CPU seconds and wall seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "run", str(data_file(n_cells, n_genes)), "-o", str(Path(folder) / "out.h5ad"), "--stream",
            "--batch-key", "batch", "--n-top-genes", "0", "--epochs", str(epochs), "--quiet",
        ]  # fmt: skip
        begun = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *command], stdout=subprocess.PIPE, text=True, check=True,
            env={**os.environ, "MPLBACKEND": "agg"},
        )  # fmt: skip
    found = json.loads(child.stdout.strip().splitlines()[-1])
    if found["code"] != 0:
        sys.exit(f"diffbio run ended with exit code {found['code']}")
    return {**found, "wall": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, nargs=2, default=(50_000, 200_000))
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()
    small, large = sorted(given.cells)
    found = {n: measure(n, given.genes, given.epochs) for n in (small, large)}
    growth = (found[large]["peak"] - found[small]["peak"]) / (large - small)
    print(f"{'cells x genes':>18} {'peak RSS':>10} {'CPU s':>7} {'wall s':>7}")
    for n, f in found.items():
        size = f"{n:,} x {given.genes:,}"
        print(f"{size:>18} {f['peak'] / 1e9:>7.2f} GB {f['cpu']:>7.0f} {f['wall']:>7.0f}")
    peak = found[large]["peak"]
    print(f"peak at {large:,} cells: {peak / 1e9:.2f} GB, bar at most {MOST_BYTES / 1e9:.0f} GB")
    RESULT.write_text(json.dumps({"genes": given.genes, "epochs": given.epochs, "runs": found}, indent=1) + "\n")
    print(f"growth: {growth:.0f} bytes per added cell, bar below {MOST_PER_CELL:.0f}")
    sys.exit(not (peak <= MOST_BYTES and growth < MOST_PER_CELL))


if __name__ == "__main__":
    main()
