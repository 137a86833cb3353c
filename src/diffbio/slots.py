"""Where the AnnData functions read and write: counts, representations, clusters."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .data.genes import highly_variable_genes
from .data.names import batch_codes
from .data.source import counts_of
from .data.transform import shifted_log
from .data.validate import check_counts
from .errors import ConfigError, DataError, DataWarning, MissingKeyError
from .math.linalg import pca

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

LATENT, INTEGRATED, PCA = "X_diffbio_latent", "X_diffbio_integrated", "X_diffbio_pca"
# a pipeline's integration and every map stand in obsm under their method's name: X_diffbio_harmony, X_diffbio_umap
INTEGRATIONS, MAPS = ("harmony", "mmd", "wgan"), ("umap", "phate")
CLUSTER, CLUSTER_PROB = "diffbio_cluster", "diffbio_cluster_prob"
AMBIENT_FRACTION, AMBIENT_PROFILE = "diffbio_ambient_fraction", "ambient_profile"
DECONTAMINATED, NORMALIZED = "diffbio_decontaminated", "diffbio_normalized"
VARIABLE = "diffbio_highly_variable"
IMPUTED = "diffbio_imputed"
DOUBLET_SCORE, PREDICTED_DOUBLET = "diffbio_doublet_score", "diffbio_predicted_doublet"
DOUBLET_THRESHOLDS, SIMULATED_DOUBLETS = "doublet_thresholds", "simulated_doublet_scores"
IS_CELL, CELL_FDR = "diffbio_is_cell", "diffbio_cell_fdr"
CELL_WEIGHT, QUALITY_PASS = "diffbio_cell_weight", "diffbio_quality_pass"
QUALITY_METRICS = ("diffbio_counts", "diffbio_genes", "diffbio_mitochondrial_share")
QUALITY_THRESHOLDS = "quality_thresholds"
ARCHETYPE_WEIGHTS, ARCHETYPES = "diffbio_archetype_weights", "diffbio_archetypes"
ARCHETYPE_GENES, ARCHETYPE_QVALUES = "diffbio_archetype_genes", "diffbio_archetype_qvalues"
OT = "diffbio_ot"
FATE_PROB, MACROSTATE, MACROSTATE_PROB = "diffbio_fate_prob", "diffbio_macrostate", "diffbio_macrostate_prob"
FATE, DRIVER_GENES, GENE_TRENDS = "diffbio_fate", "diffbio_driver_genes", "diffbio_gene_trends"
VELOCITY, VELOCITY_GENES, VELOCITY_CONFIDENCE = (
    "diffbio_velocity",
    "diffbio_velocity_genes",
    "diffbio_velocity_confidence",
)
VELOCITY_GRAPH, VELOCITY_TRANSITION = "diffbio_velocity_graph", "diffbio_velocity_transition"
LATENT_TIME = "diffbio_latent_time"
SPATIAL, DOMAIN, DOMAIN_PROB = "spatial", "diffbio_domain", "diffbio_domain_prob"
SPATIAL_EMBEDDING, SPATIAL_ATTENTION = "X_diffbio_spatial", "diffbio_spatial_attention"
SPATIAL_ALIGNED, ALIGNMENT = "diffbio_spatial_aligned", "diffbio_alignment"
GRN, TF_ACTIVITY = "diffbio_grn", "diffbio_tf_activity"
LIGAND_RECEPTOR, COMMUNICATION = "diffbio_lr", "diffbio_communication"
SIGNALING, NICHE = "diffbio_signaling_activity", "X_diffbio_niche"
SWITCH_DE, DIFFERENTIAL_DISTRIBUTION = "diffbio_switch_de", "diffbio_differential_distribution"
PSEUDOTIME, DIFFMAP, BRANCH = "diffbio_pseudotime", "X_diffbio_diffmap", "diffbio_branch"
N_COMPONENTS = 50  # of the PCA that stands in where no representation is named


def choose(method: str, available: Sequence[str], where: str) -> None:
    """Refuses a method that is not there.

    Raises:
        ConfigError: naming those that are.
    """
    if method not in available:
        names = ", ".join(map(repr, available))
        msg = f"{where}: method {method!r} is not available; this version has {names}."
        raise ConfigError(msg)


def refuse(where: str, method: str, **asked: bool) -> None:
    """Refuses settings that would do nothing.

    Args:
        where: the function that was called.
        method: what it was asked for.
        asked: by the setting's name, whether it was given.

    Raises:
        ConfigError: naming the first that was.
    """
    for name, given in asked.items():
        if given:
            msg = f"{where}: {name} does nothing for method {method!r}."
            raise ConfigError(msg)


def note(adata: "AnnData", key: str, found: Any) -> None:
    """Puts `found` at `uns["diffbio"][key]`."""
    adata.uns["diffbio"] = {**adata.uns.get("diffbio", {}), key: found}


def target_of(adata: "AnnData", *, copy: bool) -> "AnnData":
    """`adata` itself, or a copy in memory."""
    if not copy:
        return adata
    return adata.to_memory() if adata.isbacked else adata.copy()


def counts(adata: "AnnData", layer: str | None = None) -> Any:
    """The raw counts (cells, genes) in memory, checked; nothing is copied.

    Raises:
        DataError: no counts there, or values that are none.
    """
    if adata.isbacked:
        msg = "the AnnData is backed by a file; call adata.to_memory() first, or run `diffbio run` on the file"
        raise DataError(msg)
    matrix = counts_of(adata, layer=layer)
    check_counts(
        matrix,
        name="X" if layer is None else f"layers[{layer!r}]",
        obs_names=adata.obs_names,
        var_names=adata.var_names,
        uns=adata.uns if layer is None else (),
    )
    return matrix


def batches(adata: "AnnData", key: str) -> tuple[np.ndarray, list[str]]:
    """Codes (cells,) and names of the batches in a column of `obs`."""
    return batch_codes(cast("pd.DataFrame", adata.obs), key)


def labels(adata: "AnnData", batch_key: str | None) -> np.ndarray | None:
    """Batch codes (cells,), None without a key."""
    return None if batch_key is None else batches(adata, batch_key)[0]


def variable_genes(
    adata: "AnnData", matrix: Any, *, n_top_genes: int = 2000, batch_key: str | None = None
) -> np.ndarray:
    """Column numbers of the variable genes; they are found and stored if `var` does not name any."""
    if VARIABLE not in adata.var:
        found = highly_variable_genes(matrix, n_top_genes=n_top_genes, batch_labels=labels(adata, batch_key))
        adata.var[VARIABLE] = found["highly_variable"].to_numpy()
    return np.flatnonzero(adata.var[VARIABLE].to_numpy(dtype=bool))


def representation(adata: "AnnData", use_rep: str | None, layer: str | None = None) -> np.ndarray:
    """`obsm[use_rep]`, float32; None is the PCA of log-normalised counts of the variable genes.

    That is computed and stored in `obsm["X_diffbio_pca"]` if it is not there yet, or was made from another layer.

    Raises:
        MissingKeyError: `obsm` has no such entry.
        DataError: it holds values that are not finite.
    """
    key = use_rep or PCA
    made_from = adata.uns.get("diffbio", {}).get(PCA, {}).get("layer")
    if use_rep is None and (PCA not in adata.obsm or made_from not in (None, layer or "X")):
        matrix = counts(adata, layer)
        genes = variable_genes(adata, matrix)
        width = min(N_COMPONENTS, len(genes), adata.n_obs)
        # normalised over all genes, then restricted
        adata.obsm[PCA] = pca(shifted_log(matrix)[:, genes], width).scores
        note(adata, PCA, {"layer": layer or "X"})
    if key not in adata.obsm:
        msg = f"obsm has no {key!r}; it has {', '.join(map(str, adata.obsm)) or 'nothing'}"
        raise MissingKeyError(msg)
    values = np.asarray(adata.obsm[key], np.float32)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        msg = f"obsm[{key!r}] holds NaN or infinity, first in cell {row} ({adata.obs_names[row]})"
        raise DataError(msg)
    return values


def times(adata: "AnnData", key: str, who: str) -> np.ndarray:
    """A pseudotime in a column of `obs`; infinite in cells that the root is not connected with, which is said.

    Raises:
        DataError: no numbers, missing in some cell, or infinite in all.
    """
    import pandas as pd

    try:
        when = np.asarray(pd.to_numeric(cast("pd.Series[Any]", adata.obs[key]).astype(object)), float)
    except (TypeError, ValueError) as error:
        msg = f"{who}: obs[{key!r}] must hold numbers; got {adata.obs[key].iloc[0]!r}."
        raise DataError(msg) from error
    if np.isnan(when).any():
        row = int(np.flatnonzero(np.isnan(when))[0])
        msg = f"{who}: obs[{key!r}] is missing, first in cell {row} ({adata.obs_names[row]})"
        raise DataError(msg)
    apart = int(np.isinf(when).sum())
    if apart == len(when):
        msg = f"{who}: obs[{key!r}] is infinite in every cell; the root is connected with none of them"
        raise DataError(msg)
    if apart:
        msg = f"{who}: obs[{key!r}] is infinite in {apart:,} cells; the root is not connected with them"
        warnings.warn(msg, DataWarning, stacklevel=4)
    return when


def all_genes(values: np.ndarray, genes: Any, n_genes: int) -> np.ndarray:
    """`values` of some genes as a layer of all of them; NaN says that a gene was not read."""
    layer = np.full((len(values), n_genes), np.nan, np.float32)
    layer[:, genes] = values
    return layer
