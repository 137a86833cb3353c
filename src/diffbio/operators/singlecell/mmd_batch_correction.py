"""Batch correction by an autoencoder whose latent space looks the same in every batch (maximum mean discrepancy)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...math.mmd import mean_over_pairs, mmd2, mmd2_random_features, overlap_weights
from ...nn.batch_autoencoder import BatchAutoencoder, EqualBatches
from ..base import Config, Data, Operator, nonnegative, one_of, positive
from .batch_alignment import (
    OVERLAP_WIDTH,
    check_sizes,
    corrected_expression,
    example_cells,
    read_cells,
    start_from,
)

EXACT_UP_TO = 2048  # cells; the kernel of all pairs is then 16 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDBatchCorrectionConfig(Config):
    """Settings of `DifferentiableMMDBatchCorrection`.

    n_genes: width of `expression`: genes, principal components or another latent space.
    n_batches: number of batches; labels are 0 ... n_batches - 1.
    hidden_dim: width of the two hidden layers of encoder and decoder.
    latent_dim: width of the corrected space, at most n_genes.
    reconstruction: what `expression` holds and how its reconstruction is judged: 'expression' is log-normalised
        values or components by squared error; 'nb' (negative binomial) and 'poisson' are counts.
    mmd_weight: of the discrepancy of the batches against the reconstruction.
    displacement_weight: of the squared distance that cells are moved beyond the mean of their batch, as a share of
        the variance; larger values keep cells where they are, smaller ones allow stronger bending.
    overlap_floor: how much cells count that no cell of the other batch is near, as a share of the mean density; small
        values leave cell types alone that a batch lacks, large ones compare whole batches.
    kernel_bandwidth: squared distance in the latent space; None is the running median of that of two cells.
    kernel_scales: widths of the kernels in units of the bandwidth.
    n_frequencies: random Fourier features of `mmd_loss` where there are more than 2,048 cells.
    reference_batch: `corrected_expression` is decoded as of this batch; None is the mean over all batches.
    """

    n_genes: int = positive(2000)
    n_batches: int = positive(2)
    hidden_dim: int = positive(128)
    latent_dim: int = positive(15)
    reconstruction: str = one_of("expression", "nb", "poisson")
    mmd_weight: float = nonnegative(6.0)
    displacement_weight: float = nonnegative(2.0)
    overlap_floor: float = positive(0.1)
    kernel_bandwidth: float | None = positive(None)
    kernel_scales: tuple[float, ...] = positive((0.0625, 0.25, 1.0))
    n_frequencies: int = positive(512)
    reference_batch: int | None = nonnegative(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)


class MMDCorrected(TypedDict):
    """What `DifferentiableMMDBatchCorrection` adds."""

    corrected_expression: Float[Array, "cells genes"]  # decoded without the batch effect
    corrected_embeddings: Float[Array, "cells latent"]
    latent: Float[Array, "cells latent"]  # the same as corrected_embeddings
    mmd_loss: Float[Array, ""]  # MMD² of these cells, mean over pairs of batches; 0 on average if they are alike
    reconstruction_loss: Float[Array, ""]


class DifferentiableMMDBatchCorrection(Operator):
    """Encodes cells so that all batches have one distribution, by multi-kernel MMD, and decodes them without batch.

    An autoencoder told the batch, trained to reconstruct while MMD² between every pair of batches is small: the idea
    of Louizos et al. 2016 (variational fair autoencoder) and of trVAE (Lotfollahi et al. 2020), here without sampling
    and for any number of batches. Three additions keep cell types apart. It starts from principal components within
    batches, which networks only bend (see `BatchAutoencoder`). Moving a cell costs (`displacement_weight`), so that
    types go where the way is short. And a cell counts in a comparison by how much of the other batch is around
    it (`overlap_weights`), so a type that a batch lacks is not drawn into another.

    It cannot know which type of one batch is which of another where they are far apart after the means are taken off:
    types then pair up by distance. One batch alone is refused.

    Without training it gives the principal components within batches. `objective` weighs cells by overlap in train
    mode (that is, in `diffbio.fit`); in eval mode it compares whole batches, as `mmd_loss` does.
    """

    config: MMDBatchCorrectionConfig
    init_cells: ClassVar[int | None] = 20_000
    sampler_reads: ClassVar[tuple[str, ...]] = ("batch_labels",)
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 60,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "validation": 0.0,
        "patience": None,
    }

    def __init__(self, config: MMDBatchCorrectionConfig, *, rngs: nnx.Rngs) -> None:
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
        directions = jax.random.normal(rngs.params(), (config.latent_dim, config.n_frequencies))
        self.directions = nnx.BatchStat(directions)

    def __call__(self, expression: Float[Array, "cells genes"], batch_labels: Int[Array, " cells"]) -> MMDCorrected:
        """Encodes every cell by itself and decodes it without its batch.

        Raises:
            DataError: a label out of range, or values that are not finite (of counts, negative).
        """
        x, batch = read_cells(self, expression, batch_labels)
        z, _ = self.autoencoder.encode(x, batch)
        corrected = corrected_expression(self.autoencoder, x, z, self.config.reference_batch)
        return {
            "corrected_expression": corrected,
            "corrected_embeddings": z,
            "latent": z,
            "mmd_loss": self._mmd(z, batch),
            "reconstruction_loss": self.autoencoder.reconstruction_loss(x, z, batch),
        }

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Reconstruction + displacement_weight * displacement + mmd_weight * MMD².

        The bandwidth is a constant to the gradient: a running median, moved in train mode.
        """
        inputs = self._inputs(data)
        x, batch = read_cells(self, inputs["expression"], inputs["batch_labels"])
        z, moved = self.autoencoder.encode(x, batch)
        weights = None
        if self.training:
            self.autoencoder.follow(z)
            width = OVERLAP_WIDTH * self._bandwidth(z)
            weights = overlap_weights(z, batch, width=width, floor=self.config.overlap_floor)
        mmd = self._mmd(z, batch, weights)
        reconstruction = self.autoencoder.reconstruction_loss(x, z, batch)
        displacement = self.autoencoder.displacement(moved)
        loss = reconstruction + self.config.displacement_weight * displacement + self.config.mmd_weight * mmd
        return loss, {"reconstruction": reconstruction, "mmd": mmd, "displacement": displacement}

    def init_from(self, data: Data) -> None:
        """Takes means and principal components within batches, and the bandwidth, from data.

        Raises:
            DataError: bad values, fewer cells than latent dimensions, or a batch with fewer than 2 cells.
        """
        start_from(self, data)

    def sampler(self, data: Data) -> EqualBatches:
        """Minibatches with equal parts of all batches."""
        return EqualBatches(np.asarray(data["batch_labels"]))

    def _bandwidth(self, z: Array) -> Array:
        given = self.config.kernel_bandwidth
        return self.autoencoder.width[...].astype(z.dtype) if given is None else jnp.asarray(given, z.dtype)

    def _mmd(self, z: Array, batch: Array, weights: Array | None = None) -> Array:
        widths = self._bandwidth(z) * jnp.asarray(self.config.kernel_scales, z.dtype)
        if len(z) <= EXACT_UP_TO:
            return mean_over_pairs(mmd2(z, batch, widths=widths, weights=weights), batch)
        directions = self.directions[...].astype(z.dtype)
        found = mmd2_random_features(z, batch, directions=directions, widths=widths, weights=weights)
        return mean_over_pairs(found, batch)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableMMDBatchCorrection", Data]]:
        """Components of three batches as they are born."""
        config = MMDBatchCorrectionConfig(
            n_genes=6,
            n_batches=3,
            hidden_dim=8,
            latent_dim=3,
            kernel_bandwidth=4.0,
            n_frequencies=8,
            reference_batch=0,
        )
        return {"expression": (cls(config, rngs=nnx.Rngs(0)), example_cells())}
