"""The three models behind `DifferentiableCellAnnotator`: what each answers, minimises, and starts from.

Every mode is a module with `answer(cells) -> Answer`, `loss(cells, counts, labels, kl_weight)` and
`start_from(data, labels)`; `cells` are the operator's checked inputs.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import DataError, MissingKeyError
from ...math.sparse import SparseRows
from ...nn.cellassign import CellAssign
from ...nn.count_vae import CountVAE
from ...nn.scanvi import SCANVI, Constant
from ...nn.type_classifier import TypeClassifier

if TYPE_CHECKING:
    from .cell_annotation import CellAnnotatorConfig

WHO = "DifferentiableCellAnnotator"
UNLABELLED = -1
USUAL = 0.99  # of the cells of training

Cells = Mapping[str, jax.Array]
Loss = tuple[jax.Array, dict[str, jax.Array]]
Counts = Float[Array, "cells genes"] | SparseRows


class Answer(NamedTuple):
    """Of every cell."""

    log_probabilities: Float[Array, "cells types"]
    latent: Float[Array, "cells latent"]


class Mode(nnx.Module):
    """What the three have in common."""

    kl_warmup: ClassVar[float] = 20.0  # epochs
    takes_sparse: ClassVar[bool] = True  # counts
    held_in_fit: ClassVar[tuple[str, ...]] = ()  # parameters whose start is their optimum

    if TYPE_CHECKING:
        answer: Callable[[Cells], Answer]  # each mode has its own

    def positions(self, cells: Cells, labels: Int[Array, "cells"]) -> Cells:
        """What `finish_from` needs of every cell, one row each."""
        found = {"latent": self.answer(cells).latent, "labels": labels}
        return found | ({"batch_labels": cells["batch_labels"]} if "batch_labels" in cells else {})

    def sureness(self, cells: Cells, answer: Answer) -> Cells:
        """How sure the answer is: the probability of the likeliest type."""
        return {"confidence": jnp.exp(answer.log_probabilities).max(-1)}


class Celltypist(Mode):
    """A classifier on the latent space of a count VAE, trained with the cells whose type is known."""

    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 30, "batch_size": 128, "learning_rate": 1e-3, "patience": 10
    }

    # logistic regression, convex; moved along with the VAE it calls cells of another chemistry worse: accuracy 0.767 on
    # average of 9 fine types, where it has 0.771 (pbmc_three_chemistries); within a data set it makes no difference
    held_in_fit = ("classifier/linear", "classifier/classifier", "classifier/one_vs_rest")

    def __init__(self, config: "CellAnnotatorConfig", *, rngs: nnx.Rngs) -> None:
        self.classifier = TypeClassifier(
            config.n_genes, config.n_cell_types, latent_dim=config.latent_dim, hidden_dims=tuple(config.hidden_dims),
            likelihood=config.gene_likelihood, rngs=rngs,
        )

    def answer(self, cells: Cells) -> Answer:
        """By the classifier at the latent position."""
        z = self.classifier.latent(cells["counts"], cells["library_size"])
        return Answer(self.classifier.log_probabilities(z), z)

    def sureness(self, cells: Cells, answer: Answer) -> Cells:
        """How usual the cell is for its nearest type; which type it is may be unsure even so: see the probabilities."""
        z = answer.latent
        return {"confidence": self.classifier.confidence(z), "independent": self.classifier.multi_label(z)}

    def loss(self, cells: Cells, counts: Counts, labels: Int[Array, "cells"], kl_weight: jax.Array | float) -> Loss:
        """The negative ELBO of all cells and the cross entropy of the labelled ones."""
        return self.classifier.loss(counts, labels, kl_weight=kl_weight, library=cells["library_size"])

    def start_from(self, data: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Starts at a linear classifier of the labelled cells, found on the host."""
        if not (labels >= 0).any():
            msg = f"{WHO}: no cell is labelled; pass data['labels'], or known_labels with label_indices."
            raise DataError(msg)
        self.classifier.start_from(data["counts"], labels, data["library_size"])

    def finish_from(self, found: Mapping[str, np.ndarray]) -> None:
        """Finds where the types' cells lie in the latent space that was learned."""
        self.classifier.finish_from(found["latent"], found["labels"])


