"""How far probabilities are from what they say (Guo et al. 2017)."""

import numpy as np


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, n_bins: int = 15) -> float:
    """Mean over cells of |accuracy - confidence| of the bin of equal width that their confidence is in.

    probabilities: (cells, classes). labels: (cells,).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    size = np.bincount(bins, minlength=n_bins)
    gap = np.bincount(bins, right, n_bins) - np.bincount(bins, confidence, n_bins)
    return float(np.abs(gap).sum() / size.sum())
