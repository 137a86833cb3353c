"""`tl.communication`: which ligands of neighbouring cells explain what cells express."""

import warnings
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from scipy import sparse

from .. import slots
from ..data.genes import highly_variable_genes
from ..data.lr_resource import pair_columns, read_pairs
from ..data.transform import shifted_log
from ..errors import DataError, DataWarning
from ..fitting import fit
from ..math.neighbors import knn
from ..operators.singlecell import CellCommunicationConfig, DifferentiableCellCommunication
from ..recording import recorded
from .ligand_receptor import TOTAL, dense, memberships, used_genes

if TYPE_CHECKING:
    from anndata import AnnData

WHO = "tl.communication"
HEADS, VALUES_AT_ONCE = 4, 1 << 25


@recorded
def communication(
    adata: "AnnData",
    groupby: str | None = None,
    resource: Any = None,
    *,
    species: str | None = None,
    batch_key: str | None = None,
    n_neighbors: int = 6,
    n_top_genes: int = 500,
    min_cells: int = 20,
    max_pairs: int = 200,
    n_pathways: int = 10,
    hidden_dim: int = 64,
    max_epochs: int = 300,
    use_rep: str | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Finds ligand-receptor pairs whose signals explain the receivers' expression (`DifferentiableCellCommunication`).

    A graph network predicts each cell's log-normalised expression from its own other genes, its neighbours, and the
    neighbours' ligands where the cell has the receptor; what only the last explains is the strength of a pair.

    Args:
        adata: cells x genes, changed in place; neighbours are those in `obsm["spatial"]`, without it in expression.
        groupby: column of `obs`, or key of `obsm` with memberships, between whose groups signals are summed.
        resource: as of `tl.ligand_receptor`.
        species: keeps the rows of a resource whose column `species` says so.
        batch_key: column of `obs`; cells of different slices are no neighbours.
        n_neighbors: senders of a receiver.
        n_top_genes: so many variable genes are explained, beside those of the pairs.
        min_cells: a pair is left out if fewer cells have one of its genes.
        max_pairs: of the pairs that are left, those whose genes are most widely expressed.
        n_pathways: sets of pairs with a like response.
        hidden_dim: width of the network.
        max_epochs: of training, each on all cells.
        use_rep: key of `obsm` for neighbours in expression; None is the PCA of log-normalised counts.
        layer: of the counts; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `uns["diffbio_communication"]`, a dict: "pairs", a DataFrame of ligand, receptor, strength (variance of the
    receivers' genes that the pair explains; 1 is that of a gene), pathway and response (genes that respond most), the
    strongest first; "pathways", a DataFrame (pathways, genes) of responses; with groups "groups", a DataFrame of
    source, target, ligand, receptor, score, and "activity" (groups, pathways). Also
    `obsm["diffbio_signaling_activity"]` (cells, pathways), `obsm["X_diffbio_niche"]`, and
    `obsp["diffbio_communication"]`, sparse (sender, receiver): scores of all pairs.

    Raises:
        ConfigError: a setting is out of range, or the `liana` package is asked for and not installed.
        MissingKeyError: no such column.
        DataError: values that are no counts, no pair with genes in enough cells, or too few cells for the neighbours.
    """
    import pandas as pd

    matrix = slots.counts(adata, layer)
    named = None if groupby is None else memberships(adata, groupby, WHO)
    read = pair_columns(read_pairs(resource, species=species), list(adata.var_names))
    kept = _expressed(sparse.csc_matrix(matrix), read.columns, min_cells, max_pairs)
    table, columns = read.table.iloc[kept].reset_index(drop=True), read.columns[kept]
    of_pairs, _ = used_genes(columns)
    genes = np.union1d(of_pairs, _variable(matrix, n_top_genes))
    place = np.where(columns >= 0, np.searchsorted(genes, columns), -1).astype(np.int32)
    graph = _graph(adata, n_neighbors, batch_key, use_rep, layer)
    data = {"counts": dense(shifted_log(matrix, total=TOTAL)[:, genes]), "lr_pairs": place, "spatial_graph": graph}
    config = CellCommunicationConfig(
        n_genes=len(genes), n_lr_pairs=len(table), n_pathways=n_pathways, hidden_dim=hidden_dim, num_heads=HEADS
    )
    op = DifferentiableCellCommunication(config, rngs=nnx.Rngs(random_state))
    with warnings.catch_warnings():  # that the values are log-normalised is meant
        warnings.filterwarnings("ignore", ".*log-transformed", DataWarning)
        fit(op, data, seed=random_state, progress=progress, max_epochs=max_epochs)
    definition, state = nnx.split(op)
    run = jax.jit(lambda state, data: nnx.merge(definition, state).summary(**data))
    found: dict[str, Any] = jax.device_get(run(state, data))
    names = [f"pathway {k + 1}" for k in range(n_pathways)]
    responses = found["pair_responses"]
    table["strength"] = found["pair_strengths"]
    table["pathway"] = [names[k] for k in found["pathway_weights"].argmax(axis=1)]
    gene_names = adata.var_names.to_numpy(str)[genes]
    best = np.argsort(-np.abs(responses), axis=1)[:, :5]
    table["response"] = [" ".join(gene_names[row]) for row in best]
    order = np.argsort(-table["strength"].to_numpy(), kind="stable")
    result: dict[str, Any] = {
        "pairs": table.iloc[order].reset_index(drop=True),
        "pathways": pd.DataFrame(found["programs"], index=pd.Index(names), columns=pd.Index(gene_names)),
    }
    totals, between = _summed(found, graph, None if named is None else named[1])
    if named is not None and between is not None:
        result["groups"] = _between(between, table, named[0])
        size = named[1].sum(axis=0)[:, None]
        activity = named[1].T @ found["signaling_activity"] / np.where(size > 0, size, 1.0)
        result["activity"] = pd.DataFrame(activity, index=pd.Index(named[0]), columns=pd.Index(names))
    adata.uns[slots.COMMUNICATION] = result
    adata.obsm[slots.SIGNALING] = found["signaling_activity"]
    adata.obsm[slots.NICHE] = found["niche_embeddings"]
    shape = (adata.n_obs, adata.n_obs)
    adata.obsp[slots.COMMUNICATION] = sparse.csr_matrix((totals.astype(np.float32), (graph[0], graph[1])), shape=shape)
    left_out = len(read.table) - len(table) + read.left_out
    slots.note(adata, slots.COMMUNICATION, {"pairs": len(table), "left_out": left_out})


def _expressed(counts: Any, columns: np.ndarray, min_cells: int, most: int) -> np.ndarray:
    """Rows of the pairs whose genes are in enough cells, at most so many, in their order."""
    cells = np.diff(counts.indptr) if (counts.data != 0).all() else np.asarray((counts != 0).sum(axis=0)).ravel()
    fewest = np.where(columns >= 0, cells[np.maximum(columns, 0)], counts.shape[0]).min(axis=(1, 2))
    enough = np.flatnonzero(fewest >= min_cells)
    if not len(enough):
        msg = f"{WHO}: of {len(columns)} pairs with genes in the data none has all of them in {min_cells} cells; the "
        msg += f"best has {int(fewest.max())}. Lower min_cells, or pass another resource"
        raise DataError(msg)
    return np.sort(enough[np.argsort(-fewest[enough], kind="stable")[:most]])


def _variable(counts: Any, n_top: int) -> np.ndarray:
    """Column numbers of the most variable genes that are expressed at all."""
    total = np.asarray(counts.sum(axis=0)).ravel()
    there = np.flatnonzero(total > 0)
    if len(there) <= n_top:
        return there
    chosen = highly_variable_genes(counts[:, there], n_top_genes=n_top)["highly_variable"].to_numpy()
    return there[chosen]


def _graph(
    adata: "AnnData", n_neighbors: int, batch_key: str | None, use_rep: str | None, layer: str | None
) -> np.ndarray:
    """Senders and receivers (2, edges): of every cell its nearest within its slice, ordered by receiver."""
    if use_rep is None and slots.SPATIAL in adata.obsm:
        points = np.asarray(adata.obsm[slots.SPATIAL], np.float64)
        if not np.isfinite(points).all():
            row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
            msg = f"{WHO}: obsm['spatial'] holds NaN or infinity, first in cell {row} ({adata.obs_names[row]})"
            raise DataError(msg)
    else:
        points = slots.representation(adata, use_rep, layer)
    codes = np.zeros(adata.n_obs, int) if batch_key is None else slots.batches(adata, batch_key)[0]
    senders = np.empty((adata.n_obs, n_neighbors), np.int32)
    for code in np.unique(codes):
        cells = np.flatnonzero(codes == code)
        if len(cells) <= n_neighbors:
            msg = f"{WHO}: n_neighbors is {n_neighbors}, but there are only {len(cells)} cells"
            msg += "; lower it" if batch_key is None else f" in a slice of obs[{batch_key!r}]; lower it"
            raise DataError(msg)
        senders[cells] = cells[np.asarray(knn(points[cells], n_neighbors).indices)]
    return np.stack([senders.ravel(), np.repeat(np.arange(adata.n_obs, dtype=np.int32), n_neighbors)])


def _summed(found: dict[str, Any], graph: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, Any]:
    """Scores of every edge over all pairs, and (pairs, groups, groups) mean over edges between groups; in blocks."""
    senders, receivers = graph
    ligand, receptor = found["ligand"], found["receptor"]  # receptor: times strength
    edge = found["edge_attention"].mean(axis=1)
    totals, between = np.zeros(len(edge)), None
    if groups is not None:
        n = groups.shape[1]
        between = np.zeros((ligand.shape[1], n, n))
        of_edges = np.maximum(groups.sum(axis=0)[None, :], 1e-9)
    step = max(1, VALUES_AT_ONCE // max(len(edge), 1))
    for start in range(0, ligand.shape[1], step):
        pairs = slice(start, start + step)
        scores = edge[:, None] * ligand[senders, pairs] * receptor[receivers, pairs]
        totals += scores.sum(axis=1)
        if groups is not None and between is not None:
            for source in range(n):  # per receiver of the target group
                flow = groups[senders, source, None] * scores
                between[pairs, source] = (flow.T @ groups[receivers]) / of_edges
    return totals, between


def _between(scores: np.ndarray, table: Any, names: list[str]) -> Any:
    import pandas as pd

    pair, source, target = np.nonzero(scores > 0)
    found = pd.DataFrame(
        {
            "source": pd.Categorical.from_codes(source, pd.Index(names)),
            "target": pd.Categorical.from_codes(target, pd.Index(names)),
            "ligand": table["ligand"].to_numpy(object)[pair],
            "receptor": table["receptor"].to_numpy(object)[pair],
            "pathway": table["pathway"].to_numpy(object)[pair],
            "score": scores[pair, source, target],
        }
    )
    return found.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)
