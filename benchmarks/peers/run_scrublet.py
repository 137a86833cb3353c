"""Scrublet 0.2.3 on the data of ``benchmarks.quality.doublets``; runs in the ``quality`` environment.

    OMP_NUM_THREADS=1 benchmarks/envs/quality/bin/python -m benchmarks.peers.run_scrublet

Defaults, expected rate 0.1 (it does not change the ranking). Scores of every seed go to the cache, for the
correlation with ours on the same pairs and genes; one row for every data set and seed to
``benchmarks/results/doublets_scrublet.json``. CPU-seconds of construction and ``scrub_doublets``, one thread.
"""

from __future__ import annotations

import time
import warnings
from importlib.metadata import version

import numpy as np
import scipy.sparse as sp
import scrublet
from benchmarks.quality.doublets import CACHE, SCRUBLET_SEEDS, SPEED, keep_rows, load, runs, scores, speed_counts


def scrub(counts: sp.csr_matrix, seed: int, *, exact: bool = False) -> tuple[scrublet.Scrublet, float]:
    """A finished Scrublet, and its CPU-seconds. exact: exact neighbours in place of annoy's."""
    start = time.process_time()
    found = scrublet.Scrublet(sp.csc_matrix(counts), random_state=seed)
    found.scrub_doublets(verbose=False, use_approx_neighbors=not exact)
    return found, time.process_time() - start


def main() -> None:
    """All data sets and seeds anew."""
    warnings.filterwarnings("ignore")
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, seed in runs(SCRUBLET_SEEDS):
        data = load(name)
        found, cpu = scrub(data.counts, seed)
        row = scores(data, found.doublet_scores_obs_)
        exact, _ = scrub(data.counts, seed, exact=True)
        called = -1.0 if found.predicted_doublets_ is None else float(found.predicted_doublets_.mean())
        rows.append({"data": name, "seed": seed, **row, "called": called, "cpu_s": cpu})
        np.savez_compressed(
            CACHE / f"scrublet_{name}_{seed}.npz",
            scores=found.doublet_scores_obs_, exact=exact.doublet_scores_obs_, pairs=found.doublet_parents_,
        )
        print(rows[-1], flush=True)
    _, cpu = scrub(speed_counts(), 0)
    rows.append({"data": SPEED, "seed": 0, "cpu_s": cpu})
    keep_rows("doublets_scrublet.json", f"scrublet {version('scrublet')}", rows)


if __name__ == "__main__":
    main()
