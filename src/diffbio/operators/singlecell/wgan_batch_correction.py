"""Batch correction by an autoencoder against a Wasserstein critic that tells the batches apart."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...math.mmd import overlap_weights
from ...nn.batch_autoencoder import BatchAutoencoder, EqualBatches
from ...nn.critic import Critic, separation
from ..base import Alternation, Config, Data, Operator, nonnegative, one_of, positive
from .batch_alignment import (
    OVERLAP_WIDTH,
    check_sizes,
    corrected_expression,
    example_cells,
    read_cells,
    start_from,
)

CRITIC_SCALE = 4.0  # in smaller units the layers of the critic are too straight to see single types
FIRST_MOMENT = 0.5  # of Adam: gradients of an adversary turn, a long memory makes both sides circle


@dataclasses.dataclass(frozen=True, kw_only=True)
class WGANBatchCorrectionConfig(Config):
    """Settings of `DifferentiableWGANBatchCorrection`.

    n_genes: width of `expression`: genes, principal components or another latent space.
    n_batches: number of batches; labels are 0 ... n_batches - 1.
    hidden_dim: width of the two hidden layers of encoder and decoder.
    latent_dim: width of the corrected space, at most n_genes.
    discriminator_hidden_dim: width of the two hidden layers of the critic.
    reconstruction: what `expression` holds and how its reconstruction is judged: 'expression' is log-normalised
        values or components by squared error; 'nb' (negative binomial) and 'poisson' are counts.
    adversarial_weight: of the separation of the batches by the critic against the reconstruction.
    gradient_penalty: weight of (|gradient of the critic| - 1)².
    n_critic: updates of the critic for every one of the encoder.
    displacement_weight: of the squared distance that cells are moved beyond the mean of their batch, as a share of
        the variance; larger values keep cells where they are, smaller ones allow stronger bending.
    overlap_floor: how much cells count that no cell of the other batch is near, as a share of the mean density; small
        values leave cell types alone that a batch lacks, large ones compare whole batches.
    reference_batch: `corrected_expression` is decoded as of this batch; None is the mean over all batches.
    """

    n_genes: int = positive(2000)
    n_batches: int = positive(2)
    hidden_dim: int = positive(128)
    latent_dim: int = positive(15)
    discriminator_hidden_dim: int = positive(128)
    reconstruction: str = one_of("expression", "nb", "poisson")
    adversarial_weight: float = nonnegative(0.12)
    gradient_penalty: float = nonnegative(10.0)
    n_critic: int = positive(3)
    displacement_weight: float = nonnegative(1.0)
    overlap_floor: float = positive(0.1)
    reference_batch: int | None = nonnegative(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)


class WGANCorrected(TypedDict):
    """What `DifferentiableWGANBatchCorrection` adds."""

    corrected_expression: Float[Array, "cells genes"]  # decoded without the batch effect
    corrected_embeddings: Float[Array, "cells latent"]
    latent: Float[Array, "cells latent"]  # the same as corrected_embeddings
    discriminator_scores: Float[Array, "cells batches"]  # of the critic: large where a cell looks like of the batch
    generator_loss: Float[Array, ""]  # how far the critic tells the batches apart: the encoder lowers it
    discriminator_loss: Float[Array, ""]  # minus that, plus the gradient penalty at the cells: the critic lowers it


class DifferentiableWGANBatchCorrection(Operator):
    """Encodes cells so that a Wasserstein critic cannot tell the batches apart, and decodes them without batch.

    An autoencoder told the batch against a critic with gradient penalty (WGAN-GP, Gulrajani et al. 2017) on the
    latent space; the critic has one score per batch, whose differences tell two batches apart. `diffbio.fit`
    alternates: `n_critic` updates of the critic (and of the decoder, which is no party to the game), one of the
    encoder. Cell types are kept apart as in `DifferentiableMMDBatchCorrection`: principal components within batches as
    the start, a price for moving a cell, and cells weighed by how much of the other batch is around them, for the
    critic and the encoder alike.

    `generator_loss` has the gradient that its name promises: with respect to the encoder it points towards
    more separation, so that descending mixes the batches. `objective` in train mode is the sum of what encoder
    and critic each lower, each with the other's part held constant, so its gradient is that of the game and not
    of its value. In eval mode it is what can be compared between epochs, reconstruction and displacement.

    As in every adversarial method, seeds differ more than with MMD, which is the one to try first.
    """

    config: WGANBatchCorrectionConfig
    init_cells: ClassVar[int | None] = 20_000
    sampler_reads: ClassVar[tuple[str, ...]] = ("batch_labels",)
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 40,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "validation": 0.0,
        "patience": None,
    }

    def __init__(self, config: WGANBatchCorrectionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.autoencoder = BatchAutoencoder(
            config.n_genes,
            n_batches=config.n_batches,
            hidden_dim=config.hidden_dim,
            latent_dim=config.latent_dim,
            likelihood=config.reconstruction,
            rngs=rngs,
        )
        self.critic = Critic(config.latent_dim, config.discriminator_hidden_dim, config.n_batches, rngs=rngs)
        self.noise = rngs.noise.fork()

    def __call__(self, expression: Float[Array, "cells genes"], batch_labels: Int[Array, " cells"]) -> WGANCorrected:
        """Encodes every cell by itself and decodes it without its batch.

        Raises:
            DataError: a label out of range, or values that are not finite (of counts, negative).
        """
        x, batch = read_cells(self, expression, batch_labels)
        z, _ = self.autoencoder.encode(x, batch)
        seen = self._seen(z)
        scores = self.critic(seen)
        apart = separation(scores, batch)
        others = (batch.sum(axis=1, keepdims=True) - batch) / max(self.config.n_batches - 1, 1)
        penalty = self.critic.steepness(seen, batch - others)
        return {
            "corrected_expression": corrected_expression(self.autoencoder, x, z, self.config.reference_batch),
            "corrected_embeddings": z,
            "latent": z,
            "discriminator_scores": scores,
            "generator_loss": apart,
            "discriminator_loss": self.config.gradient_penalty * penalty - apart,
        }

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """What encoder, decoder and critic lower (train mode), or the part that is comparable (eval mode).

        reconstruction + displacement_weight * displacement, and in train mode adversarial_weight * separation by
        the critic as it stands, and the critic's own loss on the latent space as it stands.
        """
        inputs = self._inputs(data)
        x, batch = read_cells(self, inputs["expression"], inputs["batch_labels"])
        config = self.config
        z, moved = self.autoencoder.encode(x, batch)
        reconstruction = self.autoencoder.reconstruction_loss(x, z, batch)
        displacement = self.autoencoder.displacement(moved)
        loss = reconstruction + config.displacement_weight * displacement
        metrics = {"reconstruction": reconstruction, "displacement": displacement}
        if not self.training:
            return loss, metrics
        self.autoencoder.follow(z)
        width = OVERLAP_WIDTH * self.autoencoder.width[...].astype(z.dtype)
        weights = overlap_weights(z, batch, width=width, floor=config.overlap_floor)
        seen = self._seen(z)
        generator = separation(self.critic.frozen()(seen), batch, weights)
        fixed = jax.lax.stop_gradient(seen)
        apart = separation(self.critic(fixed), batch, weights)
        penalty = self.critic.steepness(*self._between(fixed, batch))
        critic = config.gradient_penalty * penalty - apart
        metrics |= {"separation": apart, "penalty": penalty}
        return loss + config.adversarial_weight * generator + critic, metrics

    @property
    def alternation(self) -> Alternation:
        """How `diffbio.fit` trains: critic and decoder at every step, the encoder at every `n_critic`-th."""
        return Alternation(rare=("autoencoder/encoder",), every=self.config.n_critic, first_moment=FIRST_MOMENT)

    def init_from(self, data: Data) -> None:
        """Takes means and principal components within batches from data.

        Raises:
            DataError: bad values, fewer cells than latent dimensions, or a batch with fewer than 2 cells.
        """
        start_from(self, data)

    def sampler(self, data: Data) -> EqualBatches:
        """Minibatches with equal parts of all batches, `n_critic` for every one that the encoder learns from."""
        return EqualBatches(np.asarray(data["batch_labels"]), times=self.config.n_critic)

    def _seen(self, z: Array) -> Array:
        """The latent space as the critic sees it: two cells are about `CRITIC_SCALE` apart."""
        return CRITIC_SCALE * z / jnp.sqrt(self.autoencoder.width[...].astype(z.dtype))

    def _between(self, z: Array, batch: Array) -> tuple[Array, Array]:
        """A point between every cell and another one drawn at random, and the contrast of their batches."""
        order, share = jax.random.split(self.noise())
        other = jax.random.permutation(order, len(z))
        t = jax.random.uniform(share, (len(z), 1), z.dtype)
        return t * z + (1 - t) * z[other], batch - batch[other]

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableWGANBatchCorrection", Data]]:
        """Components of three batches as they are born."""
        config = WGANBatchCorrectionConfig(
            n_genes=6, n_batches=3, hidden_dim=8, latent_dim=3, discriminator_hidden_dim=5, reference_batch=0
        )
        return {"expression": (cls(config, rngs=nnx.Rngs(0)), example_cells())}
