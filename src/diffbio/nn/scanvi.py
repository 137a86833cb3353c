"""SCANVI (Xu et al. 2021) as a module: SCVI whose prior of z depends on a cell type, known for some cells.

c ~ Cat(y_prior), u ~ N(0, I), z ~ N(f_mean(u, c), f_var(u, c)), counts given z as in SCVI; and
q(z, u, c | x) = q(z | x) q(c | z) q(u | z, c).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..errors import ConfigError
from ..math.distributions import gaussian_kl
from .class_fit import LinearClasses, fit_classes
from .count_vae import Encoder, Gaussian
from .mlp import MLP
from .scvi import COVARIATES, SCVI, Counts, Drawn, draw_from, forward_arguments, one_hot, two_keys, widths

LOG_2PI = 1.8378770664093453
NORMS = {"batch_norm": "both", "layer_norm": "none"}  # where SCVI has them
UNKNOWN_WEIGHT = 1e-6  # a row of label weights that sums to less than this is an unlabelled cell


class Constant(nnx.Variable[jax.Array]):
    """An array that is saved and not trained by gradients."""


class Classifier(nnx.Module):
    """Logits of the classes from a latent position.

    n_layers: hidden layers; 0 is a linear classifier.
    batch_norm, layer_norm: of the hidden layers.
    n_batch: with more than 0, every batch adds an intercept and slopes of its own, 0 at first.
    """

    def __init__(
        self,
        n_input: int,
        n_classes: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        n_batch: int = 0,
        batch_norm: bool = True,
        layer_norm: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.network = MLP(
            n_input, (n_hidden,) * n_layers, dropout_rate=dropout_rate,
            batch_norm=batch_norm, layer_norm=layer_norm, rngs=rngs,
        )
        self.logits = nnx.Linear(self.network.n_outputs, n_classes, rngs=rngs)
        self.by_batch = nnx.data(nnx.Param(jnp.zeros((n_batch, n_input + 1, n_classes))) if n_batch else None)

    def __call__(
        self, z: Float[Array, "cells latent"], batch: Float[Array, "cells batches"] | None = None
    ) -> Float[Array, "cells classes"]:
        """Unnormalised log probabilities; batch: one-hot, None and rows of 0 are of no known batch."""
        logits = self.logits(self.network(z))
        if self.by_batch is None or batch is None:
            return logits
        own = jnp.asarray(self.by_batch[...], z.dtype)
        return logits + jnp.einsum("ns,nd,sdk->nk", batch, z, own[:, :-1]) + batch @ own[:, -1]


class Bound(NamedTuple):
    """Parts of the negative evidence bound of every cell (cells,), in nats; their sum is the bound."""

    reconstruction: jax.Array  # -log p(x | z)
    position: jax.Array  # log q(z | x) - E log p(z | u, c)
    kl: jax.Array  # KL(q(u | z, c) || N(0, I)) and what is paid for c


class SCANVI(SCVI):
    """SCVI with a cell type above z, trained on labelled and unlabelled cells together. Born in eval mode.

    Arguments as of `SCVI`, and:
    n_labels: number of cell types; 0 and 1 mean one: z then has a learned prior that all cells share.
    y_prior: their prior probabilities, (n_labels,) or (1, n_labels); None is uniform.
    labels_groups: for each label the number of its group, 0 to the largest without a gap.
    use_labels_groups: q(c | z) = q(group | z) q(c | group, z), with a classifier of the groups.
    classifier_parameters: n_hidden, n_layers (0: linear), dropout_rate of the classifier, where they differ;
        by_batch: q(c | z, batch) in place of q(c | z), see `Classifier` (False).

    Raises:
        ConfigError: an argument is out of range, or they contradict each other.
    """

    def __init__(
        self,
        n_input: int,
        n_batch: int = 0,
        n_labels: int = 0,
        n_hidden: int | Sequence[int] = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        log_variational: bool = True,  # noqa: FBT001, FBT002 - the published signature
        reconstruction_loss: str = "zinb",
        y_prior: Any = None,
        labels_groups: Sequence[int] | None = None,
        use_labels_groups: bool = False,  # noqa: FBT001, FBT002 - the published signature
        classifier_parameters: Mapping[str, Any] | None = None,
        *,
        rngs: nnx.Rngs,
        **covariates: Any,
    ) -> None:
        super().__init__(
            n_input, n_batch, n_labels, n_hidden, n_latent, n_layers, dropout_rate, dispersion, log_variational,
            reconstruction_loss, rngs=rngs, **covariates,
        )
        self.n_labels = n_labels = max(n_labels, 1)
        groups = _checked_groups(labels_groups, n_labels, use_labels_groups)
        self.labels_groups, self.use_labels_groups = groups, use_labels_groups
        self.log_y_prior = Constant(_log_prior(y_prior, n_labels))
        # divides the logits when classes are predicted; set on held-out labelled cells to calibrate
        self.temperature = Constant(jnp.ones(()))
        norms = {key: covariates.get(f"use_{key}", default) for key, default in NORMS.items()}
        of_encoder, of_decoder = (
            {key: where in {part, "both"} for key, where in norms.items()} for part in ("encoder", "decoder")
        )
        hidden = widths(n_hidden, n_layers)
        settings: dict[str, Any] = {
            "n_hidden": hidden[-1], "n_layers": len(hidden), "dropout_rate": dropout_rate, "by_batch": False
        }
        if odd := set(classifier_parameters or {}) - set(settings):
            msg = f"SCANVI: unknown classifier_parameters {sorted(odd)}; known are {', '.join(settings)}."
            raise ConfigError(msg)
        settings |= dict(classifier_parameters or {})
        settings["n_batch"] = self.n_batch if settings.pop("by_batch") else 0
        self.classifier = Classifier(n_latent, n_labels, rngs=rngs, **settings, **of_encoder)
        n_groups = max(groups) + 1 if groups else 0
        self.classifier_groups = nnx.data(
            Classifier(n_latent, n_groups, rngs=rngs, **settings, **of_encoder) if use_labels_groups else None
        )
        self.encoder_z2_z1 = Encoder(
            n_latent, n_latent, hidden_dims=hidden, n_covariates=n_labels, dropout_rate=dropout_rate, rngs=rngs,
            **of_encoder,
        )
        self.decoder_z1_z2 = Encoder(
            n_latent, n_latent, hidden_dims=hidden, n_covariates=n_labels, least_variance=0.0, rngs=rngs, **of_decoder
        )

    # -- the published interface -------------------------------------------------------------------------------

    def classify(
        self,
        x: Counts,
        *,
        batch_index: Array | None = None,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
    ) -> Float[Array, "cells labels"]:
        """Probabilities of the cell types from the mean of q(z | x): q(c | z) at the module's temperature.

        Covariates are read by models with encode_covariates alone, batch_index by a classifier with by_batch, too.
        """
        needed = self.vae.encode_covariates
        known = self.covariates(batch_index, None, cat_covs, cont_covs, None, needed=needed)
        z = self.vae.encode(x, known.injected, known.continuous).mean
        return jnp.exp(self.log_class_probabilities(z, self.temperature[...], batch_index))

    def get_latents_u(
        self,
        x: Counts,
        y: Array | None = None,
        *,
        batch_index: Array | None = None,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
    ) -> Float[Array, "cells latent"]:
        """The state u of every cell within its type: a draw of q(u | z, c) in train mode, the mean in eval mode.

        y: the types c; None takes the likeliest of every cell.
        Covariates are read by models with encode_covariates alone, batch_index by a classifier with by_batch, too.
        """
        z = self.get_latents(x, batch_index=batch_index, cat_covs=cat_covs, cont_covs=cont_covs)[0]
        if y is None:
            y = jnp.argmax(self.log_class_probabilities(z, 1.0, batch_index), -1)
        label = one_hot(y, self.n_labels, who="SCANVI", name="y")
        return draw_from(self.vae, self.encoder_z2_z1(z, label), None)

    def forward(
        self,
        x: Counts,
        local_l_mean: Float[Array, "..."] | None = None,
        local_l_var: Float[Array, "..."] | None = None,
        batch_index: Array | None = None,
        y: Array | None = None,
        *,
        cat_covs: Int[Array, "cells categorical"] | None = None,
        cont_covs: Float[Array, "cells continuous"] | None = None,
        size_factor: Float[Array, "cells"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Negative evidence bound of every cell in three parts, (cells,) each, in nats, by one draw.

        The first holds -log p(x | z) and log q(z | x) - E log p(z | u, c), the second the KL divergences of u
        and of the log library and what is paid for c, the third is 0.

        y: cell types; a cell whose code is outside 0..n_labels-1 (or whose row of weights is 0) is unlabelled,
            and c is summed over. None: all are.
        The other arguments are those of `SCVI.forward`.
        """
        arguments = (batch_index, y, cat_covs, cont_covs, size_factor)
        bound, drawn, _ = self.bound(x, arguments, key)
        kl_library = self.kl_library(drawn, local_l_mean, local_l_var)
        zero = jnp.zeros_like(bound.kl)
        return bound.reconstruction + bound.position, bound.kl + kl_library, zero

    # -- what training and the AnnData models call ---------------------------------------------------------------

    def objective(
        self,
        data: Mapping[str, Any],
        *,
        kl_weight: jax.Array | float = 1.0,
        classification_weight: jax.Array | float = 50.0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The negative bound (KL terms weighted) and classification_weight * cross entropy of labelled cells.

        data: as for SCVI, with `labels` (n_labels, or any code outside, for an unlabelled cell). The cross
        entropy, of the classifier at the mean of q(z | x), is over `labelled_counts`, `labelled_labels` (and
        `labelled_...` covariates) where these are given, else over the labelled cells of the batch.
        """
        found = forward_arguments(data)
        prior = {name: found.pop(name, None) for name in ("local_l_mean", "local_l_var")}
        given = tuple(found.get(name) for name in COVARIATES)
        bound, drawn, known_weight = self.bound(data["counts"], given, None, mean=True)
        kl_library = self.kl_library(drawn, prior["local_l_mean"], prior["local_l_var"])
        if "labelled_counts" in data:
            own = {k.removeprefix("labelled_"): v for k, v in data.items() if k.startswith("labelled_")}
            arguments = forward_arguments(own)
            batch_index = arguments.get("batch_index")
            label = one_hot(own["labels"], self.n_labels, who="SCANVI", name="labels")
            extra = (arguments.get("cat_covs"), arguments.get("cont_covs"))
            known = self.covariates(batch_index, None, *extra, None, needed=self.vae.encode_covariates)
            mean, weight = self.vae.encode(own["counts"], known.injected, known.continuous).mean, label.sum(-1)
        else:
            label, weight, mean = self._labels(given[1], bound.kl.shape[0]), known_weight, drawn.q.mean
            batch_index = given[0]
        log_class = self.log_class_probabilities(mean, 1.0, batch_index)
        n_labelled = jnp.maximum(weight.sum(), 1.0)
        cross_entropy = -(label * log_class).sum() / n_labelled
        right = (jnp.argmax(log_class, -1) == jnp.argmax(label, -1)) * weight
        metrics = {
            "reconstruction": bound.reconstruction.mean(),
            "kl": (bound.position + bound.kl + kl_library).mean(),
            "classification": cross_entropy,
            "accuracy": right.sum() / n_labelled,
        }
        loss = (bound.reconstruction + bound.position + kl_weight * (bound.kl + kl_library)).mean()
        return loss + classification_weight * cross_entropy, metrics

    sparse_keys = frozenset({"counts", "labelled_counts"})

    def bound(
        self, x: Counts, arguments: tuple[Array | None, ...], key: jax.Array | None, *, mean: bool = False
    ) -> tuple[Bound, Drawn, Float[Array, "cells"]]:
        """The negative evidence bound of every cell, the draw it was taken at, and 1 for labelled cells.

        For a labelled cell every term is that of its type, and -log y_prior of it is paid; otherwise terms are
        averaged with q(c | z), and KL(q(c | z) || y_prior) is paid. With a dispersion by type, log p(x | z, c) is
        one of these terms: the counts have the likelihood of every type in turn.
        arguments: (batch_index, y, cat_covs, cont_covs, size_factor), as of `forward`.
        mean: -log p(x | z) is the mean over cells, which costs less where counts come in blocks.
        """
        for_z, for_u = two_keys(key)
        batch_index, y, cat_covs, cont_covs, size_factor = arguments
        known = self.covariates(batch_index, y, cat_covs, cont_covs, size_factor)
        drawn = self.draw(x, known, for_z)
        label = self._labels(y, drawn.z.shape[0])
        is_labelled = (label.sum(-1) > UNKNOWN_WEIGHT).astype(label.dtype)
        log_q = self.log_class_probabilities(drawn.z, 1.0, batch_index)
        q = jnp.where(is_labelled[:, None] > 0, label, jnp.exp(log_q))
        if self.dispersion == "gene-label":
            log_px = (q * self.log_prob_of_types(x, drawn, known)).sum(-1)
            log_px = log_px.mean() if mean else log_px
        elif mean:
            log_px = self.mean_log_prob(x, drawn, known)
        else:
            log_px = self.log_prob(x, self.decode(drawn, known))
        log_pz, kl_u = self.class_terms(drawn.z, for_u)
        entropy = (1.0 - is_labelled) * (jnp.exp(log_q) * log_q).sum(-1)
        bound = Bound(
            reconstruction=-log_px,
            position=_log_normal(drawn.z, drawn.q) - (q * log_pz).sum(-1),
            kl=(q * (kl_u - self.log_y_prior[...])).sum(-1) + entropy,
        )
        return bound, drawn, is_labelled

    def class_terms(
        self, z: Float[Array, "cells latent"], key: jax.Array | None
    ) -> tuple[Float[Array, "cells labels"], Float[Array, "cells labels"]]:
        """For every type: log p(z | u, c) at a draw of u, and KL(q(u | z, c) || N(0, I))."""
        cells, n = z.shape[0], self.n_labels
        z_wide = jnp.repeat(z, n, axis=0)
        label = jnp.tile(jnp.eye(n, dtype=z.dtype), (cells, 1))
        q = self.encoder_z2_z1(z_wide, label)
        p = self.decoder_z1_z2(draw_from(self.vae, q, key), label)
        return _log_normal(z_wide, p).reshape(cells, n), gaussian_kl(*q).reshape(cells, n)

    def log_class_probabilities(
        self,
        z: Float[Array, "cells latent"],
        temperature: jax.Array | float = 1.0,
        batch_index: Array | None = None,
    ) -> Float[Array, "cells labels"]:
        """Log q(c | z), with by_batch log q(c | z, batch); with groups, the types of a group share its probability."""
        batch = None
        if self.classifier.by_batch is not None and batch_index is not None:
            batch = one_hot(batch_index, self.n_batch, who="SCANVI", name="batch_index")
        logits = self.classifier(z, batch) / temperature
        if self.classifier_groups is None:
            return jax.nn.log_softmax(logits)
        group = jnp.asarray(self.labels_groups)
        log_group = jax.nn.log_softmax(self.classifier_groups(z, batch) / temperature)
        same = jax.nn.one_hot(group, log_group.shape[-1], dtype=bool)  # (labels, groups)
        in_group = jax.nn.logsumexp(jnp.where(same.T[None], logits[:, None, :], -jnp.inf), axis=-1)
        return logits - in_group[:, group] + log_group[:, group]

    def fit_classifier(
        self, z: np.ndarray, labels: np.ndarray, batch_labels: np.ndarray | None = None
    ) -> LinearClasses:
        """Sets a linear classifier to what `class_fit.fit_classes` finds, on the host; its temperature is 1.

        z: means of q(z | x) of all cells, labelled and not. labels: codes; outside 0..n_labels-1: unlabelled.
        batch_labels: codes of all cells, read with by_batch.

        Raises:
            ConfigError: the classifier has hidden layers or groups.
            DataError: no cell is labelled.
        """
        if self.classifier.network.blocks or self.classifier_groups is not None:
            msg = "SCANVI: fit_classifier needs a linear classifier (classifier_parameters n_layers=0) without groups."
            raise ConfigError(msg)
        own = self.classifier.by_batch
        n_batch = 0 if own is None or batch_labels is None else self.n_batch
        found = fit_classes(z, labels, self.n_labels, batch_labels, n_batch)
        starts: list[tuple[Any, np.ndarray]] = [
            (self.classifier.logits.kernel, found.kernel), (self.classifier.logits.bias, found.bias)
        ]
        if own is not None and n_batch:
            starts.append((own, found.by_batch))
        for param, value in starts:
            param.set_value(jnp.asarray(value, param[...].dtype))
        self.temperature.set_value(jnp.ones(()))
        return found

    def _labels(self, y: Array | None, cells: int) -> Float[Array, "cells labels"]:
        if y is None:
            return jnp.zeros((cells, self.n_labels))
        return one_hot(y, self.n_labels, who="SCANVI", name="y")


def _log_normal(z: jax.Array, p: Gaussian) -> Float[Array, "cells"]:
    return -0.5 * ((z - p.mean) ** 2 * jnp.exp(-p.logvar) + p.logvar + LOG_2PI).sum(-1)


def _log_prior(y_prior: Any, n_labels: int) -> jax.Array:
    if y_prior is None:
        return jnp.full((n_labels,), -jnp.log(float(n_labels)))
    prior = jnp.asarray(y_prior, float).reshape(-1)
    if prior.shape != (n_labels,) or not bool((prior > 0).all()) or abs(float(prior.sum()) - 1) > 1e-3:
        msg = f"SCANVI: y_prior must be {n_labels} probabilities above 0 that sum to 1, got {y_prior!r}."
        raise ConfigError(msg)
    return jnp.log(prior / prior.sum())


def _checked_groups(
    labels_groups: Sequence[int] | None,
    n_labels: int,
    use: bool,  # noqa: FBT001
) -> tuple[int, ...] | None:
    if labels_groups is None:
        if use:
            msg = "SCANVI: use_labels_groups needs labels_groups: the number of its group for each label."
            raise ConfigError(msg)
        return None
    groups = tuple(int(g) for g in labels_groups)
    if len(groups) != n_labels or sorted(set(groups)) != list(range(max(groups) + 1)):
        msg = f"SCANVI: labels_groups must hold {n_labels} group numbers from 0 without a gap, got {groups}."
        raise ConfigError(msg)
    return groups
