"""Cell type annotation in three modes: a trained classifier, marker genes, or partly labelled cells."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError, MissingKeyError
from ...math.sparse import SparseRows
from ..base import Config, Data, Operator, nonnegative, one_of, positive
from .annotation_modes import MODES, UNLABELLED, WHO, Celltypist


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellAnnotatorConfig(Config):
    """Settings of `DifferentiableCellAnnotator`.

    annotation_mode: 'celltypist' (a classifier trained on labelled cells), 'cellassign' (marker genes alone) or
        'scanvi' (labelled and unlabelled cells together).
    n_cell_types: number of types, that of 'other' cells in 'cellassign' included.
    n_genes: width of the counts.
    latent_dim: width of the latent space.
    hidden_dims: widths of the encoder's layers; the decoder has them in reverse.
    marker_matrix_shape: (n_cell_types, n_genes): the annotator keeps the marker matrix that it is fitted with, so
        that cells alone can be annotated later; None: it is read from the data every time. Only in 'cellassign'.
    gene_likelihood: of the counts: 'poisson', 'nb' or 'zinb'; CellAssign as published has 'nb'.
    n_batches: number of batches; in 'scanvi' the decoder and the classifier are told which. Only in 'scanvi'.
    n_covariates: columns of data['covariates'], which the expression of a type's genes may depend on. Only in
        'cellassign'.
    stochastic: in train mode latent positions are drawn; False takes their means there, too, and drops nothing out.
    stream_name: stream of `rngs` that they are drawn from, the default one if `rngs` lacks it.
    """

    annotation_mode: str = one_of("celltypist", "cellassign", "scanvi")
    n_cell_types: int = positive(10)
    n_genes: int = positive(2000)
    latent_dim: int = positive(10)
    hidden_dims: tuple[int, ...] | list[int] = positive((128, 64))  # noqa: RUF009 - a list becomes a tuple
    marker_matrix_shape: tuple[int, ...] | None = None
    gene_likelihood: str = one_of("poisson", "nb", "zinb")
    n_batches: int = positive(1)
    n_covariates: int = nonnegative(0)
    stochastic: bool = True
    stream_name: str = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        shape, mode = self.marker_matrix_shape, self.annotation_mode
        if shape is not None and shape != (self.n_cell_types, self.n_genes):
            msg = (
                f"CellAnnotatorConfig.marker_matrix_shape must be (n_cell_types, n_genes) = "
                f"{(self.n_cell_types, self.n_genes)}, got {shape}."
            )
            raise ConfigError(msg)
        for name, idle, needed in (
            ("marker_matrix_shape", None, "cellassign"), ("n_covariates", 0, "cellassign"), ("n_batches", 1, "scanvi")
        ):
            if getattr(self, name) != idle and mode != needed:
                msg = f"CellAnnotatorConfig.{name} is for mode {needed!r}; leave it at {idle} in mode {mode!r}."
                raise ConfigError(msg)


class Annotated(TypedDict):
    """What `DifferentiableCellAnnotator` adds."""

    cell_type_probabilities: Float[Array, "cells cell_types"]  # rows sum to 1
    cell_type_labels: Int[Array, "cells"]  # the likeliest type
    latent: Float[Array, "cells latent"]  # the mean in eval mode, a sample in train mode


class DifferentiableCellAnnotator(Operator):
    """Probabilities of the cell types of every cell, differentiable by the counts and by every weight.

    'celltypist': a classifier on the latent space of a count VAE, trained with labels (`nn.type_classifier`).
    'cellassign': CellAssign (Zhang et al. 2019), from counts and marker genes alone (`nn.cellassign`); a type
        without markers, a row of zeros in `marker_matrix`, stands for all other cells. The latent space is that of
        a count VAE beside it.
    'scanvi': SCANVI (Xu et al. 2021, `nn.scanvi`), trained with labelled and unlabelled cells. A labelled cell's
        answer is its label, with probability 1.

    marker_matrix: 1 where a gene is raised in a type, 0 elsewhere; weights in between are allowed.
    known_labels, label_indices: type and row number of the labelled cells; or `labels`, one for every cell,
        where a code outside 0..n_cell_types-1 is an unlabelled cell. 'celltypist' reads them in training alone.
    library_size: counts of a cell over all its genes, where these are not all given; 'scanvi' does not read it.
    batch_labels: in 'scanvi' with n_batches; covariates: in 'cellassign' with n_covariates.

    Raises:
        DataError: labels or row numbers are out of range (under jit such labels are left out).
    """

    config: CellAnnotatorConfig
    init_cells: ClassVar[int | None] = 20_000
    cell_numbers = frozenset({"label_indices"})
    rough_in: ClassVar[dict[str, str]] = {}

    def __init__(self, config: CellAnnotatorConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.fitted = False
        self.mode = MODES[config.annotation_mode](config, rngs=rngs)
        # of an annotator that was trained on cells with names: types and genes by name, top genes of every type
        self.types: tuple[str, ...] = ()
        self.genes: tuple[str, ...] = ()
        self.markers: tuple[tuple[str, ...], ...] = ()
        self.n_cells, self.labels_key = 0, ""
        for part in self._samplers():
            part.noise = rngs[config.stream_name].fork()

    @property
    def fit_defaults(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Arguments of `diffbio.fit` that suit the mode."""
        return self.mode.fit_defaults

    @property
    def held_in_fit(self) -> tuple[str, ...]:  # type: ignore[override]
        """Parameters that `diffbio.fit` leaves where `init_from` has set them."""
        return tuple(f"mode/{name}" for name in self.mode.held_in_fit)

    @property
    def schedules(self) -> Mapping[str, Any]:
        """The KL term's weight rises from 0 to 1 in the first epochs."""
        warmup = self.mode.kl_warmup
        return {"kl_weight": lambda epoch: jnp.minimum(1.0, (epoch + 1) / warmup)}

    @property
    def sparse_keys(self) -> frozenset[str]:  # type: ignore[override]
        """Inputs that `objective` takes as `SparseRows`, too."""
        return frozenset({"counts"} if self.mode.takes_sparse else ())

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        marker_matrix: Float[Array, "cell_types genes"] | None = None,
        known_labels: Int[Array, "labelled"] | None = None,
        label_indices: Int[Array, "labelled"] | None = None,
        labels: Int[Array, "cells"] | None = None,
        library_size: Float[Array, "cells"] | None = None,
        batch_labels: Int[Array, "cells"] | None = None,
        covariates: Float[Array, "cells covariates"] | None = None,
    ) -> Annotated:
        """Annotates every cell."""
        given = {
            "counts": counts, "marker_matrix": marker_matrix, "known_labels": known_labels,
            "label_indices": label_indices, "labels": labels, "library_size": library_size,
            "batch_labels": batch_labels, "covariates": covariates,
        }
        cells = self._complete({key: value for key, value in given.items() if value is not None})
        answer = self.mode.answer(cells)
        probabilities = jnp.exp(answer.log_probabilities)
        if self.config.annotation_mode == "scanvi":
            known = jax.nn.one_hot(self._labels(cells, len(counts)), self.config.n_cell_types, dtype=counts.dtype)
            probabilities = known + (1.0 - known.sum(-1, keepdims=True)) * probabilities
        return {
            "cell_type_probabilities": probabilities,
            "cell_type_labels": jnp.argmax(probabilities, -1),
            "latent": answer.latent,
        }

    def objective(
        self, data: Data, *, kl_weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mode's loss, mean over cells, in nats: a bound on -log p(counts) with KL terms weighted, and what the
        types cost: cross entropy of labelled cells, or the likelihood of marker genes.

        Raises:
            MissingKeyError: the marker matrix, or batch_labels, are not there to train with.
        """  # noqa: D205
        cells = self._complete(self._inputs(data))
        labels = self._labels(cells, cells["counts"].shape[0])
        given = data["counts"] if isinstance(data["counts"], SparseRows) and self.sparse_keys else cells["counts"]
        return self.mode.loss(cells, given, labels, kl_weight)

    def init_from(self, data: Data) -> None:
        """Starts where the method's own estimates on the host are: by labels, by markers, or by means."""
        held = {key: np.asarray(value) for key, value in data.items() if key in self.requires}
        held["counts"] = held["counts"].astype(np.float32, copy=False)
        if "library_size" not in held:
            held["library_size"] = held["counts"].sum(1)
        self.mode.start_from(held, np.asarray(self._labels(held, len(held["counts"]))))

    def for_training(self, data: Data) -> Data:
        """`known_labels` of `label_indices` as `labels`, one per cell, which minibatches can be cut from."""
        if data.get("known_labels") is None and data.get("label_indices") is None:
            return data
        n_cells = data["counts"].shape[0] if hasattr(data["counts"], "shape") else len(data["counts"])
        rest = {key: value for key, value in data.items() if key not in ("known_labels", "label_indices")}
        return {**rest, "labels": np.asarray(self._labels(data, n_cells))}

    def positions(self, data: Data) -> Data:
        """What `finish_from` needs of every cell, one row each."""
        cells = self._complete(self._inputs(data))
        return dict(self.mode.positions(cells, self._labels(cells, len(cells["counts"]))))

    def finish_from(self, data: Data) -> None:
        """After training: the classifier that goes best with the latent space; how far off cells usually are."""
        self.mode.finish_from(data)

    def marker_scores(self, data: Data) -> Float[Array, "cell_types genes"]:
        """In mode 'celltypist', how much a gene speaks for a type: the mean gradient of the type's logit, less that
        of the other types, by standardised log expression, over the type's cells among `data` (by its labels).

        Raises:
            ConfigError: the mode is another.
        """  # noqa: D205
        if not isinstance(self.mode, Celltypist):
            msg = f"{WHO}: marker_scores is for mode 'celltypist', not {self.config.annotation_mode!r}."
            raise ConfigError(msg)
        cells = self._complete(self._inputs(data))
        labels = self._labels(cells, len(cells["counts"]))
        return self.mode.classifier.marker_scores(cells["counts"], labels, cells["library_size"])

    def judge(self, data: Data) -> Data:
        """What `apply` says without known labels, and how usual a cell is: probabilities (cells, types), latent,
        confidence (cells,), 0 to 1, and in 'celltypist' the probability of every type by itself, independent.

        In 'celltypist' the confidence says how far a cell is from those of training, and is low for a cell of a type
        that was not among them; which of the types it is, is the probabilities' to say. In 'cellassign' it is the
        probability of the likeliest type times how usual the cell's counts would be for it, in 'scanvi' the
        probability.
        """  # noqa: D205
        cells = self._complete(self._inputs(data))
        answer = self.mode.answer(cells)
        sureness = self.mode.sureness(cells, answer)
        return {"probabilities": jnp.exp(answer.log_probabilities), "latent": answer.latent, **sureness}

    def note(self, types: tuple[str, ...], genes: tuple[str, ...], *, n_cells: int, labels_key: str | None) -> None:
        """Writes down the names of types and genes, and what it was trained on; `save` keeps them."""
        self.types, self.genes, self.n_cells, self.labels_key = tuple(types), tuple(genes), n_cells, labels_key or ""

    def _header(self) -> dict[str, Any]:
        return {"annotation": {
            "mode": self.config.annotation_mode, "types": self.types, "genes": self.genes, "markers": self.markers,
            "n_cells": self.n_cells, "labels_key": self.labels_key,
        }}

    def _adapt(self, header: Mapping[str, Any]) -> None:
        found = header.get("annotation", {})
        self.types, self.genes = (tuple(map(str, found.get(key, ()))) for key in ("types", "genes"))
        self.markers = tuple(tuple(map(str, genes)) for genes in found.get("markers", ()))
        self.n_cells, self.labels_key = int(found.get("n_cells", 0)), str(found.get("labels_key", ""))

    def train_mode(self) -> None:
        """Turns on sampling and dropout, unless config.stochastic is False."""
        super().train_mode()
        if not self.config.stochastic:
            dropouts: list[Any] = [part for _, part in nnx.iter_modules(self) if isinstance(part, nnx.Dropout)]
            for part in (*dropouts, *self._samplers()):
                part.deterministic = True

    def _samplers(self) -> list[Any]:
        return [part.vae.sample for _, part in nnx.iter_modules(self) if hasattr(part, "vae")]

    def _complete(self, cells: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The inputs with the library sizes, which are the sums of the counts unless given."""
        if self.config.n_covariates and "covariates" not in cells:
            msg = f"{WHO}: n_covariates is {self.config.n_covariates}, but data has no 'covariates'."
            raise MissingKeyError(msg)
        markers = cells.get("marker_matrix")
        if markers is not None and not isinstance(markers, jax.core.Tracer):
            held = np.asarray(markers)
            if not ((held >= 0) & (held <= 1)).all():
                msg = f"{WHO}: data['marker_matrix'] must be in 0..1, got {held.min()} to {held.max()}."
                raise DataError(msg)
        return {"library_size": cells["counts"].sum(-1), **cells}

    def _labels(self, cells: Mapping[str, Any], n_cells: int) -> Int[Array, "cells"]:
        """One code per cell; that of an unlabelled cell is outside the types."""
        given = [key for key in ("labels", "known_labels", "label_indices") if cells.get(key) is not None]
        if given == ["labels"]:
            return jnp.asarray(cells["labels"])
        if not given:
            return jnp.full(n_cells, UNLABELLED)
        if given != ["known_labels", "label_indices"]:
            msg = f"{WHO}: pass labels alone, or known_labels with label_indices; got {', '.join(given)}."
            raise DataError(msg)
        labels, rows = cells["known_labels"], cells["label_indices"]
        for name, values, n in (("known_labels", labels, self.config.n_cell_types), ("label_indices", rows, n_cells)):
            held = np.empty(0, int) if isinstance(values, jax.core.Tracer) else np.asarray(values)
            odd = held[(held < 0) | (held >= n)]
            if odd.size:
                msg = f"{WHO}: data[{name!r}] must be in 0..{n - 1}, got {odd[0]}."
                raise DataError(msg)
        rows = jnp.asarray(rows)
        rows = jnp.where(rows < 0, n_cells, rows)  # a negative number would count from the end
        return jnp.full(n_cells, UNLABELLED).at[rows].set(labels, mode="drop")

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableCellAnnotator", Data]]:
        """One per mode, told of all that it can be told."""
        keys = jax.random.split(jax.random.key(0), 3)
        types = jnp.arange(12) % 3
        markers = (jnp.arange(9)[None] % 3 == jnp.arange(3)[:, None]).astype(jnp.float32)
        counts = jax.random.poisson(keys[0], 1.0 + 6.0 * markers[types]).astype(jnp.float32)
        labels = {"known_labels": types[:4], "label_indices": jnp.arange(4)}

        def op(mode: str, **settings: Any) -> DifferentiableCellAnnotator:
            config = CellAnnotatorConfig(
                annotation_mode=mode, n_cell_types=3, n_genes=9, latent_dim=4, hidden_dims=(16, 12), **settings
            )
            return cls(config, rngs=nnx.Rngs(0))

        told = {
            "library_size": counts.sum(1) * 1.5 + 1.0,
            "covariates": jax.random.normal(keys[1], (12, 2)),
        }
        return {
            "celltypist": (op("celltypist"), {"counts": counts, "labels": types}),
            "cellassign": (
                op("cellassign", gene_likelihood="nb", n_covariates=2),
                {"counts": counts, "marker_matrix": markers * 0.9, **told},
            ),
            "scanvi": (
                op("scanvi", gene_likelihood="zinb", n_batches=2),
                {"counts": counts, **labels, "batch_labels": jnp.arange(12) // 6},
            ),
        }
