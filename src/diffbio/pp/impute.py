"""Imputation of dropouts on AnnData."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from .. import slots
from ..data.source import ArraySource
from ..errors import ConfigError, DataError, DataWarning, MissingKeyError
from ..fitting import fit
from ..math.diffusion import ENTRIES_PER_BLOCK, Markov, procrustes_disparity, step
from ..operators.singlecell import (
    DifferentiableDiffusionImputer,
    DifferentiableTransformerDenoiser,
    DiffusionImputerConfig,
    TransformerDenoiserConfig,
)
from ..operators.singlecell.diffusion_imputation import MOST_STEPS, stabilised_on_host
from ..pipelines.inference import apply_in_chunks
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

SETTLED = 1e-3  # Procrustes disparity of two steps in a row, MAGIC's rule
MOST_COMPARED = 500  # genes that it looks at


@recorded
def impute(
    adata: "AnnData",
    *,
    method: str = "diffusion",
    t: float | str = "auto",
    genes: Sequence[str] | None = None,
    n_neighbors: int = 5,
    decay: float = 1.0,
    use_rep: str | None = None,
    batch_key: str | None = None,
    max_epochs: int | None = None,
    layer: str | None = None,
    random_state: int = 0,
    progress: bool = False,
    copy: bool = False,
) -> None:
    """Fills in molecules that were missed, from similar cells or from the other genes of the cell.

    Args:
        adata: cells x genes, changed in place; counts.
        method: "diffusion" averages over a graph of similar cells (MAGIC); "transformer" predicts each gene from the
            others of the cell, on the variable genes and those named in `genes`.
        t: how many steps to diffuse: a number, such as 3 or 1.5; "auto" stops where a further step changes little
            (MAGIC's rule); "learned" takes t, bandwidth and decay that best predict held-out molecules. All genes are
            looked at, whatever `genes` are.
        genes: names of the genes that are wanted; None is all of them.
        n_neighbors: of diffusion: the neighbour whose distance is a cell's bandwidth; edges reach three times as far.
        decay: of diffusion: exponent of the kernel.
        use_rep: of diffusion: entry of `obsm` to compare cells by, such as an integrated one; None is 100 principal
            components of the counts. With t="learned" those are made without the held-out molecules; a representation
            has seen them, so that too little averaging may look best: there is a warning.
        batch_key: of diffusion: column of `obs`; each batch is imputed from its own cells.
        max_epochs: of learning; None is what the operator prefers.
        layer: of the counts; None is X.
        random_state: seed.
        progress: whether to show how training goes.
        copy: works on a copy and returns it.

    Adds `layers["diffbio_imputed"]`, expected counts, dense, NaN where a gene was not read; or with `genes`
    `obsm["diffbio_imputed"]`, a table of theirs; the other of the two is removed. Cells without counts stay at zero.
    `uns["diffbio"]["diffbio_imputed"]` holds t, bandwidth and decay of
    each batch, and the `curve` by which t was chosen, at t = 0, 1, 2, ...: loss of held-out molecules
    (with the bandwidth and decay that were learned), or disparity from the step before.

    Raises:
        ConfigError: an unknown method, t out of its range, or a setting that the method does not have.
        DataError: values that are no raw counts, or a batch with too few cells.
        MissingKeyError: a gene, or the representation, is not there.
    """
    slots.choose(method, ["diffusion", "transformer"], "pp.impute")
    _check_t(t)
    matrix = slots.counts(adata, layer)
    columns = np.arange(adata.n_vars) if genes is None else _columns(adata, genes)
    learning: dict[str, Any] = {"progress": progress} | ({} if max_epochs is None else {"max_epochs": max_epochs})
    if method == "transformer":
        slots.refuse(
            "pp.impute", method, t=t != "auto", n_neighbors=n_neighbors != 5, decay=decay != 1.0,
            use_rep=use_rep is not None, batch_key=batch_key is not None,
        )  # fmt: skip
        read = slots.variable_genes(adata, matrix)
        read = read if genes is None else np.union1d(read, columns)
        result = _by_transformer(matrix, read, random_state, learning)
        found: dict[str, Any] = {}
        if genes is None:
            result = slots.all_genes(result, read, adata.n_vars)
        else:
            result = result[:, np.searchsorted(read, columns)]
    else:
        if max_epochs is not None and t != "learned":
            slots.refuse("pp.impute", f"diffusion, t={t!r}", max_epochs=True)
        config = DiffusionImputerConfig(
            n_neighbors=n_neighbors, decay=float(decay), diffusion_t=3.0 if isinstance(t, str) else float(t)
        )
        batch = np.zeros(adata.n_obs, int)
        if batch_key is not None:
            batch, names = slots.batches(adata, batch_key)
            _check_batches(np.bincount(batch, minlength=len(names)), names, n_neighbors)
        if use_rep is not None and t == "learned":
            msg = f"pp.impute: obsm[{use_rep!r}] has seen the held-out molecules that t is learned from; too little "
            msg += "averaging may look best. Without use_rep the components are made from the other molecules"
            warnings.warn(msg, DataWarning, stacklevel=3)
        points = None if use_rep is None else slots.representation(adata, use_rep)
        result, steps = np.empty((adata.n_obs, len(columns)), np.float32), []
        for number in np.unique(batch):
            rows = np.flatnonzero(batch == number)
            op = DifferentiableDiffusionImputer(config, rngs=nnx.Rngs(random_state))
            own = None if points is None else points[rows]
            diffusion = _Diffusion(op, matrix[rows], own, columns)
            steps.append(diffusion.choose(t, random_state, learning))
            result[rows] = diffusion.imputed()
        found = _told(steps)
    for stale in (adata.layers, adata.obsm):  # of an earlier call
        stale.pop(slots.IMPUTED, None)
    if genes is None:
        adata.layers[slots.IMPUTED] = result
    else:
        adata.obsm[slots.IMPUTED] = pd.DataFrame(result, index=adata.obs_names, columns=adata.var_names[columns])
    adata.uns["diffbio"] = {**adata.uns.get("diffbio", {}), slots.IMPUTED: found}


class _Diffusion:
    """The imputer at work on one batch of cells; counts stay as sparse as they are."""

    def __init__(
        self, op: DifferentiableDiffusionImputer, counts: Any, points: np.ndarray | None, columns: np.ndarray
    ) -> None:
        self.op, self.counts, self.columns = op, counts, columns
        self.given = {} if points is None else {"embeddings": points}
        self.points = op.embedded_on_host(counts) if points is None else points
        self.indices = op.neighbors_on_host(self.points)
        y: Any = stabilised_on_host(counts)
        self.y = y.tocsc() if hasattr(y, "tocsc") else y  # columns are what is read

    def choose(self, t: float | str, seed: int, learning: dict[str, Any]) -> dict[str, Any]:
        """Sets t, and if it is to be learned the kernel; what was found."""
        curve: np.ndarray = np.zeros(0)
        if t == "learned":
            data = self.op.for_training({"counts": self.counts, **self.given})
            fit(self.op, ArraySource(data, {}), seed=seed, **learning)
            curve = self.op.losses({key: _dense(value) for key, value in data.items()})
        elif t == "auto":
            curve = self._disparities(seed)
            self.op.t[...] = jnp.asarray(float(min(len(curve), MOST_STEPS)))  # one step more, as MAGIC
        return {
            "t": float(self.op.steps()), "bandwidth": float(jnp.exp(self.op.log_bandwidth[...])),
            "decay": float(jnp.exp(self.op.log_decay[...])), "curve": curve,
        }  # fmt: skip

    def imputed(self) -> np.ndarray:
        """Expected counts of the wanted genes, a block of genes at a time."""
        run = jax.jit(self.op.diffused)
        operator, n, width = self._operator(), self.y.shape[0], len(self.columns)
        library = np.asarray(self.counts.sum(axis=1), np.float32).reshape(-1, 1)
        result = np.empty((n, width), np.float32)
        size = min(width, max(1, ENTRIES_PER_BLOCK // n))
        for start in range(0, width, size):
            block = slice(min(start, width - size), min(start, width - size) + size)  # all of one size: compiled once
            part = np.asarray(run(operator, jnp.asarray(_dense(self.y[:, self.columns[block]]))))
            np.multiply(library, np.maximum(part, 0.0) ** 2, out=result[:, block])
        return result

    def _operator(self) -> Markov:
        return jax.jit(self.op.graph)(jnp.asarray(self.points), jnp.asarray(self.indices))

    def _disparities(self, seed: int) -> np.ndarray:
        """Procrustes disparity of step 0 (none), 1, 2, ... from the one before, until it is small."""
        operator, width = self._operator(), self.y.shape[1]
        rng = np.random.default_rng(seed)
        some = np.sort(rng.choice(width, MOST_COMPARED, replace=False)) if width > MOST_COMPARED else np.arange(width)
        y, found = jnp.asarray(_dense(self.y[:, some])), [np.nan]
        while not found[-1] < SETTLED and len(found) <= MOST_STEPS:
            y, disparity = _further(operator, y)
            found.append(float(disparity))
        return np.asarray(found)


@jax.jit
def _further(operator: Markov, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    after = step(operator, y)
    return after, procrustes_disparity(y, after)


def _by_transformer(matrix: Any, read: np.ndarray, seed: int, learning: dict[str, Any]) -> np.ndarray:
    op = DifferentiableTransformerDenoiser(TransformerDenoiserConfig(n_genes=len(read)), rngs=nnx.Rngs(seed))
    source = ArraySource({"counts": matrix[:, read]}, {})
    fit(op, source, seed=seed, **learning)
    imputed = np.concatenate([part["imputed_counts"] for part in apply_in_chunks(op, source, ["imputed_counts"])])
    empty = np.asarray(matrix.sum(axis=1)).ravel() == 0
    return np.where(empty[:, None], np.float32(0), imputed)  # nothing is known of them


def _told(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all batches: one entry each, curves as rows padded with NaN."""
    longest = max(len(found["curve"]) for found in steps)
    curves = np.full((len(steps), longest), np.nan)
    for row, found in zip(curves, steps, strict=True):
        row[: len(found["curve"])] = found["curve"]
    numbers = {name: np.asarray([found[name] for found in steps]) for name in ("t", "bandwidth", "decay")}
    return {**numbers, "curve": curves}


def _dense(block: Any) -> np.ndarray:
    return np.asarray(block.toarray() if hasattr(block, "toarray") else block)


def _check_batches(sizes: np.ndarray, names: Sequence[str], n_neighbors: int) -> None:
    for size, name in zip(sizes, names, strict=True):
        if size <= n_neighbors:
            msg = f"pp.impute: batch {name!r} has {size} cells, and each needs n_neighbors={n_neighbors} others of its "
            msg += "batch; leave the batch out, or pass a smaller n_neighbors."
            raise DataError(msg)


def _check_t(t: float | str) -> None:
    number = isinstance(t, int | float | np.number) and not isinstance(t, bool)
    if (isinstance(t, str) and t in ("auto", "learned")) or (number and 0 <= float(t) <= MOST_STEPS):
        return
    msg = f"pp.impute: t must be 'auto', 'learned' or a number from 0 to {MOST_STEPS}, got {t!r}."
    raise ConfigError(msg)


def _columns(adata: "AnnData", genes: Sequence[str]) -> np.ndarray:
    names = [genes] if isinstance(genes, str) else list(genes)
    found = adata.var_names.get_indexer_for(pd.Index(names))
    missing = [name for name, place in zip(names, found, strict=False) if place < 0]
    if missing or len(found) != len(names) or not names:
        what = f"{missing[0]!r} is not among var_names" if missing else "genes must name each gene once"
        msg = f"pp.impute: {what}."
        raise MissingKeyError(msg)
    return np.asarray(found)
