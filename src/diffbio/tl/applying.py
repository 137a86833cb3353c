"""What the functions of `tl` share."""

from typing import TYPE_CHECKING, Any

from ..data.source import ArraySource
from ..errors import ConfigError
from ..operators.base import Operator
from ..pipelines.inference import apply_in_chunks, joined

if TYPE_CHECKING:
    from anndata import AnnData


def at_most_cells(n_clusters: int | None, adata: "AnnData", who: str) -> None:
    """Refuses more clusters than there are cells.

    Raises:
        ConfigError: naming both numbers.
    """
    if n_clusters is not None and n_clusters > adata.n_obs:
        msg = f"{who}: n_clusters must be at most the number of cells, {adata.n_obs}, got {n_clusters}."
        raise ConfigError(msg)


def applied(op: Operator, data: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The outputs `keys` of a fitted operator on all cells, some at a time."""
    return joined(apply_in_chunks(op, ArraySource(data), keys))
