"""Probabilities that mean what they say: temperature scaling (Guo et al. 2017) and the error that is left."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

# few cells, all called right, would drive the temperature to 0, and to certainty with it
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.5, 20.0


def best_temperature(loss: Callable[[Any], Any]) -> float:
    """The temperature with the least negative log likelihood `loss(temperature)` of held-out cells."""
    bounds = np.log([LEAST_TEMPERATURE, LARGEST_TEMPERATURE])
    found = minimize_scalar(lambda log_t: float(loss(np.float32(np.exp(log_t)))), bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, n_bins: int = 15) -> float:
    """Mean over cells of |accuracy - confidence| of the bin of equal width that their confidence is in.

    probabilities: (cells, classes). labels: (cells,).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    size = np.bincount(bins, minlength=n_bins)
    gap = np.bincount(bins, right, n_bins) - np.bincount(bins, confidence, n_bins)
    return float(np.abs(gap).sum() / size.sum())