class Cellassign(Mode):
    """CellAssign (Zhang et al. 2019) for the types, and beside it a count VAE for the latent space."""

    # its start is near the optimum already; the epochs are for the VAE, whose latent space is that of few genes
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "patience": 20
    }
    takes_sparse = False

    def __init__(self, config: "CellAnnotatorConfig", *, rngs: nnx.Rngs) -> None:
        self.model = CellAssign(
            config.n_genes, config.n_cell_types, n_covariates=config.n_covariates, likelihood=config.gene_likelihood,
            rngs=rngs,
        )
        self.vae = CountVAE(
            config.n_genes, config.latent_dim, hidden_dims=tuple(config.hidden_dims), likelihood=config.gene_likelihood,
            rngs=rngs,
        )
        # of the cells it was fitted to: a cell's size factor does not depend on the others it comes with
        self.mean_library = Constant(jnp.ones(()))
        self.n_cells = Constant(jnp.ones(()))
        self.usual = Constant(jnp.ones(()))  # surprise that 99 % of them are below
        shape = config.marker_matrix_shape
        self.marker_matrix = nnx.data(None if shape is None else Constant(jnp.zeros(shape)))

    def answer(self, cells: Cells) -> Answer:
        """By the posterior of the types."""
        known = self._known(cells)
        return Answer(self.model.log_probabilities(cells["counts"], *known), self._latent(cells))

    def sureness(self, cells: Cells, answer: Answer) -> Cells:
        """The probability of the likeliest type, times how usual the cell would be for it: 1 / (1 + (x / x99)^4).

        x is the mean squared residual of its counts, x99 that which 99 % of the cells of training are below.
        """
        typical = 1.0 / (1.0 + (self.surprise(cells, answer) / self.usual[...]) ** 4)
        return {"confidence": jnp.exp(answer.log_probabilities).max(-1) * typical}

    def surprise(self, cells: Cells, answer: Answer) -> Float[Array, "cells"]:
        """Of every cell under its likeliest type."""
        called = jnp.argmax(answer.log_probabilities, -1)[:, None]
        return jnp.take_along_axis(self.model.surprise(cells["counts"], *self._known(cells)), called, 1)[:, 0]

    def positions(self, cells: Cells, labels: Int[Array, "cells"]) -> Cells:
        """What `finish_from` needs."""
        return {"surprise": self.surprise(cells, self.answer(cells))}

    def finish_from(self, found: Mapping[str, np.ndarray]) -> None:
        """Notes how surprising the cells of training are."""
        usual = max(float(np.quantile(found["surprise"], USUAL)), 1e-3)
        self.usual.set_value(jnp.asarray(usual, self.usual[...].dtype))

    def loss(self, cells: Cells, counts: Counts, labels: Int[Array, "cells"], kl_weight: jax.Array | float) -> Loss:
        """The negative log likelihood of CellAssign with its priors, and the negative ELBO of the VAE."""
        loss, metrics = self.model.loss(cells["counts"], *self._known(cells), n_cells=self.n_cells[...])
        reconstruction, kl = self.vae.loss(cells["counts"], cells["library_size"])
        return loss + reconstruction + kl_weight * kl, {**metrics, "reconstruction": reconstruction, "kl": kl}

    def start_from(self, data: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Starts at types called by the mean of their markers."""
        counts, library = data["counts"], data["library_size"]
        mean = max(float(library.mean()), 1e-6)
        self.mean_library.set_value(jnp.asarray(mean, self.mean_library[...].dtype))
        self.n_cells.set_value(jnp.asarray(float(len(counts)), self.n_cells[...].dtype))
        markers = self._markers(data)
        if self.marker_matrix is not None:
            self.marker_matrix.set_value(jnp.asarray(markers, self.marker_matrix[...].dtype))
        size = np.where(library > 0, library, mean) / mean
        self.model.start_from(counts, np.asarray(markers), size, data.get("covariates"))
        self.vae.start_from(counts, library)

    def _latent(self, cells: Cells) -> jax.Array:
        return self.vae.sample(self.vae.encode(cells["counts"]))

    def _known(self, cells: Cells) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Marker matrix, size factors and covariates."""
        library, mean = cells["library_size"], self.mean_library[...]
        size = jnp.where(library > 0, library, mean) / mean
        return jnp.asarray(self._markers(cells)), size, cells.get("covariates")

    def _markers(self, cells: Mapping[str, Any]) -> Any:
        if (found := cells.get("marker_matrix")) is not None:
            return found
        if self.marker_matrix is None:
            msg = (
                f"{WHO}: mode 'cellassign' needs data['marker_matrix'], (cell_types, genes); with "
                "marker_matrix_shape in its config it keeps the one that it was fitted with."
            )
            raise MissingKeyError(msg)
        return self.marker_matrix[...]


class Scanvi(Mode):
    """SCANVI (Xu et al. 2021), the module of `diffbio.nn.scanvi`."""

    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 200, "batch_size": 128, "learning_rate": 5e-3, "patience": 20
    }
    kl_warmup = 10.0

    def __init__(self, config: "CellAnnotatorConfig", *, rngs: nnx.Rngs) -> None:
        self.n_batches = config.n_batches
        self.model = SCANVI(
            config.n_genes, config.n_batches, config.n_cell_types, tuple(config.hidden_dims), config.latent_dim,
            reconstruction_loss=config.gene_likelihood, use_observed_lib_size=True,
            classifier_parameters={"n_layers": 0, "by_batch": config.n_batches > 1}, rngs=rngs,
        )

    def answer(self, cells: Cells) -> Answer:
        """By q(c | z, batch)."""
        z = self.model.get_latents(cells["counts"])[0]
        return Answer(self.of_latent(z, cells.get("batch_labels")), z)

    def of_latent(self, z: Float[Array, "cells latent"], batch: Int[Array, "cells"] | None) -> jax.Array:
        """Log q(c | z, batch)."""
        return self.model.log_class_probabilities(z, self.model.temperature[...], batch)

    def loss(self, cells: Cells, counts: Counts, labels: Int[Array, "cells"], kl_weight: jax.Array | float) -> Loss:
        """SCANVI's bound and the cross entropy of labelled cells."""
        data = {"counts": counts, "labels": labels, "batch_labels": cells.get("batch_labels")}
        if self.n_batches > 1 and data["batch_labels"] is None:
            msg = f"{WHO}: n_batches is {self.n_batches}, but data has no 'batch_labels' to train with."
            raise MissingKeyError(msg)
        return self.model.objective(data, kl_weight=kl_weight)

    def start_from(self, data: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Starts at the mean gene fractions."""
        self.model.start_from(data["counts"])

    def finish_from(self, found: Mapping[str, np.ndarray]) -> None:
        """Fits the classifier anew to the latent space that was learned, by labelled and unlabelled cells."""
        if (found["labels"] >= 0).any():
            self.model.fit_classifier(found["latent"], found["labels"], found.get("batch_labels"))


MODES: dict[str, type[Celltypist | Cellassign | Scanvi]] = {
    "celltypist": Celltypist, "cellassign": Cellassign, "scanvi": Scanvi
}
