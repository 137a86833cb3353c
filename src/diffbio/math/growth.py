"""Growth from what cells express: the birth and death rates of Waddington-OT."""

import numpy as np
from jaxtyping import Float

CUT = 5.0  # standard deviations beyond which a gene's score counts no more
FASTEST, SLOWEST = 1.7, 0.3  # births or deaths a day


def birth_rate(proliferation: Float[np.ndarray, " cells"]) -> Float[np.ndarray, " cells"]:
    """Births a day, a logistic function of the proliferation score: 0.3 to 1.7, halfway at 0.25 (wot's beta)."""
    return _logistic(proliferation, middle=0.25, width=0.5)


def death_rate(apoptosis: Float[np.ndarray, " cells"]) -> Float[np.ndarray, " cells"]:
    """Deaths a day, a logistic function of the apoptosis score: 0.3 to 1.7, halfway at 0.1 (wot's delta)."""
    return _logistic(apoptosis, middle=0.1, width=0.2)


def growth_per_day(
    proliferation: Float[np.ndarray, " cells"], apoptosis: Float[np.ndarray, " cells"] | None = None
) -> Float[np.ndarray, " cells"]:
    """exp(births - deaths): by what a cell's descendants multiply in a day (Schiebinger et al. 2019, as in wot).

    Without apoptosis scores deaths are those at a score of 0.
    """
    scores = np.zeros_like(proliferation) if apoptosis is None else apoptosis
    return np.exp(birth_rate(proliferation) - death_rate(scores))


def mean_z_score(values: Float[np.ndarray, "cells genes"]) -> Float[np.ndarray, " cells"]:
    """Mean over the genes of how many standard deviations a cell is above the mean, each cut at 5; as wot scores."""
    spread = values.std(axis=0)
    scores = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return np.clip(scores, -CUT, CUT).mean(axis=1)


def _logistic(score: np.ndarray, *, middle: float, width: float) -> np.ndarray:
    # tanh does not overflow where exp does
    return SLOWEST + (FASTEST - SLOWEST) * 0.5 * (1 + np.tanh(2 / width * (score - middle)))
