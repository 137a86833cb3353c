"""Cells called among droplets (EmptyDrops) beside cutting at the total, on droplets whose content is known.

    uv run python -m benchmarks.quality.droplets

From pbmc4k_ambient, three seeds: 800 cells as they are, 400 thinned to 200-1,000 counts (small or damaged cells), and
16,000 of soup of the file's measured profile, with the spread between droplets of a Dirichlet-multinomial (sum 5,000),
their totals lognormal about 60 (sd of the log 0.7), so that some 3,500 hold more than 100 counts. No R peer was run.
`cut` calls as many droplets as hold cells, those of the largest totals; it is told their number, ours is not.
"""

import argparse
import time

import numpy as np
from benchmarks.quality.harmony import data_folder
from scipy import sparse

from diffbio import read
from diffbio.math.droplets import call_cells

BAR = 0.01  # of false discoveries; ten times what is asked for, since 1,200 cells tell no finer


def droplets(seed: int) -> tuple[sparse.csr_array, np.ndarray]:
    """Counts, and what they are: 0 soup, 1 a cell, 2 a small cell."""
    adata = read(data_folder() / "pbmc4k_ambient.h5ad")
    rng = np.random.default_rng(seed)
    profile = adata.var["ambient_profile"].to_numpy(float)
    profile = profile / profile.sum()
    order = rng.permutation(adata.n_obs)
    whole = sparse.csr_array(adata.X[order[:800]])
    some = adata.X[order[800:1200]].toarray().astype(int)
    wanted = np.minimum(rng.integers(200, 1000, len(some)) / some.sum(axis=1), 1.0)
    small = rng.binomial(some, wanted[:, None])
    totals = np.maximum(rng.lognormal(np.log(60), 0.7, 16_000).astype(int), 1)
    spread = profile * 5_000 + 1e-12
    soup = sparse.vstack([sparse.csr_array(rng.multinomial(n, rng.dirichlet(spread))[None]) for n in totals])
    matrix = sparse.csr_array(sparse.vstack([whole, sparse.csr_array(small), soup]))
    return matrix, np.repeat([1, 2, 0], [800, 400, len(totals)])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    print(f"{'seed':<6}{'method':<12}{'cells':>8}{'small cells':>13}{'false of called':>17}{'bar':>7}{'CPU s':>8}")
    for seed in range(3):
        matrix, truth = droplets(seed)
        totals = np.asarray(matrix.sum(axis=1)).ravel()
        begun = time.process_time()
        found = call_cells(matrix).is_cell
        seconds = time.process_time() - begun
        cut = totals >= np.sort(totals)[::-1][np.count_nonzero(truth) - 1]
        for name, called, cpu in (("ours", found, seconds), ("cut", cut, 0.0)):
            false = (called & (truth == 0)).sum() / called.sum()
            print(
                f"{seed:<6}{name:<12}{called[truth == 1].mean():>8.3f}{called[truth == 2].mean():>13.3f}"
                f"{false:>17.4f}{BAR if name == 'ours' else float('nan'):>7.3f}{cpu:>8.1f}"
            )


if __name__ == "__main__":
    main()
