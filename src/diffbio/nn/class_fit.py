"""A linear classifier of latent positions from few labelled and many unlabelled cells, on the host.

1. A mixture of Gaussians, one per type, of shared covariance and learned proportions, by expectation
   maximisation over all cells, labelled ones fixed: the bound of SCANVI with p(z | c) Gaussian. Its posterior
   is linear in z: log q(c | z) = z W0 + b0 up to a constant.
2. Logistic regression on the labelled cells that starts from MIXTURE_WEIGHT * (z W0 + b0) and pays for what it
   adds (a Gaussian prior): few labels leave the mixture's answer, many override it.
3. With batches, an intercept and slopes of each batch are added, shrunk more than the shared ones.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ..errors import DataError

# Measured with 1, 5, 10 % labels on four data sets (benchmarks/quality/scanvi.py): 0.25 and 0.5 are level, 0 is
# logistic regression (0.79 against 0.85 on pbmc3k with 1 %), at 1 the mixture's misfit makes it too sure.
MIXTURE_WEIGHT = 0.25
SLOPE_SD = 1.0  # of what the regression adds to the mixture, per unit of z (whose prior is N(0, I))
INTERCEPT_SD = 2.0
BATCH_SLOPE_SD = 0.5
BATCH_INTERCEPT_SD = 1.0
MIXTURE_ROUNDS = 50


class LinearClasses(NamedTuple):
    """logits = z @ kernel + bias + z @ by_batch[s, :-1] + by_batch[s, -1] for a cell of batch s."""

    kernel: np.ndarray  # (latent, labels)
    bias: np.ndarray  # (labels,)
    by_batch: np.ndarray  # (batches, latent + 1, labels)


def fit_classes(
    z: np.ndarray, labels: np.ndarray, n_labels: int, batch: np.ndarray | None = None, n_batch: int = 0
) -> LinearClasses:
    """The classifier of the module's docstring.

    z: latent means of all cells, (cells, latent). labels: codes; outside 0..n_labels-1 a cell is unlabelled.
    batch: codes of batches, of all cells.

    Raises:
        DataError: no cell is labelled.
    """
    z = np.asarray(z, np.float64)
    labels = np.asarray(labels).reshape(-1)
    rows = np.flatnonzero((labels >= 0) & (labels < n_labels))
    if not len(rows):
        msg = "SCANVI: no cell is labelled; a classifier needs one label at least."
        raise DataError(msg)
    center = z.mean(0)  # so that what is shrunk are slopes, not the choice of the origin
    x, y, width = z - center, labels[rows], z.shape[1]
    sd = np.concatenate([np.full(width, SLOPE_SD), [INTERCEPT_SD]])
    alone = _regression(_with_one(x[rows]), y, sd, np.zeros((len(rows), n_labels)))
    # a hard start: soft memberships by few labels would pull rare types to the mean of all cells
    kernel, bias = _mixture(x, rows, y, np.eye(n_labels)[(_with_one(x) @ alone).argmax(1)])
    kernel, bias = MIXTURE_WEIGHT * kernel, MIXTURE_WEIGHT * bias
    features = _with_one(x[rows])
    if batch is not None and n_batch > 1:
        own = np.eye(n_batch)[np.asarray(batch).reshape(-1)[rows]]
        by_batch = np.concatenate([own[:, [s]] * _with_one(x[rows]) for s in range(n_batch)], axis=1)
        features = np.concatenate([features, by_batch], axis=1)
        sd = np.concatenate([sd, np.tile([*np.full(width, BATCH_SLOPE_SD), BATCH_INTERCEPT_SD], n_batch)])
    weights = _regression(features, y, sd, x[rows] @ kernel + bias).reshape(-1, width + 1, n_labels)
    weights[:, -1] -= np.einsum("d,sdk->sk", center, weights[:, :-1])
    added = np.zeros((n_batch, width + 1, n_labels))
    if len(weights) > 1:
        added = weights[1:]
    return LinearClasses(kernel + weights[0, :-1], bias - center @ kernel + weights[0, -1], added)


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _mixture(x: np.ndarray, rows: np.ndarray, y: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of the posterior of the mixture, started at memberships `start`."""
    width, n_labels = x.shape[1], start.shape[1]
    fixed = np.eye(n_labels)[y]
    prior = 0.2 * np.diag(x.var(0) + 1e-6)  # as good as `width` cells: few labels leave the covariance open
    members = start
    for _ in range(MIXTURE_ROUNDS):
        members[rows] = fixed
        size = members.sum(0)
        mean = (members.T @ x) / np.maximum(size, 1e-9)[:, None]
        scatter = x.T @ x - (mean.T * size) @ mean
        precision = np.linalg.inv((scatter + width * prior) / (len(x) + width))
        kernel = precision @ mean.T
        share = (size + 1.0) / (len(x) + n_labels)
        bias = np.log(share) - 0.5 * np.einsum("kd,dk->k", mean, kernel)
        before, members = members, softmax(x @ kernel + bias, axis=1)
        if np.abs(members - before).mean() < 1e-4:
            break
    return kernel, bias


def _regression(x: np.ndarray, y: np.ndarray, sd: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Weights (features, labels) of largest posterior: logits offset + x @ weights, weights ~ N(0, sd²)."""
    shape = (x.shape[1], offset.shape[1])
    truth = np.eye(shape[1])[y]
    penalty = 1.0 / sd[:, None] ** 2

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        log_p = log_softmax(offset + x @ weights, axis=1)
        value = -(truth * log_p).sum() + 0.5 * (penalty * weights**2).sum()
        return value, (x.T @ (np.exp(log_p) - truth) + penalty * weights).ravel()

    found = minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return found.x.reshape(shape)
