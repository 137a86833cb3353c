"""Centre alignment (Zeira et al. 2022, PASTE's second problem): one slice that stands for all, and the plans to each.

It has the spots of one of the slices. Its expression is n_components profiles, W H, by non-negative matrix
factorisation under the Kullback-Leibler loss, of the plans' mean of all slices; plans and W H are found in turn.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .slice_coupling import CouplingSettings, Slice, SliceCoupling, couple_slices

NMF_STEPS = 200
SAME = 1e-3  # change of the objective, of itself, at which the turns end (paste-bio 1.4's threshold)


class CentreSlice(NamedTuple):
    """The centre slice and the plans from it to every slice."""

    expression: Float[np.ndarray, "spots genes"]  # W H, mean counts
    weights: Float[np.ndarray, "spots components"]  # W
    components: Float[np.ndarray, "components genes"]  # H
    couplings: list[SliceCoupling]
    objective: list[float]  # weighted mean over the slices, at each turn


def centre_slice(
    slices: Sequence[Slice],
    *,
    reference: int = 0,
    weights: Sequence[float] | None = None,
    n_components: int = 15,
    turns: int = 10,
    settings: CouplingSettings | None = None,
) -> CentreSlice:
    """Finds the centre slice of any number of slices.

    Args:
        slices: of the same genes.
        reference: number of the slice whose spots the centre has, and whose counts it starts with.
        weights: of the slices in the mean, of sum 1; None is equal ones.
        n_components: profiles of the factorisation; at most as many as spots or genes.
        turns: of plans and factorisation at most.
        settings: of the plans.
    """
    settings = settings or CouplingSettings()
    own = slices[reference]
    share = np.full(len(slices), 1 / len(slices)) if weights is None else np.asarray(weights, float)
    width = min(n_components, *own.counts.shape)
    w, h = _factors(own.counts, width, settings.seed)
    history: list[float] = []
    for _ in range(turns):
        centre = Slice(w @ h, own.coords)
        couplings = [couple_slices(centre, other, settings) for other in slices]
        history.append(float(share @ [found.objective for found in couplings]))
        w, h = _factors(_mean(slices, couplings, share), width, settings.seed)
        if len(history) > 1 and abs(history[-2] - history[-1]) <= SAME * abs(history[-2]):
            break
    return CentreSlice(w @ h, w, h, couplings, history)


def _mean(slices: Sequence[Slice], couplings: Sequence[SliceCoupling], share: np.ndarray) -> np.ndarray:
    """Mean counts that the plans bring to each spot of the centre; spots left out by a plan count for the others."""
    total, mass = np.zeros((couplings[0].plan.shape[0], slices[0].counts.shape[1])), 0.0
    for own, found, part in zip(slices, couplings, share, strict=True):
        brought = found.plan @ own.counts
        total += part * np.asarray(brought.toarray() if hasattr(brought, "toarray") else brought)
        mass = mass + part * np.asarray(found.plan.sum(axis=1)).ravel()
    return total / np.maximum(np.asarray(mass)[:, None], 1e-300)


def _factors(counts: Any, n_components: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """W and H of the counts, by multiplicative updates (Lee & Seung 2001)."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    values = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, float)
    model = NMF(
        n_components, solver="mu", beta_loss="kullback-leibler", init="nndsvda", random_state=seed, max_iter=NMF_STEPS
    )
    with warnings.catch_warnings():  # it need not settle: the plans change it again
        warnings.simplefilter("ignore", ConvergenceWarning)
        w = model.fit_transform(values)
    return w, np.asarray(model.components_)
