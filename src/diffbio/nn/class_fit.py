"""A linear classifier of latent positions from few labelled and many unlabelled cells, on the host.

1. A mixture of Gaussians, one per type, of shared covariance and learned proportions, by expectation
   maximisation over all cells, labelled ones fixed, from two starts: the bound of SCANVI with p(z | c) Gaussian.
   Its posterior is linear in z: log q(c | z) = z W0 + b0 up to a constant.
2. Logistic regression on the labelled cells that starts from MIXTURE_WEIGHT * (z W0 + b0) and pays for what it
   adds (a Gaussian prior): few labels leave the mixture's answer, many override it.
3. With batches, an intercept and slopes of each batch are added, slopes of the same prior as the shared ones: what
   holds in one batch alone is kept out of the shared ones, which are all that is known of a new batch.

`adapt_classes` moves the borders for a new batch without labels, `folded_temperature` calibrates without held-out
cells.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from ..errors import DataError

# Measured with 1, 5, 10 % labels on four data sets (benchmarks/quality/scanvi.py): 0.25 and 0.5 are level, 0 is
# logistic regression (0.79 against 0.85 on pbmc3k with 1 %), at 1 the mixture's misfit makes it too sure.
MIXTURE_WEIGHT = 0.25
# Of what the regression adds to the mixture, per unit of z (whose prior is N(0, I)); with batches, half of the
# variance is theirs. Shared slopes of sd 1 beside 0.5 by batch carry to a held-out batch less well (accuracy 0.957
# against 0.964 on pbmc_three_chemistries, 3 seeds x 3 chemistries), and are no better within the batches.
SLOPE_SD = 1.0
INTERCEPT_SD = 2.0
BATCH_INTERCEPT_SD = 1.0
MIXTURE_ROUNDS = 50
# Of slopes in a second start of the mixture: with 8 labels (scmix_cell_lines, 1 %), the first one finds a poor optimum
# in 1 of 5 draws; the likelier of the two is taken.
START_SD = 0.3
# `adapt_classes`
ADAPT_ROUNDS = 200
SHIFT_SD = 0.5  # of the batch's shift, in standard deviations of a type
# Below this mean probability of the likeliest type, it is not clear which shift is the batch's and which the types':
# mouse cells by human labels, 0.78: accuracy falls from 0.83 to 0.57; the same tissue, 0.87 to 0.99: rises or stays.
LEAST_CONFIDENCE = 0.85
LEAST_CELLS = 20
# `folded_temperature`
FOLDS = 10
FOLD_CELLS = 20_000  # at most, of the unlabelled ones
# The priors above leave the classifier of few labels less sure than it should be: with 1 % the best temperatures are
# 0.66 to 0.79 (pbmc3k and generated_6000, 5 draws each), 1.6 to 2.0 on pbmc_three_chemistries, whose types are less
# like Gaussians. 30 labels alone cannot tell: on pbmc3k, of 27 left out 22 are called right, of all cells 88 %.
FOLDED_MEDIAN, FOLDED_LOG_SD = 0.8, 0.3
# `best_temperature`
LOG_TEMPERATURE_SD = 0.5
TEMPERATURES = 0.1, 20.0  # the least and the largest


class TypeClouds(NamedTuple):
    """The mixture of Gaussians: where the cells of every type lie."""

    mean: np.ndarray  # (labels, latent)
    precision: np.ndarray  # (latent, latent), the inverse of the covariance that all types share
    share: np.ndarray  # (labels,), of the cells, sums to 1


class LinearClasses(NamedTuple):
    """logits = z @ kernel + bias + z @ by_batch[s, :-1] + by_batch[s, -1] for a cell of batch s."""

    kernel: np.ndarray  # (latent, labels)
    bias: np.ndarray  # (labels,)
    by_batch: np.ndarray  # (batches, latent + 1, labels)
    clouds: TypeClouds

    def logits(self, z: np.ndarray, batch: np.ndarray | None = None) -> np.ndarray:
        """Of cells at z, (cells, labels)."""
        shared: np.ndarray = z @ self.kernel + self.bias
        if batch is None or not len(self.by_batch):
            return shared
        own = self.by_batch[batch]
        return shared + np.einsum("nd,ndk->nk", z, own[:, :-1]) + own[:, -1]


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
    batches = batch is not None and n_batch > 1
    slope_sd = SLOPE_SD * np.sqrt(0.5) if batches else SLOPE_SD
    sd = np.concatenate([np.full(width, slope_sd), [INTERCEPT_SD]])
    found = []
    for start_sd in (slope_sd, START_SD):
        sd[:-1] = start_sd
        alone = _regression(_with_one(x[rows]), y, sd, np.zeros((len(rows), n_labels)))
        # a hard start: soft memberships by few labels would pull rare types to the mean of all cells
        found.append(_mixture(x, rows, y, np.eye(n_labels)[(_with_one(x) @ alone).argmax(1)]))
    clouds = max(found, key=lambda mixture: _log_likelihood(x, rows, y, mixture))
    sd[:-1] = slope_sd
    kernel, bias = (MIXTURE_WEIGHT * part for part in _border(clouds))
    features = _with_one(x[rows])
    if batches:
        own = np.eye(n_batch)[np.asarray(batch).reshape(-1)[rows]]
        by_batch = np.concatenate([own[:, [s]] * _with_one(x[rows]) for s in range(n_batch)], axis=1)
        features = np.concatenate([features, by_batch], axis=1)
        sd = np.concatenate([sd, np.tile([*np.full(width, slope_sd), BATCH_INTERCEPT_SD], n_batch)])
    weights = _regression(features, y, sd, x[rows] @ kernel + bias).reshape(-1, width + 1, n_labels)
    weights[:, -1] -= np.einsum("d,sdk->sk", center, weights[:, :-1])
    added = np.zeros((n_batch, width + 1, n_labels))
    if len(weights) > 1:
        added = weights[1:]
    clouds = clouds._replace(mean=clouds.mean + center)
    return LinearClasses(kernel + weights[0, :-1], bias - center @ kernel + weights[0, -1], added, clouds)


def adapt_classes(
    z: np.ndarray,
    found: LinearClasses,
    labels: np.ndarray | None = None,
    *,
    temperature: float = 1.0,
) -> np.ndarray | None:
    """What a new batch adds to the logits, (labels,): its own shift and its own shares of the types.

    The clouds of the types, moved by one shift d ~ N(0, (SHIFT_SD sd)²) and with shares of the batch's own (prior:
    those of `found`, as heavy as a cell for every type), by expectation maximisation over the batch's cells; the
    classifier is then asked at z - d, and its probabilities are multiplied by new / old share (Saerens et al. 2002).

    z: latent means of the batch's cells. found: by_batch is not read. labels: codes of those that are known; outside
    0..labels-1 a cell is not. temperature: what the logits will be divided by.

    None if there are fewer than LEAST_CELLS cells, or if the classifier is not sure of them (LEAST_CONFIDENCE).
    """
    z = np.asarray(z, np.float64)
    clouds = found.clouds
    n_labels = len(clouds.share)
    known = np.zeros(len(z), bool) if labels is None else (labels >= 0) & (labels < n_labels)
    fixed = np.eye(n_labels)[labels[known]] if labels is not None else np.zeros((0, n_labels))
    members = softmax(found.logits(z) / temperature, axis=1)
    if len(z) < LEAST_CELLS or members.max(1).mean() < LEAST_CONFIDENCE:
        return None
    stiffness = np.diag(1.0 / (SHIFT_SD**2 * np.diag(np.linalg.inv(clouds.precision))))
    kernel, bias = _border(clouds)
    shift, share = np.zeros(z.shape[1]), clouds.share
    for _ in range(ADAPT_ROUNDS):
        members[known] = fixed
        away = clouds.precision @ (z.sum(0) - members.sum(0) @ clouds.mean)
        before, shift = (shift, share), np.linalg.solve(len(z) * clouds.precision + stiffness, away)
        share = (members.sum(0) + n_labels * clouds.share) / (len(z) + n_labels)
        members = softmax((z - shift) @ kernel + bias + np.log(share / clouds.share), axis=1)
        if np.abs(shift - before[0]).max() < 1e-4 and np.abs(share - before[1]).max() < 1e-5:
            break
    return -shift @ found.kernel + temperature * np.log(share / clouds.share)


def folded_temperature(
    z: np.ndarray, labels: np.ndarray, n_labels: int, batch: np.ndarray | None = None, n_batch: int = 0
) -> float:
    """The temperature of `fit_classes`, by labelled cells that it was not given: of largest posterior over FOLDS folds.

    Its logarithm is N(log FOLDED_MEDIAN, FOLDED_LOG_SD²) before; 1 if no type has two labelled cells.
    Arguments as for `fit_classes`; z must not depend on the labels, else every fold is called right.
    """
    labels = np.asarray(labels).reshape(-1)
    known = (labels >= 0) & (labels < n_labels)
    some = np.random.default_rng(0).permutation(np.flatnonzero(~known))[:FOLD_CELLS]
    chosen = np.sort(np.concatenate([np.flatnonzero(known), some]))
    z, labels, known = np.asarray(z)[chosen], np.where(known, labels, -1)[chosen], known[chosen]
    batch = None if batch is None else np.asarray(batch).reshape(-1)[chosen]
    rows = np.flatnonzero(known)
    count = np.bincount(labels[rows], minlength=n_labels)
    rows = rows[count[labels[rows]] > 1]
    if not len(rows):
        return 1.0
    rows = rows[np.argsort(labels[rows], kind="stable")]  # so that a fold never takes all cells of a type
    fold = np.arange(len(rows)) % min(FOLDS, len(rows))
    logits = np.zeros((len(rows), n_labels))
    for number in np.unique(fold):
        out = rows[fold == number]
        left = labels.copy()
        left[out] = -1
        of_out = None if batch is None else batch[out]
        logits[fold == number] = fit_classes(z, left, n_labels, batch, n_batch).logits(z[out], of_out)
    truth = labels[rows]

    def loss(temperature: float) -> float:
        log_p = log_softmax(logits / temperature, axis=1)
        return float(-log_p[np.arange(len(truth)), truth].sum())

    return best_temperature(loss, median=FOLDED_MEDIAN, log_sd=FOLDED_LOG_SD)


def best_temperature(
    loss: Callable[[float], Any], *, median: float = 1.0, log_sd: float = LOG_TEMPERATURE_SD
) -> float:
    """The temperature of largest posterior; its logarithm is N(log median, log_sd²) before.

    Without that, few cells that are all called right would drive it to 0, and to certainty with it.

    loss: the negative log likelihood, summed over cells that were not trained on, of a temperature.
    """

    def penalised(log_t: float) -> float:
        return float(loss(float(np.exp(log_t)))) + 0.5 * ((log_t - np.log(median)) / log_sd) ** 2

    found = minimize_scalar(penalised, bounds=np.log(TEMPERATURES), method="bounded")
    return float(np.exp(found.x))


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _border(clouds: TypeClouds) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of the posterior of the mixture."""
    kernel = clouds.precision @ clouds.mean.T
    return kernel, np.log(clouds.share) - 0.5 * np.einsum("kd,dk->k", clouds.mean, kernel)


def _mixture(x: np.ndarray, rows: np.ndarray, y: np.ndarray, start: np.ndarray) -> TypeClouds:
    """The mixture, started at memberships `start`."""
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
        clouds = TypeClouds(mean, precision, (size + 1.0) / (len(x) + n_labels))
        kernel, bias = _border(clouds)
        before, members = members, softmax(x @ kernel + bias, axis=1)
        if np.abs(members - before).mean() < 1e-4:
            break
    return clouds


def _log_likelihood(x: np.ndarray, rows: np.ndarray, y: np.ndarray, clouds: TypeClouds) -> float:
    """Of all cells at x, those of `rows` with their types y; up to a constant that is of no mixture."""
    kernel, bias = _border(clouds)
    logits = x @ kernel + bias
    of_cell = logsumexp(logits, axis=1)
    of_cell[rows] = logits[rows, y]
    _, log_det = np.linalg.slogdet(clouds.precision)
    return float(of_cell.sum() + 0.5 * (len(x) * log_det - np.einsum("nd,nd->", x @ clouds.precision, x)))


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
