"""CPU seconds and peak memory of quality control, normalisation and imputation on generated counts of three sizes.

    uv run python -m benchmarks.speed.quality_steps [--cells 10000 50000 200000] [--steps scrublet diffusion ...]

Each step is a process of its own on counts of 2000 genes, 10 % of them non-zero, in memory as CSR; what is measured
is the step without reading the file and without imports, compilation included. What trains does one epoch. Growth is
(seconds at n) / (seconds at the size before) beside the ratio of n log n of the two. At the smallest size scrublet
and MAGIC run in the same go on the same counts, on one thread as ours (`bash benchmarks/peers/make_quality_env.sh`
once). The numbers are kept in benchmarks/results/quality_steps.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.speed.memory import data_file

RESULT = Path(__file__).parents[1] / "results" / "quality_steps.json"
PEER_PYTHON = Path(__file__).parents[1] / "envs" / "quality" / "bin" / "python"
GENES = 2000
MOST_BYTES = 8e9
SLACK = 1.3  # times n log n: the machines are noisy

START = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
"""
END = """
cpu = time.process_time() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"cpu": cpu, "peak": peak}))
"""
OURS = START + """
import diffbio, jax
from diffbio import fit, pp
from diffbio.operators import normalization as N, singlecell as S
from flax import nnx
adata = diffbio.read(sys.argv[1])
adata.var["mitochondrial"] = np.arange(adata.n_vars) < 20
dense = lambda: {"counts": jax.numpy.asarray(adata.X.toarray())}
jax.numpy.zeros(3).sum().block_until_ready()
begun = time.process_time()
STEP
""" + END  # fmt: skip
STEPS = {
    "quality filter": "pp.quality(adata, mitochondrial='mitochondrial', learned=False)",
    "quality filter, learned": "pp.quality(adata, mitochondrial='mitochondrial')",
    "variable genes": "pp.highly_variable(adata, n_top_genes=500)",
    "soft variable genes": """
op = S.SoftHVGSelector(S.SoftHVGConfig(n_genes=2000, n_top_genes=500), rngs=nnx.Rngs(0))
jax.block_until_ready(op.apply(dense(), {}, None)[0]["hvg_weights"])""",
    "shifted log": "pp.normalize(adata)",
    "Pearson residuals": "pp.normalize(adata, method='pearson_residuals')",
    "PCA, exact": """
op = N.DifferentiablePCA(N.PCAConfig(n_components=50), rngs=nnx.Rngs(0))
jax.block_until_ready(op.apply({"features": dense()["counts"]}, {}, None)[0]["pca"])""",
    "PCA, randomized": """
op = N.MatrixFreePCA(N.MatrixFreePCAConfig(n_components=50), rngs=nnx.Rngs(0))
jax.block_until_ready(op.apply({"features": dense()["counts"]}, {}, None)[0]["pca"])""",
    "scrublet": "pp.doublets(adata)",
    "solo": "pp.doublets(adata, method='solo', max_epochs=1)",
    "diffusion": "pp.impute(adata, method='diffusion', t=3)",
    "transformer": "pp.impute(adata, method='transformer', max_epochs=1)",
}
PEERS = {
    "scrublet": START + """
import h5py, scrublet
from scipy import sparse
with h5py.File(sys.argv[1]) as f:
    x = sparse.csr_matrix((f["X/data"][:], f["X/indices"][:], f["X/indptr"][:]), shape=tuple(f["X"].attrs["shape"]))
begun = time.process_time()
scrublet.Scrublet(x.tocsc(), random_state=0).scrub_doublets(verbose=False)
""" + END,
    "diffusion": START + """
import h5py, magic
from scipy import sparse
with h5py.File(sys.argv[1]) as f:
    x = sparse.csr_matrix((f["X/data"][:], f["X/indices"][:], f["X/indptr"][:]), shape=tuple(f["X"].attrs["shape"]))
begun = time.process_time()
totals = np.asarray(x.sum(1)).ravel()
y = sparse.csr_matrix(sparse.diags_array(np.median(totals) / totals) @ x)
y.data = np.sqrt(y.data)
magic.MAGIC(t=3, verbose=0, random_state=0, n_jobs=1).fit_transform(y, genes="all_genes")
""" + END,
}  # fmt: skip
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def measured(python: str | Path, code: str, n_cells: int) -> dict[str, float]:
    """CPU seconds and peak bytes of a child; what it says of an error otherwise."""
    child = subprocess.run(
        [str(python), "-c", code, str(data_file(n_cells, GENES))],
        env={**os.environ, **ONE_THREAD, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        print(child.stderr[-2000:], file=sys.stderr)
        return {"cpu": math.nan, "peak": math.nan}
    found: dict[str, float] = json.loads(child.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    given = parser.parse_args()
    sizes = sorted(given.cells)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    head = f"{'step':<24} {'cells':>8} {'CPU s':>8} {'growth':>7} {'n log n':>8} {'peak GB':>8} {'peer CPU s':>11}"
    print(f"{head}  bars")
    for step in given.steps:
        before = None
        for n in sizes:
            found = measured(sys.executable, OURS.replace("STEP", STEPS[step]), n)
            peer = math.nan
            if n == sizes[0] and step in PEERS and PEER_PYTHON.exists():
                peer = measured(PEER_PYTHON, PEERS[step], n)["cpu"]
            growth = found["cpu"] / before[1] if before else math.nan
            allowed = n * math.log(n) / (before[0] * math.log(before[0])) if before else math.nan
            missed = []
            if before and not growth <= SLACK * allowed:
                missed.append("growth")
            if not found["peak"] <= MOST_BYTES:
                missed.append("memory")
            if found["cpu"] > peer:
                missed.append("slower than the peer")
            print(
                f"{step:<24} {n:>8,} {found['cpu']:>8.2f} {growth:>7.2f} {allowed:>8.2f} {found['peak'] / 1e9:>8.2f} "
                f"{peer:>11.2f}  {'missed: ' + ', '.join(missed) if missed else 'met'}",
                flush=True,
            )
            results.setdefault(step, {})[str(n)] = {**found, **({} if math.isnan(peer) else {"peer_cpu": peer})}
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
            before = (n, found["cpu"])


if __name__ == "__main__":
    main()
