"""`tl.ligand_receptor`: ligands of one group of cells and receptors of another."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from .. import slots
from ..data.lr_resource import PairColumns, pair_columns, read_pairs
from ..data.transform import shifted_log
from ..errors import DataError, MissingKeyError
from ..operators.singlecell import DifferentiableLigandReceptor, LRScoringConfig
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

WHO = "tl.ligand_receptor"
TOTAL = 1e4  # counts a cell is scaled to, as LIANA


@recorded
def ligand_receptor(
    adata: "AnnData",
    groupby: str,
    resource: Any = None,
    *,
    species: str | None = None,
    expr_prop: float = 0.1,
    n_permutations: int = 1000,
    min_cells: int = 5,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Scores ligand-receptor pairs between groups: CellPhoneDB's and a consensus (`DifferentiableLigandReceptor`).

    Counts are scaled to 10,000 a cell and log(1 + x); a complex is its lowest subunit.

    Args:
        adata: cells x genes, changed in place.
        groupby: column of `obs`; or key of `obsm` with memberships of the cells in soft groups, rows summing to 1.
        resource: DataFrame with columns ligand and receptor, complexes joined by "_"; a list of pairs; the path of a
            .csv; or the name of a resource of the `liana` package, which must then be installed. None is its
            "consensus" of human genes.
        species: keeps the rows of a resource whose column `species` says so.
        expr_prop: a gene is expressed in a group where at least this share of its cells has it.
        n_permutations: of the cells' groups, for the p-values; 0 takes a normal approximation.
        min_cells: a group of fewer is refused.
        layer: of the counts; None is X.
        random_state: of the permutations.
        copy: works on a copy and returns it.

    Adds `uns["diffbio_lr"]`, a DataFrame of the pairs that are expressed, the best first: source, target, ligand,
    receptor, mean (of ligand in source and receptor in target), specificity (their shares of the groups' sums,
    multiplied), pvalue (of the mean, by permutation), analytic_pvalue (its normal approximation), magnitude_rank and
    specificity_rank (robust aggregates of several scores' ranks, 0-1, small is high). `uns["diffbio"]["diffbio_lr"]`
    says how many pairs were read and how many had a gene that is not in the data.

    Raises:
        ConfigError: a setting is out of range, or the `liana` package is asked for and not installed.
        MissingKeyError: no such column.
        DataError: values that are no counts, no pair with genes in the data, a single group, or one of too few cells.
    """
    matrix = slots.counts(adata, layer)
    config = LRScoringConfig(expr_prop=expr_prop, n_permutations=n_permutations, min_cells=min_cells)
    names, groups = memberships(adata, groupby, WHO)
    if len(names) < 2:
        msg = f"{WHO}: {groupby!r} has one group, {names[0]!r}; two at least are compared. Name another column"
        raise DataError(msg)
    sizes = dict(zip(names, groups.sum(axis=0), strict=True))
    small = {name: size for name, size in sizes.items() if size < min_cells - 1e-3}
    if small:
        some = ", ".join(f"{name} ({size:.4g})" for name, size in small.items())
        msg = f"{WHO}: groups of fewer than min_cells={min_cells} cells: {some}; leave their cells out, join them with "
        msg += "others, or lower min_cells"
        raise DataError(msg)
    pairs = pair_columns(read_pairs(resource, species=species), list(adata.var_names))
    genes, columns = used_genes(pairs.columns)
    values = dense(shifted_log(matrix, total=TOTAL)[:, genes])
    op = DifferentiableLigandReceptor(config, rngs=nnx.Rngs(random_state))
    graph, state = nnx.split(op)
    data = {"counts": values, "lr_pairs": columns, "cluster_assignments": groups}
    run = jax.jit(lambda state, data: nnx.merge(graph, state).apply(data)[0])
    found: dict[str, Any] = jax.device_get(run(state, data))
    adata.uns[slots.LIGAND_RECEPTOR] = _table(found, pairs, names)
    slots.note(adata, slots.LIGAND_RECEPTOR, {"pairs": len(pairs.table), "left_out": pairs.left_out, "groups": names})


def memberships(adata: "AnnData", groupby: str, who: str) -> tuple[list[str], np.ndarray]:
    """Names of the groups, and memberships (cells, groups) of a column of `obs` or an entry of `obsm`.

    Raises:
        MissingKeyError: there is neither.
        DataError: a cell without a group, or memberships that do not sum to 1.
    """
    if groupby not in adata.obs and groupby in adata.obsm:
        table: Any = adata.obsm[groupby]
        values = np.asarray(table, np.float32)
        names = [str(name) for name in getattr(table, "columns", range(values.shape[1]))]
        if not np.isfinite(values).all() or (values < 0).any() or not np.allclose(values.sum(axis=1), 1.0, atol=1e-3):
            msg = f"{who}: obsm[{groupby!r}] must hold memberships, 0 and more, that sum to 1 in every cell"
            raise DataError(msg)
        return names, values
    if groupby not in adata.obs:
        has = ", ".join(map(str, adata.obs.columns)) or "no column"
        msg = f"{who}: there is no {groupby!r} in obs (it has {has}) or obsm"
        raise MissingKeyError(msg)
    codes, names = slots.batches(adata, groupby)
    return names, np.eye(len(names), dtype=np.float32)[codes]


def used_genes(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the genes in pairs, ascending, and the pairs by their place among these."""
    genes = np.unique(columns[columns >= 0])
    place = np.searchsorted(genes, columns)
    return genes, np.where(columns >= 0, place, -1).astype(np.int32)


def dense(values: Any) -> np.ndarray:
    """Float32, also of sparse values."""
    return np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), np.float32)


def _table(found: dict[str, Any], pairs: PairColumns, names: list[str]) -> Any:
    import pandas as pd

    pair, source, target = np.nonzero(found["lr_expressed"] > 0.5)
    at = pair, source, target
    columns = {
        "source": pd.Categorical.from_codes(source, pd.Index(names)),
        "target": pd.Categorical.from_codes(target, pd.Index(names)),
        "ligand": pairs.table["ligand"].to_numpy(object)[pair],
        "receptor": pairs.table["receptor"].to_numpy(object)[pair],
        "mean": found["lr_scores"][at],
        "specificity": found["lr_specificity"][at],
        "pvalue": found["lr_pvalues"][at],
        "analytic_pvalue": found["lr_analytic_pvalues"][at],
        "magnitude_rank": found["lr_magnitude_rank"][at],
        "specificity_rank": found["lr_specificity_rank"][at],
    }
    table = pd.DataFrame(columns)
    order = np.lexsort((-table["mean"], table["specificity_rank"], table["magnitude_rank"]))
    return table.iloc[order].reset_index(drop=True)
