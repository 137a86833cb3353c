"""`tl.align_slices`: slices of a tissue, laid on each other."""

import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import slots
from ..errors import ConfigError, DataError, DataWarning, MissingKeyError
from ..math.centre_slice import centre_slice
from ..math.slice_coupling import CouplingSettings, Slice, SliceCoupling, couple_slices
from ..math.slices import nearest_rotation
from ..operators.singlecell import PASTEAlignmentConfig
from ..operators.singlecell.paste_alignment import CONVERGED, SETTLED, check_slices
from ..recording import recorded

if TYPE_CHECKING:
    from anndata import AnnData

WHO = "tl.align_slices"
METHODS = ("chain", "centre")
COARSE = 1e-3  # mass off its marginals of a plan through landmarks; above, a warning


@recorded
def align_slices(
    adata: "AnnData",
    batch_key: str,
    *,
    alpha: float = 0.1,
    method: str = "chain",
    reference: str | None = None,
    spatial_key: str = slots.SPATIAL,
    sinkhorn_epsilon: float = 0.005,
    sinkhorn_iters: int = 20,
    dissimilarity: str = "kl",
    pseudocount: float = 0.01,
    distance_scaling: str = "spacing",
    overlap: float = 1.0,
    allow_reflection: bool = False,
    n_components: int | None = None,
    n_landmarks: int = 1000,
    layer: str | None = None,
    random_state: int = 0,
    copy: bool = False,
) -> None:
    """Couples the spots of slices and lays the slices on each other (see `DifferentiablePASTEAlignment`).

    "chain" couples each slice with the next one, in the order of the categories of `batch_key` (sorted, where the
    column is none), and moves it rigidly onto that one; the first slice, or `reference`, stays where it is. "centre"
    finds one slice that stands for all (`math.centre_slice`), on the spots of `reference`, and moves all onto it. Genes
    with counts in every slice are read. Slices of more than 4 million pairs of spots go through landmarks (see
    `math.slice_coupling`).

    Args:
        adata: spots x genes, changed in place; counts.
        batch_key: column of `obs` that names each spot's slice.
        alpha: weight of space against expression, 0 to 1.
        method: "chain" or "centre".
        reference: name of the slice that stays; None is the first one.
        spatial_key: key of `obsm`: coordinates of 2 or 3 dimensions, one unit of length for all slices.
        sinkhorn_epsilon: entropy, as in `PASTEAlignmentConfig`, like the seven that follow.
        sinkhorn_iters: see there.
        dissimilarity: see there.
        pseudocount: see there.
        distance_scaling: see there.
        overlap: see there.
        allow_reflection: see there.
        n_components: profiles of the centre's expression, 15 if None; only for "centre".
        n_landmarks: of each slice, where there are too many pairs.
        layer: of the counts; None is X.
        random_state: seed of landmarks and factorisation.
        copy: works on a copy and returns it.

    Adds `obsm["diffbio_spatial_aligned"]` (all slices in the frame of the reference) and `uns["diffbio_alignment"]`:
    `slices` (names), `pairs` (couplings, 2): numbers of the coupled slices, in a chain neighbours, with "centre" the
    reference and each slice; `couplings`: sparse (spots, other spots) by the number of the pair, rows in the order of
    `adata`; `objective`, `marginal_error` and `exact` of each; `rotation` (slices, dims, dims) and `translation`
    (slices, dims), by which aligned = rotation place + translation.

    Raises:
        ConfigError: a setting out of its range, or one that the method does not have.
        MissingKeyError: no such column, slice or coordinates.
        DataError: fewer than two slices or three spots in one, a spot without a slice, place or counts, or no gene
            with counts in all of them.
    """
    slots.choose(method, METHODS, WHO)
    slots.refuse(WHO, method, **({} if method == "centre" else {"n_components": n_components is not None}))
    PASTEAlignmentConfig(
        alpha=alpha, sinkhorn_epsilon=sinkhorn_epsilon, sinkhorn_iters=sinkhorn_iters, dissimilarity=dissimilarity,
        pseudocount=pseudocount, distance_scaling=distance_scaling, overlap=overlap,
    )  # fmt: skip
    for name, value, least in (("n_landmarks", n_landmarks, 3), ("n_components", n_components or 15, 1)):
        if value < least:
            msg = f"{WHO}: {name} must be at least {least}, got {value}."
            raise ConfigError(msg)
    settings = CouplingSettings(
        alpha, sinkhorn_epsilon, sinkhorn_iters, dissimilarity, pseudocount, distance_scaling, overlap, n_landmarks,
        seed=random_state,
    )  # fmt: skip
    names, rows, slices = _slices(adata, batch_key, spatial_key, layer)
    if reference is not None and reference not in names:
        msg = f"{WHO}: there is no slice {reference!r}; there are {', '.join(names)}."
        raise MissingKeyError(msg)
    stays = 0 if reference is None else names.index(reference)
    if method == "centre":
        found = centre_slice(slices, reference=stays, n_components=n_components or 15, settings=settings).couplings
        pairs = [(stays, k) for k in range(len(slices))]
    else:
        pairs = [(k, k + 1) for k in range(len(slices) - 1)]
        found = [couple_slices(slices[a], slices[b], settings) for a, b in pairs]
    _warn(found, [(names[a], names[b]) for a, b in pairs])
    motions = _motions(slices, pairs, found, stays, reflection=allow_reflection)
    aligned = np.empty((adata.n_obs, slices[0].coords.shape[1]))
    for own, part, motion in zip(rows, slices, motions, strict=True):
        aligned[own] = part.coords @ motion[0].T + motion[1]
    adata.obsm[slots.SPATIAL_ALIGNED] = aligned
    adata.uns[slots.ALIGNMENT] = {
        "batch_key": batch_key, "spatial_key": spatial_key, "method": method, "slices": np.array(names, dtype=object),
        "pairs": np.array(pairs), "couplings": {str(k): step.plan for k, step in enumerate(found)},
        "objective": np.array([step.objective for step in found]),
        "marginal_error": np.array([step.error for step in found]),
        "exact": np.array([step.exact for step in found]),
        "rotation": np.stack([motion[0] for motion in motions]),
        "translation": np.stack([motion[1] for motion in motions]),
    }  # fmt: skip


