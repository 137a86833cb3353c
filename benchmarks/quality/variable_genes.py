"""Variable genes of SoftHVGSelector beside scanpy's seurat_v3: overlap of the top 2000.

    uv run python -m benchmarks.quality.variable_genes

``pbmc3k`` and ``pbmc_three_chemistries`` (with batches), both sides in this run. With batches scanpy does not repeat
itself: its means and variances of a batch are sums of fractions in the order of the cells, which splits genes of equal
counts at random, and its sort leaves equal genes in no order. So the rows for batches are:

- ours against scanpy as it is;
- scanpy against itself with the cells in another order (mean and least of five);
- ours against scanpy with the means and variances of the batches computed from sums of whole numbers (exact), first
  with scanpy's sort, then with one that keeps equal genes in the order of the columns. Nothing else is changed.

The last row is the bar: the method without rounding errors and with a rule for ties.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from benchmarks.quality.harmony import data_folder

TOP = 2000


def ours(adata: Any, batch_key: str | None) -> tuple[set[str], float]:
    """Genes that the operator picks, and CPU seconds."""
    import pandas as pd
    from flax import nnx

    from diffbio.operators.singlecell import SoftHVGConfig, SoftHVGSelector

    start = time.process_time()
    data = {"counts": adata.X.toarray()}
    n_batches = 1
    if batch_key is not None:
        batches = pd.Categorical(adata.obs[batch_key])
        data["batch_labels"], n_batches = batches.codes.astype(int), len(batches.categories)
    config = SoftHVGConfig(n_genes=adata.n_vars, n_top_genes=TOP, n_batches=n_batches, hard=True)
    gates = SoftHVGSelector(config, rngs=nnx.Rngs(0)).apply(data)[0]["hvg_weights"]
    return set(adata.var_names[np.asarray(gates) > 0]), time.process_time() - start


def scanpys(adata: Any, batch_key: str | None) -> tuple[set[str], float]:
    """Genes that scanpy picks, and CPU seconds."""
    import scanpy as sc

    start = time.process_time()
    table = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=TOP, batch_key=batch_key, inplace=False
    )
    return set(table.index[table["highly_variable"]]), time.process_time() - start


@contextlib.contextmanager
def exact(*, stable: bool) -> Iterator[None]:
    """Scanpy with exact means and variances of the batches; if `stable`, with ties in the order of the columns."""
    import scanpy.preprocessing._highly_variable_genes as module

    original, numpy = module.aggregate, module.np

    def aggregate(adata: Any, by: str, func: Any) -> Any:
        out = original(adata, by=by, func=func)
        for i, batch in enumerate(out.obs[by]):
            rows = adata.X[(adata.obs[by] == batch).to_numpy()].astype(np.float64)
            n = rows.shape[0]
            total, squares = (np.asarray(x.sum(axis=0)).ravel() for x in (rows, rows.multiply(rows)))
            out.layers["mean"][i] = total / n
            out.layers["var"][i] = (n * squares - total**2) / (n * (n - 1.0))
        return out

    class Stable:
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

        @staticmethod
        def argsort(values: Any, axis: int = -1) -> Any:
            return np.argsort(values, axis=axis, kind="stable")

    module.aggregate = aggregate
    module.np = Stable() if stable else numpy
    try:
        yield
    finally:
        module.aggregate, module.np = original, numpy


def main() -> None:
    """Print the table; exit with 1 if a bar is missed."""
    import anndata

    warnings.simplefilter("ignore")
    missed = False

    def row(what: str, value: str, bar: bool | None = None) -> None:
        nonlocal missed
        missed |= bar is False
        print(f"{what:72s} {value:>24s}  {'' if bar is None else f'= {TOP}' + ' MISSED' * (not bar)}", flush=True)

    print(f"{f'genes in common, of {TOP}':72s} {'':>24s}  bar")
    adata = anndata.read_h5ad(data_folder() / "pbmc3k.h5ad")
    (mine, t_mine), (theirs, t_theirs) = ours(adata, None), scanpys(adata, None)
    row("pbmc3k: ours, scanpy", str(len(mine & theirs)), len(mine & theirs) == TOP)
    row("pbmc3k: CPU s, ours (with compilation) and scanpy", f"{t_mine:.1f}, {t_theirs:.1f}")
    adata = anndata.read_h5ad(data_folder() / "pbmc_three_chemistries.h5ad")
    (mine, _), (theirs, _) = ours(adata, "batch"), scanpys(adata, "batch")
    row("three batches: ours, scanpy", str(len(mine & theirs)))
    again = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(adata.n_obs)
        again.append(len(theirs & scanpys(adata[order].copy(), "batch")[0]))
        if seed == 0:
            row("three batches: ours, ours with the cells in another order",
                str(len(mine & ours(adata[order].copy(), "batch")[0])))  # fmt: skip
    row("three batches: scanpy, scanpy with the cells in another order", f"{np.mean(again):.1f} (least {min(again)})")
    with exact(stable=False):
        row("three batches: ours, scanpy with exact moments", str(len(mine & scanpys(adata, "batch")[0])))
    with exact(stable=True):
        common = len(mine & scanpys(adata, "batch")[0])
        row("three batches: ours, scanpy with exact moments and ties by column", str(common), common == TOP)
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
