"""LIANA 1.10.0 on a .h5ad of counts: CellPhoneDB's means and p-values, and the consensus, with CPU seconds.

    benchmarks/envs/liana/bin/python benchmarks/peers/run_liana.py COUNTS.h5ad RESOURCE.csv OUTPUT_FOLDER

RESOURCE.csv has columns ligand, receptor, complexes joined by "_". Counts are scaled to 10,000 a cell and log1p. Groups
are obs["cell_type"]; 100 permutations of seed 0, expressed in a tenth of the cells. OUTPUT_FOLDER gets cellphonedb.csv,
rank_aggregate.csv and seconds.json (CPU seconds of each on one thread: set OMP_NUM_THREADS=1).
"""

import json
import sys
import time
import warnings
from pathlib import Path

import anndata
import liana as li
import pandas as pd
import scanpy as sc


def main():
    """Both methods on the same cells."""
    adata = anndata.read_h5ad(sys.argv[1])
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    seconds = {}
    for name in ("cellphonedb", "rank_aggregate"):
        resource = pd.read_csv(sys.argv[2])[["ligand", "receptor"]].drop_duplicates()
        start = time.process_time()
        getattr(li.mt, name)(
            adata, groupby="cell_type", resource=resource, use_raw=False, expr_prop=0.1, n_perms=100, seed=0,
            verbose=False, n_jobs=1,
        )  # fmt: skip
        seconds[name] = time.process_time() - start
        adata.uns["liana_res"].to_csv(folder / f"{name}.csv", index=False)
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