def _slices(
    adata: "AnnData", batch_key: str, spatial_key: str, layer: str | None
) -> tuple[list[str], list[np.ndarray], list[Slice]]:
    """Names, row numbers, and shared genes with places, of each slice."""
    if batch_key in adata.obs and (count := adata.obs[batch_key].nunique()) < 2:
        msg = f"{WHO}: obs[{batch_key!r}] holds {count} slice; an alignment needs at least two."
        raise DataError(msg)
    codes, names = slots.batches(adata, batch_key)
    if spatial_key not in adata.obsm:
        msg = f"{WHO}: obsm has no {spatial_key!r}; it has {', '.join(map(str, adata.obsm)) or 'nothing'}. "
        msg += "Name the coordinates with spatial_key=."
        raise MissingKeyError(msg)
    matrix = slots.counts(adata, layer)
    matrix = matrix.tocsr() if hasattr(matrix, "tocsr") else np.asarray(matrix)
    place = np.asarray(adata.obsm[spatial_key], float)
    rows = [np.flatnonzero(codes == k) for k in range(len(names))]
    check_slices(WHO, [matrix[own] for own in rows], [place[own] for own in rows], names=names)
    seen = np.stack([np.asarray(matrix[own].sum(axis=0)).ravel() > 0 for own in rows]).all(axis=0)
    slices = [Slice(matrix[own][:, seen], place[own]) for own in rows]
    check_slices(WHO, [own.counts for own in slices], [own.coords for own in slices], names=names)
    return names, rows, slices


def _motions(
    slices: list[Slice], pairs: list[tuple[int, int]], found: list[SliceCoupling], stays: int, *, reflection: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rotation and translation of every slice into the frame of the one that stays."""
    dims = slices[0].coords.shape[1]
    known = {stays: (np.eye(dims), np.zeros(dims))}
    # outwards from the slice that stays: each pair then has one end whose motion is known
    for k in sorted(range(len(pairs)), key=lambda k: min(abs(end - stays) for end in pairs[k])):
        a, b = pairs[k]
        plan = found[k].plan
        if b in known:
            a, b, plan = b, a, plan.T.tocsr()
        if b in known:
            continue
        rotation, shift = known[a]
        known[b] = motion_between(slices[a].coords @ rotation.T + shift, slices[b].coords, plan, reflection=reflection)
    return [known[k] for k in range(len(slices))]


def motion_between(
    x: np.ndarray, y: np.ndarray, plan: Any, *, reflection: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and translation that lay y on x by least squares over a sparse plan (`math.slices.rigid_motion`)."""
    rows, columns = np.asarray(plan.sum(axis=1)).ravel(), np.asarray(plan.sum(axis=0)).ravel()
    total = rows.sum()
    middle_x, middle_y = rows @ x / total, columns @ y / total
    cross = (x - middle_x).T @ (plan @ (y - middle_y)) / total
    with jax.enable_x64(True):  # noqa: FBT003
        rotation = np.asarray(nearest_rotation(jnp.asarray(cross), reflection=reflection))
    return rotation, middle_x - rotation @ middle_y


def _warn(found: list[SliceCoupling], names: list[tuple[str, str]]) -> None:
    for step, (a, b) in zip(found, names, strict=True):
        limit = CONVERGED if step.exact else COARSE
        if not (step.error <= limit and step.moved <= SETTLED):
            msg = f"{WHO}: the plan of slices {a} and {b} did not converge: {step.error:.1e} of its mass misses the "
            msg += f"marginals, the last round moved {step.moved:.1e}; a larger sinkhorn_epsilon converges faster."
            warnings.warn(msg, DataWarning, stacklevel=4)
