"""Doublets by a classifier in the latent space of a count VAE (Solo)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError
from ...math.doublets import share_near
from ...math.sparse import SparseRows
from ...nn.count_vae import CountVAE, log_positive
from ...nn.scvi import SCVI
from ..base import Config, Data, Operator, checked_counts, fraction, one_of, positive

REFERENCE_POINTS = 20_000  # latent positions of cells and simulated doublets that are kept, at most
NEIGHBOR_TEMPERATURE = 0.25  # of the share of doublets among neighbours, as in the doublet scorer
HELD_OUT = 0.1  # of the reference, to decide when the classifier has learned enough
CLASSIFIER_EPOCHS, CLASSIFIER_PATIENCE = 60, 8
CLASSIFIER_BATCH, CLASSIFIER_RATE = 128, 1e-3
CLASSIFIER_SETTINGS = frozenset({"classifier_hidden_dim", "sim_doublet_ratio"})  # what does not come from the VAE


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoloDetectorConfig(Config):
    """Settings of `DifferentiableSoloDetector`.

    n_genes: width of the counts.
    latent_dim: width of the VAE's latent space.
    hidden_dims: widths of the VAE's encoder; its decoder has them in reverse.
    classifier_hidden_dim: width of the classifier's hidden layer.
    sim_doublet_ratio: simulated doublets for each cell.
    likelihood: of the counts: 'nb', 'zinb' or 'poisson'.
    dropout_rate: in the encoder, in training.
    """

    n_genes: int = positive(2000)
    latent_dim: int = positive(10)
    hidden_dims: tuple[int, ...] = positive((128,))
    classifier_hidden_dim: int = positive(128)
    sim_doublet_ratio: int = positive(2)
    likelihood: str = one_of("nb", "zinb", "poisson")
    dropout_rate: float = fraction(0.1)


class SoloDoublets(TypedDict):
    """What `DifferentiableSoloDetector` adds."""

    doublet_probabilities: Float[Array, " cells"]  # at even odds of a cell and a simulated doublet
    doublet_labels: Int[Array, " cells"]  # 1 where the probability is above 0.5
    latent: Float[Array, "cells latent"]


class DifferentiableSoloDetector(Operator):
    """Tells simulated doublets from cells by a network that reads the latent space of a count VAE.

    Solo (Bernstein et al. 2020, Cell Systems 11:95): a count VAE learns the cells; doublets are sums of the counts of
    two cells; a network with one hidden layer reads their latent means and log library sizes. A cell that it takes
    for simulated is a doublet. `diffbio.fit` does both: the VAE in minibatches, then, in `finish_from` with the encoder
    standing still, the classifier to convergence. Gradients flow from the probabilities to the counts and to the
    weights of encoder and classifier.

    Differences from Solo:
    - the classifier also reads the share of simulated doublets among the neighbours in the latent space, as in
      Scrublet. It needs up to 20,000 reference positions, which are stored with the weights.
    - the likelihood is negative binomial; with extra zeros (scVI's default) the latent space tells doublets apart less
      well (benchmarks/quality/doublets.py).
    - classes weigh the same in its loss, whatever `sim_doublet_ratio`: the probabilities are at even odds.
    - the second cell of a doublet is one of the 1,024 around the first in the data: shuffle cells that are sorted by
      type first (`pp.doublets` does).

    Train it on one experiment at a time: two cells that never were together do not meet in a droplet.
    """

    config: SoloDetectorConfig
    init_cells: ClassVar[int | None] = 4096
    sparse_keys = frozenset({"counts"})
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 60, "batch_size": 128, "learning_rate": 1e-3, "patience": 15,
    }
    schedules: ClassVar[Mapping[str, Any]] = {"kl_weight": lambda epoch: jnp.minimum(1.0, (epoch + 1) / 50)}
    encoder_given: bool = False  # the encoder is that of a fitted model, and stays as it is

    def __init__(self, config: SoloDetectorConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.vae = CountVAE(
            config.n_genes,
            config.latent_dim,
            hidden_dims=config.hidden_dims,
            likelihood=config.likelihood,
            dropout_rate=config.dropout_rate,
            rngs=rngs,
        )
        n_features = config.latent_dim + 2
        self.hidden = nnx.Linear(n_features, config.classifier_hidden_dim, rngs=rngs)
        self.output = nnx.Linear(config.classifier_hidden_dim, 1, rngs=rngs)
        self.center = nnx.BatchStat(jnp.zeros(n_features))
        self.scale = nnx.BatchStat(jnp.ones(n_features))
        self.reference = nnx.BatchStat(jnp.zeros((0, config.latent_dim)))
        self.reference_library = nnx.BatchStat(jnp.zeros(0))  # log library sizes
        self.reference_doublet = nnx.BatchStat(jnp.zeros(0))  # 1 for simulated doublets
        self.seed = nnx.BatchStat(jax.random.randint(rngs.params(), (), 0, 2**31 - 1))
        self.noise = rngs.noise.fork()

    @classmethod
    def from_scvi(cls, module: SCVI, *, rngs: nnx.Rngs, **settings: Any) -> "DifferentiableSoloDetector":
        """A detector with the encoder of a fitted `SCVI` (`model.module`); `diffbio.fit` trains the classifier alone.

        settings: those of the classifier, `classifier_hidden_dim` and `sim_doublet_ratio`; all others are the model's.

        Raises:
            ConfigError: the module is not trained (the running statistics of its encoder's norms are still those it
                is born with), the encoder reads covariates, or has other norms or inputs than SCVI's defaults; or a
                setting that is not the classifier's.
        """
        odd = sorted(set(settings) - CLASSIFIER_SETTINGS)
        if odd:
            msg = f"DifferentiableSoloDetector.from_scvi: {odd[0]} is the model's and cannot be chosen; settings are "
            msg += f"{' and '.join(sorted(CLASSIFIER_SETTINGS))}."
            raise ConfigError(msg)
        vae = module.vae
        widths = tuple(int(block.linear.out_features) for block in vae.encoder.network.blocks)
        config = SoloDetectorConfig(
            n_genes=module.n_input, latent_dim=module.n_latent, hidden_dims=widths, **settings
        )
        solo = cls(config, rngs=rngs)
        mine, theirs = nnx.state(solo.vae.encoder), nnx.state(vae.encoder)
        shapes = [{"/".join(map(str, k)): v.shape for k, v in nnx.to_flat_state(s)} for s in (mine, theirs)]
        if shapes[0] != shapes[1] or vae.encode_covariates or not vae.log_counts:
            msg = "DifferentiableSoloDetector.from_scvi: the encoder must be as SCVI's defaults make it: of log counts "
            msg += "alone, with batch norm."
            raise ConfigError(msg)
        if _as_born(vae.encoder):
            msg = "DifferentiableSoloDetector.from_scvi: the module is not trained: the running statistics of its "
            msg += "norms are as at the start; train it."
            raise ConfigError(msg)
        nnx.update(solo.vae.encoder, jax.tree.map(jnp.array, theirs))
        solo._keep_encoder()
        return solo

    def __call__(self, counts: Float[Array, "cells genes"]) -> SoloDoublets:
        """Encodes every cell and asks the classifier.

        Raises:
            DataError: negative or missing counts, where values are known (not under jit).
        """
        checked_counts("DifferentiableSoloDetector", counts)
        latent = self.vae.encode(counts).mean
        logit = self._logit(self._features(latent, log_positive(counts.sum(-1))))
        return {
            "doublet_probabilities": jax.nn.sigmoid(logit),
            "doublet_labels": (logit > 0).astype(jnp.int32),
            "latent": latent,
        }

    def objective(
        self, data: Data, *, kl_weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """-log p(counts | z) + kl_weight * KL(q(z | counts) || N(0, I)), mean over cells; the VAE's part of Solo.

        Of an encoder that was given, and stays as it is, the classifier's cross entropy on doublets in the batch.
        """
        counts = self._inputs(data)["counts"]
        if self.encoder_given:
            seen = self.positions({"counts": counts})
            own = self._logit(self._features(seen["latent"], seen["log_library"]))
            z, log_library = seen["doublet_latent"], seen["doublet_log_library"]
            simulated = self._logit(self._features(z.reshape(-1, z.shape[-1]), log_library.reshape(-1)))
            cross_entropy = (jax.nn.softplus(own).mean() + jax.nn.softplus(-simulated).mean()) / 2
            return cross_entropy, {"classification": cross_entropy}
        given = data["counts"] if isinstance(data["counts"], SparseRows) else counts
        reconstruction, kl = self.vae.loss(given, counts.sum(-1))
        return reconstruction + kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    def init_from(self, data: Data) -> None:
        """Starts the decoder at the mean gene fractions and their dispersion."""
        counts = np.asarray(data["counts"])
        if not self.encoder_given:
            self.vae.start_from(counts, counts.sum(-1))

    def positions(self, data: Data) -> dict[str, jax.Array]:
        """What the classifier is to learn from: latent mean and log library of each cell and of its doublets."""
        counts = self._inputs(data)["counts"]
        z, log_library = self._seen(counts)
        doublets = [self._seen(counts + jnp.roll(counts, shift, axis=0)) for shift in self._shifts(counts)]
        return {
            "latent": z,
            "log_library": log_library,
            "doublet_latent": jnp.stack([z for z, _ in doublets], 1),
            "doublet_log_library": jnp.stack([library for _, library in doublets], 1),
        }

    def finish_from(self, positions: dict[str, np.ndarray]) -> None:
        """Stores the reference and trains the classifier on it, by Adam with early stopping."""
        rng = np.random.default_rng(int(self.seed[...]))
        ratio = self.config.sim_doublet_ratio
        n = len(positions["latent"])
        rows = np.sort(rng.permutation(n)[: max(1, REFERENCE_POINTS // (1 + ratio))])
        latent = np.concatenate([positions["latent"][rows], *np.moveaxis(positions["doublet_latent"][rows], 1, 0)])
        library = np.concatenate([positions["log_library"][rows], *positions["doublet_log_library"][rows].T])
        doublet = np.repeat([0.0, 1.0], [len(rows), len(rows) * ratio]).astype(latent.dtype)
        self.reference.set_value(jnp.asarray(latent))
        self.reference_library.set_value(jnp.asarray(library))
        self.reference_doublet.set_value(jnp.asarray(doublet))
        self.center[...], self.scale[...] = jnp.zeros_like(self.center[...]), jnp.ones_like(self.scale[...])
        features = np.asarray(self._features(jnp.asarray(latent), jnp.asarray(library)))
        spread = features.std(0)
        self.center[...] = jnp.asarray(features.mean(0))
        self.scale[...] = jnp.asarray(np.where(spread > 0, spread, 1.0), features.dtype)
        standard = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)
        weights = np.where(doublet > 0, 1 / ratio, 1.0).astype(np.float32)
        start = tuple(parameter[...] for parameter in self._classifier())
        found = _train_classifier(start, standard.astype(np.float32), doublet.astype(np.float32), weights, rng)
        for parameter, value in zip(self._classifier(), found, strict=True):
            parameter.set_value(value)

    def reference_doublet_probabilities(self) -> np.ndarray:
        """Of the simulated doublets kept as a reference, as the classifier was trained on them."""
        features = jnp.concatenate([self.reference[...], self.reference_library[...][:, None]], axis=1)
        features = features[np.flatnonzero(np.asarray(self.reference_doublet[...]) > 0)]
        return np.asarray(jax.nn.sigmoid(self._logit(self._features(features[:, :-1], features[:, -1]))))

    def _seen(self, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Latent mean and log library, of the encoder in eval mode: as the classifier will see it."""
        encoder = nnx.view(self.vae.encoder, deterministic=True, use_running_average=True)
        return encoder(jnp.log1p(counts)).mean, log_positive(counts.sum(-1))

    def _features(self, latent: jax.Array, log_library: jax.Array) -> jax.Array:
        """Standardised input of the classifier: latent mean, log library, share of doublets among neighbours."""
        reference = jnp.asarray(self.reference[...], latent.dtype)
        ratio = self.config.sim_doublet_ratio
        if len(reference) < 3:  # before training
            share = jnp.full(latent.shape[0], ratio / (1 + ratio), latent.dtype)
        else:
            k = max(1, round(0.5 * np.sqrt(len(reference) / (1 + ratio)) * (1 + ratio)))
            is_doublet = jnp.asarray(self.reference_doublet[...], latent.dtype)
            share = share_near(latent, reference, is_doublet, k=k, temperature=NEIGHBOR_TEMPERATURE)
        features = jnp.concatenate([latent, log_library[:, None], share[:, None]], axis=1)
        return (features - self.center[...]) / self.scale[...]

    def _logit(self, features: jax.Array) -> jax.Array:
        return _classify(tuple(parameter[...] for parameter in self._classifier()), features)

    def _classifier(self) -> tuple[nnx.Param[Any], ...]:
        assert self.hidden.bias is not None
        assert self.output.bias is not None
        return self.hidden.kernel, self.hidden.bias, self.output.kernel, self.output.bias

    def _shifts(self, counts: jax.Array) -> list[jax.Array]:
        """How far a cell's partner stands from it in the batch, for each simulated doublet; never 0, if it can.

        Few cells come with the first of them again at the end (`chunks.in_chunks`), and are not to meet themselves:
        shifts that give the first cell a partner of its own counts are not taken either, if there are others.
        """
        n = len(counts)
        key = self.noise() if self.training else jax.random.key(self.seed[...])
        shifts = 1 + jax.random.permutation(key, max(n - 1, 1))
        alike = (counts == counts[0]).all(axis=1)[-shifts % n]
        shifts = shifts[jnp.argsort(alike, stable=True)]
        return list(shifts[jnp.arange(self.config.sim_doublet_ratio) % jnp.maximum((~alike).sum(), 1)])

    def _keep_encoder(self) -> None:
        self.encoder_given, self.held_in_fit = True, ("vae",)

    def _header(self) -> dict[str, Any]:
        return {"encoder_given": self.encoder_given}

    def _adapt(self, header: Mapping[str, Any]) -> None:
        if header.get("encoder_given"):
            self._keep_encoder()

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableSoloDetector", Data]]:
        """As it is born, and with a reference and a classifier that has learned from it."""
        keys = jax.random.split(jax.random.key(0), 2)
        rate = jnp.where(jax.random.bernoulli(keys[0], 0.5, (16, 1)), jnp.arange(1.0, 9.0), jnp.arange(8.0, 0.0, -1))
        data = {"counts": jax.random.poisson(keys[1], rate).astype(jnp.float32)}

        def op() -> DifferentiableSoloDetector:
            config = SoloDetectorConfig(n_genes=8, latent_dim=3, hidden_dims=(12,), classifier_hidden_dim=6)
            return cls(config, rngs=nnx.Rngs(0))

        taught = op()
        taught.finish_from({key: np.asarray(value) for key, value in taught.positions(data).items()})
        return {"untrained": (op(), data), "with a reference": (taught, data)}


def _as_born(encoder: nnx.Module) -> bool:
    """Whether no batch has moved the running means and variances of the encoder's norms."""
    norms = [part for _, part in nnx.iter_modules(encoder) if isinstance(part, nnx.BatchNorm)]
    return all(bool((norm.mean[...] == 0).all() and (norm.var[...] == 1).all()) for norm in norms)


Weights = tuple[jax.Array, ...]


def _classify(weights: Weights, features: jax.Array) -> jax.Array:
    kernel, bias, out, out_bias = (jnp.asarray(w, features.dtype) for w in weights)
    return (jax.nn.relu(features @ kernel + bias) @ out + out_bias)[:, 0]


def _train_classifier(
    start: Weights, features: np.ndarray, doublet: np.ndarray, weight: np.ndarray, rng: np.random.Generator
) -> Weights:
    """Adam on minibatches of weighted cross entropy, until the loss on held-out points no longer falls."""
    data = tuple(map(jnp.asarray, (features, doublet, weight)))
    order = rng.permutation(len(features))
    n_held = round(HELD_OUT * len(features))
    held, kept = jnp.asarray(order[:n_held]), order[n_held:]
    size = min(CLASSIFIER_BATCH, len(kept))
    moments = jax.tree.map(jnp.zeros_like, (start, start))
    state, best, least, since = (start, *moments, jnp.zeros(())), start, np.inf, 0
    for _ in range(CLASSIFIER_EPOCHS):
        batches = rng.permutation(kept)[: len(kept) // size * size].reshape(-1, size)
        state, loss = _classifier_epoch(state, data, jnp.asarray(batches), held if n_held else jnp.asarray(kept))
        if float(loss) < least:
            best, least, since = state[0], float(loss), 0
        else:
            since += 1
        if since >= CLASSIFIER_PATIENCE:
            break
    return best


@jax.jit
def _classifier_epoch(state: Any, data: Any, batches: jax.Array, held: jax.Array) -> tuple[Any, jax.Array]:
    """One pass of Adam (Kingma & Ba 2015), and the loss on held-out points."""

    def loss(weights: Weights, rows: jax.Array) -> jax.Array:
        features, doublet, weight = (x[rows] for x in data)
        logit = _classify(weights, features)
        return (weight * (jax.nn.softplus(logit) - doublet * logit)).sum() / weight.sum()

    def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
        weights, first, second, time = state
        grad, time = jax.grad(loss)(weights, rows), time + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grad)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grad)

        def moved(w: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return w - CLASSIFIER_RATE * (m / (1 - 0.9**time)) / (jnp.sqrt(v / (1 - 0.999**time)) + 1e-8)

        return (jax.tree.map(moved, weights, first, second), first, second, time), None

    state, _ = jax.lax.scan(step, state, batches)
    return state, loss(state[0], held)
