"""Annotation of 100,000 cells by a saved model beside CellTypist's, both sides in one go; a process for each.

    uv run python -m benchmarks.speed.annotate [--cells 100000] [--genes 5000] [--repeats 3]

Generated counts, a tenth of them not zero, in a .h5ad on disk; both sides learn from its first 3,000 cells (not
timed). Ours: `diffbio annotate FILE --model DIR`, which reads, checks, annotates and writes a new .h5ad. CellTypist
(`bash benchmarks/peers/make_celltypist_env.sh`): reads the file, `normalize_total`, `log1p`, `celltypist.annotate`;
it writes nothing. One thread each. "annotate": from counts in memory to types and probabilities; of ours with the
checks of the counts, of CellTypist `annotate` alone, on data normalised before ("+ normalise" with that). "process":
all of it from start to end. CPU-seconds, best of the repeats, and peak resident memory of the process.

Bar: faster than CellTypist's `annotate`, and at most 2 GB.
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

HERE = Path(__file__).parents[1]
CACHE, RESULT = HERE / "cache" / "annotate", HERE / "results" / "annotate_speed.json"
PEER_PYTHON = HERE / "envs" / "celltypist" / "bin" / "python"
N_TRAIN = 3000
MOST_BYTES = 2e9
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}  # fmt: skip

# in children, which report their own peaks
COMMAND = """
import json, resource, sys
from diffbio.cli import run_command
code = run_command(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "rss": used.ru_maxrss * 1024, "cpu_s": used.ru_utime + used.ru_stime}))
"""
IN_MEMORY = """
import json, sys, time, warnings
import diffbio
warnings.filterwarnings("ignore")
adata = diffbio.read(sys.argv[1])
adata.obs = adata.obs[["batch"]]
start = time.process_time()
diffbio.tl.annotate(adata, model=sys.argv[2])
print(json.dumps({"annotate_s": time.process_time() - start}))
"""


def made(n_cells: int, n_genes: int) -> tuple[Path, Path, Path]:
    """The cells, those to learn from, and our model."""
    import anndata

    import diffbio
    from diffbio.data.datasets import stream_counts

    CACHE.mkdir(parents=True, exist_ok=True)
    cells = CACHE / f"counts_{n_cells}x{n_genes}.h5ad"
    known, model = cells.with_name(f"{cells.stem}_known.h5ad"), cells.with_suffix("")
    if not cells.exists():
        stream_counts(cells.with_suffix(".part"), n_cells, n_genes, n_types=8, n_batches=2).rename(cells)
    if not known.exists():
        anndata.read_h5ad(cells, backed="r")[:N_TRAIN].to_memory().write_h5ad(known)
    if not model.exists():
        some = anndata.read_h5ad(known)
        diffbio.tl.annotate(some, reference=some.copy(), labels_key="cell_type").save(model)
    return cells, known, model


def run(command: list[str]) -> dict[str, float]:
    """The last line of a child, as JSON."""
    start = time.perf_counter()
    child = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=HERE.parent, env={**os.environ, **ONE_THREAD}
    )
    return {**json.loads(child.stdout.splitlines()[-1]), "wall_s": time.perf_counter() - start}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cells, known, model = made(args.cells, args.genes)
    rows: dict[str, list[dict[str, float]]] = {"command": [], "in memory": [], "celltypist": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            written = ["-o", f"{folder}/out.h5ad", "--model", str(model), "--stream", "--quiet"]
            rows["command"].append(run([sys.executable, "-c", COMMAND, "annotate", str(cells), *written]))
        rows["in memory"].append(run([sys.executable, "-c", IN_MEMORY, str(cells), str(model)]))
        rows["celltypist"].append(
            run([str(PEER_PYTHON), "-m", "benchmarks.speed.annotate_celltypist_side", str(known), str(cells)])
        )
    best = {name: {k: min(row[k] for row in found) for k in found[0]} for name, found in rows.items()}
    ours, memory, peer = best["command"], best["in memory"], best["celltypist"]
    RESULT.write_text(json.dumps({"cells": args.cells, "genes": args.genes, **best}, indent=1) + "\n")
    print(f"{args.cells:,} cells x {args.genes:,} genes  | ours   | CellTypist | bar")
    faster = "met" if memory["annotate_s"] < peer["annotate_s"] else "NOT met"
    mine, theirs = memory["annotate_s"], peer["annotate_s"]
    print(f"annotate, CPU-s               | {mine:6.1f} | {theirs:6.1f}     | less: {faster}")
    print(f"  + normalise, CPU-s          | {mine:6.1f} | {theirs + peer['normalise_s']:6.1f}     |")
    print(f"process, CPU-s                | {ours['cpu_s']:6.1f} | {peer['cpu_s']:6.1f}     |")
    small = "met" if ours["rss"] <= MOST_BYTES else "NOT met"
    print(f"peak memory, GB               | {ours['rss'] / 1e9:6.2f} | {peer['rss'] / 1e9:6.2f}     | 2: {small}")
    print(f"accuracy                      |        | {peer['accuracy']:6.3f}     |")


if __name__ == "__main__":
    main()
