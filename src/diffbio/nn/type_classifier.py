"""A classifier of cell types on the latent space of a count VAE, trained with labelled cells.

x = log(1 + 1e4 counts / library), as CellTypist reads it (Dominguez Conde et al. 2022), and

    q(z | x) = N(W' s (x - m) + encoder(x), variance(x)),   log p(type | z) = log_softmax((z K + b) / temperature)

A linear path runs beside the encoder's network, so that logistic regression on all genes is contained, and it is
where training starts (`start_from`). s_g = eta_g / sd_g: eta² is the part of a gene's variance that lies between
types. A ridge on W is then a prior that lets a gene weigh as much as it tells, which is worth more than the network:
benchmarks/quality/celltypist.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from ..errors import DataError
from ..math.distributions import gaussian_kl
from ..math.sparse import SparseRows
from .class_fit import best_temperature
from .count_vae import CountVAE, Gaussian, log_positive
from .scanvi import Constant

Counts = Float[Array, "cells genes"] | SparseRows

TOTAL = 1e4  # counts of a cell after scaling
# Of a logit by all genes together under the ridge's prior: 2 to 16 are level within a data set, at 1 rare types are
# lost; for another chemistry's cells 2 is better (cell_type_fine, 10x_5p held out: accuracy 0.88, else 0.84 to 0.86).
SLOPE_SD = 2.0
# Of what the encoder's network adds to a logit: it is there for the counts, and would learn cells by heart (pbmc3k:
# accuracy 0.88 without this prior, 0.92 with it).
NETWORK_SD = 0.1
NETWORK_AT_START = 0.1  # of the encoder's mean, by which it disturbs the linear path's start
USUAL = 0.99  # of the training cells are nearer to their type than where a cell is half as typical of it
STEEPNESS = 4.0  # of the fall beyond
# In nats for a nat of -log p(counts), of which a cell has some 2,000: with 1,000 the counts pull the linear path away
# from where it tells types apart (pbmc4k_ambient: accuracy 0.977, at the start and with 10,000 it is 0.98).
CLASSIFICATION_WEIGHT = 10_000.0
FOLDS, FOLD_CELLS = 3, 2000  # cells at most, to calibrate
CONSTANT = 1e-9  # variance of log expression that is rounding: one count in 100,000 cells makes more
EMPTY_CLOUD = 1e-3  # of the mean variance, added to every direction of a cloud


class TypeClassifier(nnx.Module):
    """Log probabilities of types at a latent position, and the VAE that has the position. Born in eval mode.

    n_genes: width of the counts.
    n_types: number of types.
    latent_dim: width of z; with n_types - 1 or more nothing of a linear classifier is lost.
    hidden_dims: of the encoder; the decoder has them in reverse.
    likelihood: of the counts: 'zinb' | 'nb' | 'poisson'.
    dropout_rate: in the encoder.
    """

    def __init__(
        self,
        n_genes: int,
        n_types: int,
        *,
        latent_dim: int,
        hidden_dims: tuple[int, ...],
        likelihood: str = "zinb",
        dropout_rate: float = 0.1,
        rngs: nnx.Rngs,
    ) -> None:
        self.n_types = n_types
        self.vae = CountVAE(
            n_genes, latent_dim, hidden_dims=hidden_dims, likelihood=likelihood, dropout_rate=dropout_rate, rngs=rngs
        )
        # of log expression, over the training cells: mean, standard deviation, and eta / sd
        self.center = Constant(jnp.zeros(n_genes))
        self.sd = Constant(jnp.ones(n_genes))
        self.scale = Constant(jnp.full(n_genes, n_genes**-0.5))
        self.linear = nnx.Param(jax.random.normal(rngs.params(), (n_genes, latent_dim)))
        self.classifier = nnx.Linear(latent_dim, n_types, rngs=rngs)
        self.one_vs_rest = nnx.Linear(latent_dim, n_types, rngs=rngs)
        self.temperature = Constant(jnp.ones(()))
        # where the training cells of every type lie
        self.cloud_mean = Constant(jnp.zeros((n_types, latent_dim)))
        self.cloud_precision = Constant(jnp.eye(latent_dim))
        self.cloud_radius = Constant(jnp.asarray(2.0 * latent_dim))  # squared
        self.cloud_axes = Constant(jnp.ones(latent_dim))  # 1 for the dimensions in which clouds are told apart
        self.n_cells = Constant(jnp.asarray(1000.0))  # labelled ones in training, for the weight of the ridge

    def latent(
        self, counts: Counts, library: Float[Array, "cells"] | None = None
    ) -> Float[Array, "cells latent"]:
        """Positions: the mean of q(z | counts) in eval mode, a draw in train mode.

        library: counts of a cell over all its genes; None: over the given ones.
        """
        return self.vae.sample(self._posterior(counts, library))

    def logits(self, z: Float[Array, "cells latent"]) -> Float[Array, "cells types"]:
        """Log probabilities of the types up to a constant, before calibration."""
        return self.classifier(z)

    def log_probabilities(self, z: Float[Array, "cells latent"]) -> Float[Array, "cells types"]:
        """Log p(type | z) of one type out of all, calibrated."""
        return jax.nn.log_softmax(self.logits(z) / self.temperature[...].astype(z.dtype), axis=-1)

    def typical(self, z: Float[Array, "cells latent"]) -> Float[Array, "cells types"]:
        """How usual a cell would be for a cell of each type, 0 to 1: 1 / (1 + (d² / r²)^4).

        d is the Mahalanobis distance from the type's training cells; 99 % of all lie within r of their type.
        """
        away = z[:, None] - self.cloud_mean[...].astype(z.dtype)
        squared = jnp.einsum("nkd,de,nke->nk", away, self.cloud_precision[...].astype(z.dtype), away)
        return 1.0 / (1.0 + (squared / self.cloud_radius[...].astype(z.dtype)) ** STEEPNESS)

    def multi_label(self, z: Float[Array, "cells latent"]) -> Float[Array, "cells types"]:
        """Probability of every type by itself, against the rest: rows need not sum to 1.

        Times how typical the cell is, so that a cell unlike all types has a row of small ones.
        """
        return jax.nn.sigmoid(self.one_vs_rest(z) / self.temperature[...].astype(z.dtype)) * self.typical(z)

    def confidence(self, z: Float[Array, "cells latent"]) -> Float[Array, "cells"]:
        """How usual a cell is for its nearest type, 0 to 1: low where its own type was not in training."""
        return self.typical(z).max(-1)

    def loss(
        self,
        counts: Counts,
        labels: Int[Array, "cells"],
        *,
        kl_weight: jax.Array | float = 1.0,
        classification_weight: jax.Array | float = CLASSIFICATION_WEIGHT,
        library: Float[Array, "cells"] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """-log p(counts | z) + kl_weight KL + classification_weight (cross entropies), means over cells, in nats.

        labels: codes; a cell with one outside 0..n_types-1 is unlabelled and counts in the first two terms alone.
        The cross entropies, of one type out of all and of every type against the rest, are at the mean of q; with
        them go the ridge on the slopes that the linear path gives each gene, as in `ridge_classes`, and one on what the
        network adds to the logits.
        """
        x = _log_expression(counts, library)
        q, network = self._parts(x)
        log_library = log_positive(_library(counts, library))
        reconstruction = -self.vae.mean_log_prob(counts, self.vae.sample(q), log_library)
        kl = gaussian_kl(q.mean, q.logvar).mean()
        label = jax.nn.one_hot(labels, self.n_types, dtype=q.mean.dtype)
        n_labelled = jnp.maximum(label.sum(), 1.0)
        log_p = jax.nn.log_softmax(self.logits(q.mean), axis=-1)
        cross_entropy = -(label * log_p).sum() / n_labelled
        alone = self.one_vs_rest(q.mean)
        known = label.sum(-1, keepdims=True)
        against_rest = (known * jax.nn.softplus(alone) - label * alone).sum() / n_labelled
        right = (known[:, 0] * (jnp.argmax(log_p, -1) == labels)).sum()
        metrics = {
            "reconstruction": reconstruction, "kl": kl, "classification": cross_entropy,
            "accuracy": right / n_labelled,
        }
        any_labelled = label.sum() > 0
        heads = jnp.concatenate([self.classifier.kernel[...], self.one_vs_rest.kernel[...]], axis=1)
        slopes, by_network = self.linear[...] @ heads, network @ heads
        ridge = (slopes**2).sum() / (SLOPE_SD**2 * self.n_cells[...]) + (by_network**2).sum(-1).mean() / NETWORK_SD**2
        ridge = 0.5 * any_labelled * ridge
        total = reconstruction + kl_weight * kl + classification_weight * (cross_entropy + against_rest + ridge)
        return total, metrics

    def marker_scores(
        self, counts: Counts, labels: Int[Array, "cells"], library: Float[Array, "cells"] | None = None
    ) -> Float[Array, "types genes"]:
        """Mean over a type's cells of the gradient of its logit by standardised log expression, (types, genes).

        The logit is that of the type less the mean of all types. A type without cells has a row of zeros.
        """
        label = jax.nn.one_hot(labels, self.n_types, dtype=self.linear[...].dtype)
        share = label / jnp.maximum(label.sum(0), 1.0)
        x = _log_expression(counts, library)

        def logit(x: jax.Array, weight: jax.Array, code: jax.Array) -> jax.Array:
            logits = self.logits(self._of_expression(x).mean)
            return (weight * (logits[:, code] - logits.mean(-1))).sum()

        def of_type(code: jax.Array) -> jax.Array:
            return jax.grad(logit)(x, share[:, code], code).sum(0)

        return jax.lax.map(of_type, jnp.arange(self.n_types)) * self.sd[...]

    # -- on the host ---------------------------------------------------------------------------------------------

    def start_from(self, counts: Any, labels: np.ndarray, library: np.ndarray | None = None) -> None:
        """Starts at logistic regression on all genes of the labelled cells, and the decoder at mean gene fractions.

        The first latent dimensions are the logits' principal components, the others those of the genes' expression.

        counts: (cells, genes) on the host, dense or sparse. labels: codes, outside 0..n_types-1 unlabelled.

        Raises:
            DataError: no cell is labelled.
        """
        counts = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, np.float32)
        library = counts.sum(1) if library is None else np.asarray(library)
        labels = np.asarray(labels).reshape(-1)
        self.vae.start_from(counts, library)
        rows = np.flatnonzero((labels >= 0) & (labels < self.n_types))
        if not len(rows):
            msg = "TypeClassifier: no cell is labelled; a classifier needs one label at least."
            raise DataError(msg)
        x = counts[rows] * (TOTAL / np.where(library > 0, library, 1.0)[rows, None]).astype(np.float32)
        x, y = np.log1p(x, out=x), labels[rows]
        center, sd, scale = standards(x, y, self.n_types)
        x -= center
        linear, axes = self._start(x, y, scale, sd)
        stored = (self.center, self.sd, self.scale, self.linear, self.cloud_axes, self.n_cells, self.temperature)
        found = (center, sd, scale, linear, axes, float(len(y)), fold_temperature(x, y, self.n_types))
        for variable, value in zip(stored, found, strict=True):
            _put(variable, value)
        encoder = self.vae.encoder.mean.kernel
        _put(encoder, NETWORK_AT_START * encoder[...])

    def finish_from(self, z: np.ndarray, labels: np.ndarray) -> None:
        """Finds the types' clouds in the latent space that was learned.

        z: latent means (cells, latent). labels: codes; unlabelled cells are not read.
        """
        labels = np.asarray(labels).reshape(-1)
        rows = np.flatnonzero((labels >= 0) & (labels < self.n_types))
        found = clouds(np.asarray(z, np.float64)[rows], labels[rows], self.n_types, np.asarray(self.cloud_axes[...]))
        for variable, value in zip((self.cloud_mean, self.cloud_precision, self.cloud_radius), found, strict=True):
            _put(variable, value)

    def _start(self, x: np.ndarray, y: np.ndarray, scale: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sets the heads; returns the linear path and its dimensions for the clouds."""
        width = self.linear[...].shape[1]
        told = x * scale
        fits = [ridge_classes(told, y, self.n_types, SLOPE_SD, link) for link in (_softmax, _sigmoid)]
        linear = _whitened(told, fits[0][0], width)
        n_first = linear.shape[1]
        # of genes as they vary: the directions that tell the known types apart are not those of another type
        # (pbmc3k, each type held out in turn: AUROC 0.87 by them, 0.85 by both, 0.60 by the largest probability)
        varied = np.where(scale > 0, 1.0 / np.sqrt(sd), 0.0).astype(np.float32)
        back = np.where(scale > 0, varied / np.where(scale > 0, scale, 1.0), 0.0)
        other = _principal_directions(x * varied, width - n_first) * back[:, None]
        linear = np.concatenate([linear, other], axis=1)
        axes = np.zeros(width)
        axes[n_first if other.shape[1] >= n_first else 0 : max(linear.shape[1], 1)] = 1.0
        linear = np.pad(linear, ((0, 0), (0, width - linear.shape[1])))
        z = told @ linear
        for head, (slopes, intercept) in zip((self.classifier, self.one_vs_rest), fits, strict=True):
            assert head.bias is not None
            _put(head.kernel, np.linalg.lstsq(z, told @ slopes, rcond=1e-6)[0])
            _put(head.bias, intercept)
        for variable, value in zip(
            (self.cloud_mean, self.cloud_precision, self.cloud_radius), clouds(z, y, self.n_types, axes), strict=True
        ):
            _put(variable, value)
        return linear, axes

    # -- parts -----------------------------------------------------------------------------------------------------

    def _posterior(self, counts: Counts, library: jax.Array | None) -> Gaussian:
        return self._of_expression(_log_expression(counts, library))

    def _of_expression(self, x: Float[Array, "cells genes"]) -> Gaussian:
        return self._parts(x)[0]

    def _parts(self, x: Float[Array, "cells genes"]) -> tuple[Gaussian, Float[Array, "cells latent"]]:
        """q(z | x) of log expression, and what the network adds to its mean."""
        q = self.vae.encode(jnp.expm1(x))  # which takes the logarithm again
        told = (x - self.center[...].astype(x.dtype)) * self.scale[...].astype(x.dtype)
        return Gaussian(q.mean + told @ self.linear[...].astype(x.dtype), q.logvar), q.mean


