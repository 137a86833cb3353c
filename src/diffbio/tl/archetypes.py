"""`tl.archetypes`: cells as mixtures of extreme states."""

from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from .. import slots
from ..data.transform import shifted_log
from ..errors import ConfigError
from ..fitting import fit
from ..math.archetypes import elbow, explained_by_number, gene_enrichment
from ..operators.singlecell import ArchetypalAnalysisConfig, DifferentiableArchetypalAnalysis
from ..recording import recorded
from .applying import applied

if TYPE_CHECKING:
    from anndata import AnnData

MOST_TRIED = 10  # archetypes, where their number is looked for


@recorded
def archetypes(
    adata: "AnnData",
    n_archetypes: int | None = None,
    *,
    use_rep: str | None = None,
    n_components: int | None = 10,
    share: float = 0.1,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Describes each cell as a mixture of extreme states (`DifferentiableArchetypalAnalysis`), and says by which genes.

    Args:
        adata: cells x genes, changed in place; counts.
        n_archetypes: how many; None takes the elbow of the explained variance of 1 to 10.
        use_rep: key of `obsm`; None is the PCA of log-normalised counts of the variable genes.
        n_components: of it the first so many columns are used; None is all.
        share: of the cells, at most so many count as near an archetype when genes are compared: those whose weight is
            above a half, 5 at least.
        layer: of the counts; None is X.
        random_state: recorded only; nothing is drawn at random.
        copy: works on a copy and returns it.

    Adds `obsm["diffbio_archetype_weights"]` (cells, archetypes), whose rows sum to 1, `varm["diffbio_archetype_genes"]`
    (genes, archetypes), by how much the mean log expression near the archetype is above that of the other cells,
    `varm["diffbio_archetype_qvalues"]`, and `uns["diffbio"]["diffbio_archetypes"]`: positions, the share of variance
    that they explain, and with n_archetypes None that of every number that was tried.

    Raises:
        ConfigError: a number below 1.
        DataError: fewer different cells than archetypes, or no counts.
    """
    if n_components is not None and n_components < 1:
        msg = f"tl.archetypes: n_components must be at least 1, or None for all, got {n_components}."
        raise ConfigError(msg)
    points = slots.representation(adata, use_rep, layer)[:, :n_components]
    found: dict[str, Any] = {}
    if n_archetypes is None:
        found["explained_by_number"] = explained_by_number(points, MOST_TRIED)
        n_archetypes = elbow(found["explained_by_number"])
    config = ArchetypalAnalysisConfig(n_archetypes=n_archetypes, n_features=points.shape[1])
    op = DifferentiableArchetypalAnalysis(config, rngs=nnx.Rngs(random_state))
    data = {"embeddings": points}
    fit(op, data, progress=False)
    result = applied(op, data, "archetype_weights", "reconstructed")
    weights = result["archetype_weights"]
    residual = ((points - result["reconstructed"]) ** 2).sum()
    found["positions"] = np.asarray(op.found[...])
    found["explained"] = float(1 - residual / ((points - points.mean(axis=0)) ** 2).sum())
    genes = gene_enrichment(shifted_log(slots.counts(adata, layer)), weights, share=share)
    adata.obsm[slots.ARCHETYPE_WEIGHTS] = weights
    adata.varm[slots.ARCHETYPE_GENES] = genes.difference.T
    adata.varm[slots.ARCHETYPE_QVALUES] = genes.qvalues.T
    slots.note(adata, slots.ARCHETYPES, found)
