"""magic-impute 3.0.0 on files of counts that `benchmarks.quality.imputation` wrote, in its own environment.

    bash benchmarks/peers/make_quality_env.sh
    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 benchmarks/envs/quality/bin/python -m benchmarks.peers.run_magic

`benchmarks.quality.imputation --peer` writes the counts and starts it.

`*.npz` in benchmarks/cache/imputation with `kept` and `held_out` molecules: MAGIC at t = 1, 2, 3, 5 and "auto" on
the square root of library-normalised kept molecules, as its authors advise, one graph each time as its user would.
Losses of the held-out molecules, CPU-seconds of `fit_transform` (one thread) and peak memory go to
benchmarks/results/imputation_magic.json; of `pbmc4k_ambient` also the imputed values and the principal components, to
the cache, to compare with, and how far its output is from itself under another seed: its principal components are
randomised. A few cells and genes of it go to tests/oracles/magic.npz. `speed.npz` has counts alone: CPU-seconds of
t = 3.
"""

from __future__ import annotations

import json
import resource
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import magic
import numpy as np

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "cache" / "imputation"
RESULT = ROOT / "results" / "imputation_magic.json"
TIMES = (1, 2, 3, 5, "auto")


def stabilised(counts: np.ndarray) -> np.ndarray:
    """Square root of counts at the median library size."""
    library = counts.sum(axis=1, keepdims=True)
    return np.sqrt(counts / np.maximum(library, 1) * np.median(library))


def loss(imputed: np.ndarray, held_out: np.ndarray) -> float:
    """Mean of mu - x log mu over entries, of held-out counts x."""
    profile = np.maximum(imputed, 0) ** 2
    profile = profile / profile.sum(axis=1, keepdims=True)
    expected = np.maximum(profile * held_out.sum(axis=1, keepdims=True), 1e-8)
    return float(np.mean(expected - held_out * np.log(expected)))


def imputed(x: np.ndarray, t: Any, seed: int = 0) -> tuple[np.ndarray, magic.MAGIC, float]:
    """MAGIC's output, itself, and CPU-seconds."""
    op = magic.MAGIC(t=t, verbose=0, random_state=seed, n_jobs=1)
    np.random.seed(0)  # noqa: NPY002 - what MAGIC chooses genes from
    start = time.process_time()
    y = np.asarray(op.fit_transform(x, genes="all_genes"))
    return y, op, round(time.process_time() - start, 2)


def store_oracle(counts: np.ndarray) -> None:
    """Output for 80 cells and the 30 most expressed genes: so few genes that MAGIC makes no components of them."""
    counts = counts[:80, np.sort(np.argsort(-counts.sum(axis=0))[:30])].astype(np.int16)
    kept: dict[str, Any] = {"counts": counts}
    for t in (1, 3, 5):
        kept[f"t{t}"] = imputed(stabilised(counts.astype(float)), t)[0].astype(np.float32)
    y, _, _ = imputed(stabilised(counts.astype(float)), "auto")
    kept["auto"] = y.astype(np.float32)
    np.savez_compressed(ROOT.parent / "tests" / "oracles" / "magic.npz", **kept)


def main() -> None:
    """Everything; a line for each run."""
    warnings.filterwarnings("ignore")
    imputed(np.random.default_rng(0).random((300, 50)), 1)  # compiles what numba compiles
    rows: list[dict[str, Any]] = []
    for path in sorted(CACHE.glob("*.npz")):
        if path.stem.startswith("magic_"):
            continue
        file = np.load(path)
        if path.stem == "speed":
            _, _, seconds = imputed(stabilised(file["counts"].astype(float)), 3)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rows.append({"data": "speed", "t": 3, "cpu_s": seconds, "peak_gb": round(peak, 2)})
            print(rows[-1])
            continue
        x, held_out, kept = stabilised(file["kept"].astype(float)), file["held_out"].astype(float), {}
        for t in TIMES:
            y, op, seconds = imputed(x, t)
            rows.append({"data": path.stem, "t": t, "loss": loss(y, held_out), "cpu_s": seconds})
            print(rows[-1])
            kept |= {f"t{t}": y.astype(np.float32)} if t in (1, 3, 5) else {}
        if path.stem == "pbmc4k_ambient":
            kept["components"] = op.graph.data_nu.astype(np.float32)
            np.savez_compressed(CACHE / "magic_pbmc4k_ambient.npz", **kept)
            gaps = [float(np.abs(imputed(x, t, seed=1)[0] - kept[f"t{t}"]).max()) for t in (1, 3, 5)]
            rows.append({"data": "another seed", "t": [1, 3, 5], "largest_difference": gaps})
            print(rows[-1])
            store_oracle(file["kept"])
    lines = ",\n ".join(json.dumps(row) for row in rows)
    packages = f"magic-impute {version('magic-impute')}, graphtools {version('graphtools')}"
    RESULT.write_text(f'{{"versions": "{packages}", "threads": 1, "rows": [\n {lines}\n]}}\n')


if __name__ == "__main__":
    main()