def _put(variable: Any, value: Any) -> None:
    variable.set_value(jnp.asarray(value, variable[...].dtype))


def standards(x: np.ndarray, labels: np.ndarray, n_types: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation (1 for a constant gene) and eta / sd of log expression x, (genes,) each.

    eta² = between-type / total variance, less what it is by chance, (types - 1) / cells; all scaled so that the mean
    squared length of a cell's (x - mean) eta / sd is 1.
    """
    cells = np.bincount(labels, minlength=n_types)
    center, variance = x.mean(0), x.var(0)
    variance = np.where(variance > CONSTANT, variance, 0.0)
    means = np.zeros((n_types, x.shape[1]))
    np.add.at(means, labels, x)
    means /= np.maximum(cells, 1)[:, None]
    between = (cells[:, None] * (means - center) ** 2).sum(0) / len(x)
    positive = np.where(variance > 0, variance, 1.0)
    chance = (np.count_nonzero(cells) - 1) / len(x)
    eta2 = np.where(variance > 0, np.clip(between / positive - chance, 0.0, 1.0), 0.0)
    if not eta2.any():  # one type, or cells that are all alike
        eta2 = (variance > 0).astype(float)
    scale = np.sqrt(eta2 / positive) / np.sqrt(max(eta2.sum(), 1e-12))
    return center.astype(np.float32), np.sqrt(positive).astype(np.float32), scale.astype(np.float32)


Link = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]


def ridge_classes(
    x: np.ndarray, labels: np.ndarray, n_types: int, sd: float, link: Link | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression whose slopes are N(0, sd²): slopes (features, types) and intercepts (types,).

    link: `_softmax`, one type out of all, or `_sigmoid`, every type against the rest.
    """
    truth = np.eye(n_types, dtype=x.dtype)[labels]
    shape = (x.shape[1] + 1, n_types)
    weigh = link or _softmax
    penalty = np.full((shape[0], 1), sd**-2.0)
    penalty[-1] *= 1e-2  # a type without cells has a finite intercept

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape).astype(x.dtype)
        value, residual = weigh(x @ weights[:-1] + weights[-1], truth)
        slope = np.concatenate([x.T @ residual, residual.sum(0)[None]]).astype(np.float64)
        slope += penalty * flat.reshape(shape)
        return value + 0.5 * float((penalty * flat.reshape(shape) ** 2).sum()), slope.ravel()

    found = minimize(loss, np.zeros(shape[0] * n_types), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    weights = found.x.reshape(shape)
    return weights[:-1], weights[-1]


def _softmax(logits: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
    """Summed cross entropy of one type out of all, and its derivative by the logits."""
    log_p = log_softmax(logits, axis=1)
    return -float((truth * log_p).sum(dtype=np.float64)), np.exp(log_p) - truth


def _sigmoid(logits: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
    """Summed cross entropy of every type against the rest, and its derivative by the logits."""
    loss = np.logaddexp(0.0, logits) - truth * logits
    return float(loss.sum(dtype=np.float64)), expit(logits) - truth


def fold_temperature(x: np.ndarray, labels: np.ndarray, n_types: int) -> float:
    """What to divide the logits of `ridge_classes` by, by cells that it was not given: a ridge is unsure of all.

    x: log expression (cells, genes). Genes are weighed anew in each of FOLDS folds. 1 where no type has cells for them.
    """
    rows = np.random.default_rng(0).permutation(len(x))[:FOLD_CELLS]
    rows = rows[np.argsort(labels[rows], kind="stable")]  # so that every fold has its share of every type
    rows = rows[np.bincount(labels[rows], minlength=n_types)[labels[rows]] >= FOLDS]
    if not len(rows):
        return 1.0
    fold = np.arange(len(rows)) % FOLDS
    logits = np.zeros((len(rows), n_types))
    for number in range(FOLDS):
        kept, out = x[rows[fold != number]], x[rows[fold == number]]
        y = labels[rows[fold != number]]
        center, _, scale = standards(kept, y, n_types)
        slopes, intercept = ridge_classes((kept - center) * scale, y, n_types, SLOPE_SD)
        logits[fold == number] = ((out - center) * scale) @ slopes + intercept
    truth = labels[rows]

    def loss(temperature: float) -> float:
        return -float(log_softmax(logits / temperature, axis=1)[np.arange(len(truth)), truth].sum())

    return best_temperature(loss)


def clouds(
    z: np.ndarray, labels: np.ndarray, n_types: int, axes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Means (types, latent), shared precision, and the squared distance that 99 % of the cells are within.

    axes: 1 for the dimensions that count, 0 for others, whose precision is 0.
    """
    cells = np.bincount(labels, minlength=n_types)
    means = np.zeros((n_types, z.shape[1]))
    np.add.at(means, labels, z)
    means /= np.maximum(cells, 1)[:, None]
    means[cells == 0] = z.mean(0)
    used = np.flatnonzero(np.ones(z.shape[1]) if axes is None else axes)
    away = (z - means[labels])[:, used]
    covariance = away.T @ away / len(z)
    covariance += EMPTY_CLOUD * max(float(z[:, used].var(0).mean()), 1e-6) * np.eye(len(used))
    precision = np.zeros((z.shape[1], z.shape[1]))
    precision[np.ix_(used, used)] = np.linalg.inv(covariance)
    squared = np.einsum("nd,de,ne->n", away, precision[np.ix_(used, used)], away)
    return means, precision, max(float(np.quantile(squared, USUAL)), 1e-6)


def _whitened(x: np.ndarray, slopes: np.ndarray, width: int) -> np.ndarray:
    """Directions (genes, at most width) along which x has variance 1 and that span the logits x @ slopes."""
    logits = x @ slopes
    logits = logits - logits.mean(0)
    _, sizes, rows = np.linalg.svd(logits, full_matrices=False)
    kept = np.flatnonzero(sizes > 1e-3 * max(sizes[0], 1e-12))[:width]
    directions: np.ndarray = slopes @ rows[kept].T / sizes[kept] * np.sqrt(len(x))
    return directions


def _principal_directions(x: np.ndarray, n: int) -> np.ndarray:
    """Principal directions (genes, at most n) of centred x, of unit variance."""
    from sklearn.utils.extmath import randomized_svd

    n = min(n, *x.shape)
    if n < 1:
        return np.zeros((x.shape[1], 0), x.dtype)
    _, sizes, rows = randomized_svd(x, n, n_iter=4, random_state=0)
    kept = sizes > 1e-3 * max(sizes[0], 1e-12)
    found: np.ndarray = rows[kept].T / sizes[kept] * np.sqrt(len(x))
    return found


def _library(counts: Counts, library: jax.Array | None) -> jax.Array:
    if library is not None:
        return library
    return counts.row_sums(counts.values) if isinstance(counts, SparseRows) else counts.sum(-1)


def _log_expression(counts: Counts, library: jax.Array | None) -> Float[Array, "cells genes"]:
    """log(1 + 1e4 counts / library); of an empty cell, zeros."""
    size = _library(counts, library)
    dense = counts.dense() if isinstance(counts, SparseRows) else counts
    return jnp.log1p(dense * (TOTAL / jnp.where(size > 0, size, 1.0))[:, None])
