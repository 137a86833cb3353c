"""SCANVI on AnnData: SCVI with cell types known for some cells, and a calibrated answer for the others."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ..chunks import joined
from ..errors import ConfigError, DataError, DataWarning
from ..history import History
from ..nn import class_fit
from ..nn.scanvi import SCANVI as Module
from ..operators.base import to_numpy
from . import posterior
from .base import flat_state, rows_of, set_state
from .base import setup as note_setup
from .calibration import expected_calibration_error
from .cells import LabelledBeside
from .defaults import SCANVI_TRAINING
from .peer import merged, refuse
from .queries import Queries
from .registry import Registry
from .scvi import SCVI, listed
from .surgery import rows_by_name
from .training import Run

if TYPE_CHECKING:
    from anndata import AnnData

UNKNOWN = "unknown"  # the answer for a cell whose type is not clear


class SCANVI(Queries):
    """Single-cell annotation by variational inference (Xu et al. 2021) on AnnData.

    Args:
        adata: as `SCANVI.setup_anndata` was called with.
        n_hidden, n_latent, n_layers, dropout_rate, dispersion, gene_likelihood, use_observed_lib_size,
            log_variational, encode_covariates, deeply_inject_covariates, use_batch_norm, use_layer_norm, seed,
            registry: as for `SCVI`.
        linear_classifier: the classifier is one linear layer, which training ends by fitting for itself (see
            `nn.class_fit`): more accurate and better calibrated than a network of few labels.
        classifier_parameters: n_hidden, n_layers, dropout_rate of the classifier, where they differ; by_batch:
            batches have intercepts and slopes of their own (True if the classifier is linear).
        y_prior: prior probabilities of the cell types, in the order of the categories; None is uniform.
        labels_groups: for each type the number of its group; use_labels_groups: types are told apart within
            groups, which have a classifier of their own.
        datamodule: of scvi-tools; refused.
        model_kwargs: as for `SCVI`.

    Raises:
        DataError: `adata` has not been set up.
        ConfigError: an argument is out of range.
    """

    module_class = Module
    module: Module
    handed_on: ClassVar[tuple[str, ...]] = ("type_mean", "type_precision", "type_share")
    saved_notes: ClassVar[tuple[str, ...]] = (*Queries.saved_notes, *handed_on, "held_out_labels", "was_pretrained")
    fit_defaults: ClassVar[Mapping[str, Any]] = SCANVI_TRAINING

    def __init__(
        self,
        adata: "AnnData | None" = None,
        registry: Registry | None = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        use_observed_lib_size: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        linear_classifier: bool = True,  # noqa: FBT001, FBT002
        datamodule: None = None,
        *,
        log_variational: bool = True,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        classifier_parameters: Mapping[str, Any] | None = None,
        y_prior: Any = None,
        labels_groups: Sequence[int] | None = None,
        use_labels_groups: bool = False,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> None:
        refuse("SCANVI", {"datamodule": datamodule, **model_kwargs})
        init = {
            "n_hidden": n_hidden, "n_latent": n_latent, "n_layers": n_layers, "dropout_rate": dropout_rate,
            "dispersion": dispersion, "gene_likelihood": gene_likelihood,
            "use_observed_lib_size": use_observed_lib_size, "log_variational": log_variational,
            "encode_covariates": encode_covariates, "deeply_inject_covariates": deeply_inject_covariates,
            "use_batch_norm": use_batch_norm, "use_layer_norm": use_layer_norm,
            "linear_classifier": linear_classifier,
            "classifier_parameters": dict(classifier_parameters or {}),
            "y_prior": None if y_prior is None else [float(p) for p in np.ravel(y_prior)],
            "labels_groups": None if labels_groups is None else [int(g) for g in labels_groups],
            "use_labels_groups": use_labels_groups,
        }
        self.was_pretrained = False
        self.held_out_labels = np.empty(0, int)  # rows with a known label that training has not seen
        # where the cells of every type lie, as `nn.class_fit` has found it: what a query is compared with
        self.type_mean: np.ndarray | None = None
        self.type_precision: np.ndarray | None = None
        self.type_share: np.ndarray | None = None
        self.left_out_temperature: float | None = None
        super().__init__(adata, init, registry=registry, seed=seed)

    @classmethod
    def setup_anndata(
        cls,
        adata: "AnnData",
        labels_key: str,
        unlabeled_category: str,
        layer: str | None = None,
        batch_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        use_minified: bool = True,  # noqa: FBT001, FBT002
        **kwargs: Any,
    ) -> None:
        """Checks the counts and notes where a model finds what it reads, in `adata.uns["diffbio_setup"]`.

        Args:
            adata: cells x genes, in memory or backed.
            labels_key: column of obs with the cell types.
            unlabeled_category: its value for cells whose type is not known.
            layer: as for SCVI, like the following.
            batch_key: column of obs.
            size_factor_key: column of obs.
            categorical_covariate_keys: columns of obs.
            continuous_covariate_keys: columns of obs.
            use_minified: accepted; data that are minified are set up already.
            kwargs: none are known.

        Raises:
            MissingKeyError: a column or layer is not there.
            DataError: values are no counts, a covariate or label is missing (NaN), or no cell has a label.
        """
        refuse("setup_anndata", kwargs)
        note_setup(cls.__name__, adata, {
            "layer": layer, "batch_key": batch_key, "labels_key": labels_key,
            "unlabeled_category": unlabeled_category, "size_factor_key": size_factor_key,
            "categorical_covariate_keys": listed(categorical_covariate_keys),
            "continuous_covariate_keys": listed(continuous_covariate_keys),
        })

    @classmethod
    def from_scvi_model(
        cls,
        scvi_model: SCVI,
        unlabeled_category: str,
        labels_key: str | None = None,
        adata: "AnnData | None" = None,
        registry: None = None,
        **scanvi_kwargs: Any,
    ) -> Self:
        """A SCANVI model that starts from the encoder and decoder of a trained SCVI model.

        Args:
            scvi_model: the trained model.
            unlabeled_category: value of labels_key for cells whose type is not known.
            labels_key: column of obs with the cell types; None takes that of the SCVI setup.
            adata: None takes that of the SCVI model.
            registry: of scvi-tools; refused.
            scanvi_kwargs: linear_classifier, classifier_parameters, y_prior, labels_groups, use_labels_groups, seed.

        Raises:
            DataError: there are no labels, or `adata` does not fit the model.
            ConfigError: an argument is what the SCVI model has settled.
        """
        refuse("from_scvi_model", {"registry": registry})
        if not isinstance(scvi_model, SCVI):
            msg = f"from_scvi_model: scvi_model must be a diffbio.models.SCVI, got {type(scvi_model).__name__}."
            raise ConfigError(msg)
        given = scvi_model.registry.setup
        if settled := sorted(set(scanvi_kwargs) & set(scvi_model.init_params)):
            msg = f"from_scvi_model: {settled} are as in the SCVI model; leave them out."
            raise ConfigError(msg)
        labels_key = given.get("labels_key") if labels_key is None else labels_key
        if labels_key is None:
            msg = "from_scvi_model: the SCVI model was set up without labels_key; pass labels_key=."
            raise DataError(msg)
        adata = scvi_model.adata if adata is None else adata
        if adata is None:
            msg = "from_scvi_model: the SCVI model was loaded without data; pass adata=."
            raise DataError(msg)
        if not scvi_model.is_trained:
            message = "from_scvi_model: the SCVI model is not trained; call its train() first"
            warnings.warn(message, DataWarning, stacklevel=2)
        old = scvi_model.registry
        setup = {**given, "labels_key": labels_key, "unlabeled_category": unlabeled_category}
        found = Registry.of(cls.__name__, adata, setup)
        # codes and genes as the weights know them
        new = replace(found, batches=old.batches, categories=old.categories, var_names=old.var_names)
        new.store(adata)
        model = cls(adata, registry=new, **{"seed": scvi_model.seed, **scvi_model.init_params, **scanvi_kwargs})
        weights = {name: to_numpy(leaf) for name, leaf in flat_state(model.module).items()}
        weights |= {name: to_numpy(leaf) for name, leaf in flat_state(scvi_model.module).items()}
        if model.module.dispersion == "gene-label" and "vae/decoder/log_theta" in weights:
            name = "vae/decoder/log_theta"
            weights[name] = rows_by_name(weights[name], [("", x) for x in old.labels], [("", x) for x in new.labels])[0]
        set_state(model.module, weights)
        model.library_prior, model.was_pretrained = scvi_model.library_prior, True
        model._attach(adata)
        return model

    def train(
        self,
        max_epochs: int | None = None,
        n_samples_per_label: int | None = None,
        check_val_every_n_epoch: int | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        batch_size: int | None = None,
        accelerator: str = "auto",
        devices: Any = "auto",
        adversarial_classifier: bool | None = None,  # noqa: FBT001
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_config: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        datamodule: None = None,
        trainer_config: Mapping[str, Any] | None = None,
        *,
        early_stopping: bool = True,
        early_stopping_patience: int | None = None,
        early_stopping_min_delta: float | None = None,
        gradient_clip_val: float | None = None,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        seed: int | None = None,
        adapt_classifier: bool = True,
        **trainer_kwargs: Any,
    ) -> History:
        """Trains the model, which ends with the weights of its best epoch, and calibrates its answers.

        At the end a linear classifier without groups is fitted anew to the latent space that was learned, by the
        labelled and the unlabelled cells (`nn.class_fit`).
        With every minibatch goes one of labelled cells, for the classifier. Labelled cells among those held out
        are not trained on and calibrate the probabilities, if they are `least_held_out_labels` at least; fewer
        are trained on, and a model made by `from_scvi_model` is calibrated by leaving out a tenth of them at a time, in
        the latent space that SCVI has learned (without labels, but for dispersion 'gene-label').
        Of a query (`load_query_data`) the classifier is adapted to each new batch: to a shift of its cells, all alike,
        and to its shares of the types (`nn.class_fit.adapt_classes`), which concerns cells of that batch alone.

        Args:
            max_epochs: passes over the cells at most.
            n_samples_per_label: labelled cells of every type per minibatch; None draws them as they come.
            check_val_every_n_epoch: met by any number: held-out cells are looked at after every epoch.
            train_size: fraction of the cells to train on.
            validation_size: as for `SCVI.train`, like all that is not named here.
            shuffle_set_split: see there.
            batch_size: cells in a minibatch, by default as of `SCVI.train`.
            accelerator: see there.
            devices: see there.
            adversarial_classifier: of scvi-tools; refused.
            datasplitter_kwargs: see there.
            plan_config: see there.
            plan_kwargs: as for `SCVI.train`, and classification_ratio: weight of the cross entropy.
            datamodule: see there.
            trainer_config: see there.
            early_stopping: by the validation loss, in which the classifier's loss is.
            early_stopping_patience: epochs.
            early_stopping_min_delta: relative to the loss.
            gradient_clip_val: largest norm of a gradient.
            checkpoint: folder.
            resume: goes on from it.
            progress: shown or not.
            seed: None is the model's.
            adapt_classifier: of a query; False leaves the classifier as the reference has it.
            trainer_kwargs: see there.

        Raises:
            ConfigError: an argument is out of range.
            DataError: the data are minified.
            TrainingDivergedError: loss or gradient stayed NaN or infinite.
            ProcessLostError: another process of this run is gone.
        """
        own = {"self", "n_samples_per_label", "adversarial_classifier", "checkpoint", "resume", "adapt_classifier"}
        given = {name: value for name, value in locals().items() if name not in {*own, "own"}}
        refuse("train", {"adversarial_classifier": adversarial_classifier or None})
        if n_samples_per_label is not None and n_samples_per_label < 1:
            msg = f"train: n_samples_per_label must be at least 1 or None, got {n_samples_per_label!r}."
            raise ConfigError(msg)
        cells = self._trainable_cells()
        if self.was_pretrained:
            gentle = {key: self.fit_defaults[f"{key}_pretrained"] for key in ("n_epochs_kl_warmup", "lr")}
            given["plan_config"] = {**gentle, **merged("train", plan_config, None, "plan_config")}
        run = self._run(cells.n_cells, given)
        source: Any = cells
        self.held_out_labels = np.empty(0, int)
        known = cells.columns["labels"] < len(self.registry.labels)
        known[run.test] = False
        # its latent space has not seen labels yet, so that labelled cells tell how sure one may be of others
        unseen = self.was_pretrained and not self.training_history.rows
        temperature = self.temperature if self.training_history.rows else 1.0
        if known.any():  # a query may have no labels at all
            source = self._beside_labelled(cells, known, run, n_samples_per_label)
            if self.was_pretrained and self.trainable is None:
                # a random classifier's cross entropy would push about the latent space that SCVI has learned
                self.is_trained = True
                given_cells = self._fit_classifier(known)
                if unseen and given_cells is not None and not len(self.held_out_labels):
                    # once: a run that goes on after a signal stands at weights that have seen labels
                    if self.left_out_temperature is None:
                        self.left_out_temperature = class_fit.folded_temperature(*given_cells)
                    temperature = self.left_out_temperature
        history = self._train(source=source, run=run, checkpoint=checkpoint, resume=resume)
        if self.trainable is not None:  # a query keeps the reference's classifier, but for its own batches
            self._adapt_classifier(known, adapt=adapt_classifier)
        elif known.any() and self._fit_classifier(known) is not None:
            self.module.temperature.set_value(jnp.asarray(temperature))
        if len(self.held_out_labels):
            self._calibrate()
        return history

    def predict(
        self,
        adata: "AnnData | None" = None,
        indices: Any = None,
        soft: bool = False,  # noqa: FBT001, FBT002 - scvi-tools' signature
        batch_size: int | None = None,
        use_posterior_mean: bool = True,  # noqa: FBT001, FBT002
        ig_interpretability: bool = False,  # noqa: FBT001, FBT002
        ig_args: None = None,
        dataloader: None = None,
        *,
        min_confidence: float = 0.0,
        seed: int = 0,
    ) -> Any:
        """The likeliest cell type of every cell, labelled ones too; with soft a table of probabilities.

        Args:
            adata: None is the model's; another one needs no labels.
            indices: of the cells.
            soft: gives probabilities, (cells, types).
            batch_size: cells in a chunk.
            use_posterior_mean: classifies the mean of q(z | x), not a draw.
            ig_interpretability: of scvi-tools; refused, like ig_args and dataloader, with what takes its place.
            ig_args: see above.
            dataloader: see above.
            min_confidence: a cell whose likeliest type has a lower probability is called 'unknown'.
            seed: of the draws.
        """
        refuse("predict", {"ig_interpretability": ig_interpretability, "ig_args": ig_args, "dataloader": dataloader})
        if not 0 <= min_confidence <= 1:
            msg = f"predict: min_confidence must be in [0, 1], got {min_confidence!r}."
            raise ConfigError(msg)
        if soft and min_confidence > 0:
            msg = "predict: soft=True gives the probabilities; min_confidence is for the answers of soft=False."
            raise ConfigError(msg)
        log_p = self._log_probabilities(adata, indices, batch_size, draw=not use_posterior_mean, seed=seed)
        probabilities = np.exp(log_p)
        if soft:
            rows = rows_of(indices, self.cells(adata).n_cells)
            return pd.DataFrame(
                probabilities, index=self._names(adata).obs_names[rows], columns=list(self.registry.labels)
            )
        answers = np.array(self.registry.labels, dtype=object)[probabilities.argmax(1)]
        answers[probabilities.max(1) < min_confidence] = UNKNOWN
        return answers if any(not isinstance(a, str) for a in answers) else answers.astype(str)

    def calibration_error(
        self, adata: "AnnData | None" = None, indices: Any = None, n_bins: int = 15
    ) -> float:
        """Expected calibration error of `predict`: mean distance of confidence and accuracy, over equal bins.

        Over the labelled cells among `indices`; without `adata` and `indices` over those that training has
        not seen.

        Raises:
            DataError: none of the cells is labelled.
        """
        cells = self.cells(adata)
        rows = rows_of(indices, cells.n_cells)
        if adata is None and indices is None:
            rows = self.held_out_labels
        rows = rows[cells.columns["labels"][rows] < len(self.registry.labels)] if len(rows) else rows
        if not len(rows):
            msg = "calibration_error: no labelled cells were held out of training; pass indices= of labelled cells."
            raise DataError(msg)
        log_p = self._log_probabilities(adata, rows, None)
        return expected_calibration_error(np.exp(log_p), cells.columns["labels"][rows], n_bins=n_bins)

    @property
    def temperature(self) -> float:
        """What the logits are divided by: above 1 where the classifier was too sure of itself."""
        return float(self.module.temperature[...])

    def _default_epochs(self, n_cells: int) -> int:
        epochs = super()._default_epochs(n_cells)
        return min(epochs, self.fit_defaults["max_epochs_pretrained"]) if self.was_pretrained else epochs

    def _log_probabilities(
        self, adata: "AnnData | None", indices: Any, batch_size: int | None, *, draw: bool = False, seed: int = 0
    ) -> np.ndarray:
        parts = self.evaluate(posterior.classes, adata, indices, batch_size, seed=seed, draw=draw)
        return joined(parts)["log_probability"]

    def _beside_labelled(
        self, cells: Any, known: np.ndarray, run: Run, n_samples_per_label: int | None
    ) -> LabelledBeside:
        outside = np.empty(0, int) if run.held_out.validation is None else run.held_out.validation
        unseen = outside[known[outside]]
        # a small share of labels is too dear to hold out: 3 of 31 would judge nothing and be missed
        keep = self.fit_defaults["least_held_out_labels"] <= len(unseen) < known.sum()
        self.held_out_labels = unseen if keep else np.empty(0, int)
        if self.trainable is None:  # a query keeps the reference's calibration until it has its own
            self.module.temperature.set_value(jnp.ones(()))
        seen = known.copy()
        seen[self.held_out_labels] = False
        return LabelledBeside(
            cells, np.flatnonzero(seen), held_out=outside, labelled_held_out=self.held_out_labels,
            n_samples_per_label=n_samples_per_label, seed=run.settings.seed,
        )

    def _start_from(self, rows: np.ndarray, seed: int) -> None:
        if not self.was_pretrained:  # SCVI's decoder is better than the moments of the counts
            super()._start_from(rows, seed)

    @property
    def _is_linear(self) -> bool:
        return not self.module.classifier.network.blocks and self.module.classifier_groups is None

    def _fit_classifier(self, known: np.ndarray) -> tuple[Any, ...] | None:
        """The classifier that goes best with the trained latent space; cross entropy alone overfits few labels.

        Gives the arguments of `fit_classes`; None if there is nothing to fit.
        """
        columns = self.cells().columns
        seen = known.copy()
        seen[self.held_out_labels] = False
        if not self._is_linear or not seen.any():
            return None
        z = joined(self.evaluate(posterior.latents))["mean"]
        labels = np.where(seen, columns["labels"], -1)
        found = self.module.fit_classifier(z, labels, columns.get("batch_labels"))
        self.type_mean, self.type_precision, self.type_share = found.clouds
        n_batch = len(found.by_batch)
        return z, labels, self.module.n_labels, columns.get("batch_labels") if n_batch else None, n_batch

    def _adapt_classifier(self, known: np.ndarray, *, adapt: bool) -> None:
        """The classifier for the batches that the reference lacks; those of the reference keep theirs.

        A batch that is not adapted (adapt=False, too few cells, too unsure) gets what the reference says of any batch.
        """
        own, columns = self.module.classifier.by_batch, self.cells().columns
        frozen = not any(np.any(mask) for name, mask in self.trainable.items() if name.startswith("classifier"))
        mean, precision, share = self.type_mean, self.type_precision, self.type_share
        if own is None or not self._is_linear or not frozen or not len(self.new_batches):
            return
        if mean is None or precision is None or share is None:  # a classifier that was not fitted, but trained along
            return
        kernel, bias = self.module.classifier.logits.kernel, self.module.classifier.logits.bias
        assert bias is not None
        clouds = class_fit.TypeClouds(mean, precision, share)
        found = class_fit.LinearClasses(to_numpy(kernel), to_numpy(bias), np.zeros(0), clouds)
        seen = known.copy()
        seen[self.held_out_labels] = False
        labels = np.where(seen, columns["labels"], -1)
        z = joined(self.evaluate(posterior.latents))["mean"]
        by_batch = to_numpy(own).copy()
        by_batch[self.new_batches] = 0.0
        for code in self.new_batches if adapt else ():
            rows = columns["batch_labels"] == code
            if rows.sum() < class_fit.LEAST_CELLS:
                continue
            added = class_fit.adapt_classes(z[rows], found, labels[rows], temperature=self.temperature)
            if added is None:
                message = (
                    f"SCANVI.train: the classifier is not adapted to batch {self.registry.batches[code]!r}: on average "
                    f"it is below {class_fit.LEAST_CONFIDENCE:.0%} sure of its cells; are they like the reference's?"
                )
                warnings.warn(message, DataWarning, stacklevel=3)
                continue
            by_batch[code, -1] = added
        own.set_value(jnp.asarray(by_batch, own[...].dtype))

    def _calibrate(self) -> None:
        rows = self.held_out_labels
        z = jnp.asarray(joined(self.evaluate(posterior.latents, indices=rows))["mean"])
        columns = {key: jnp.asarray(column[rows]) for key, column in self.cells().columns.items()}
        labels = columns["labels"]

        @jax.jit
        def loss(temperature: jax.Array) -> jax.Array:
            log_p = posterior.log_classes(self.module, z, temperature, columns.get("batch_labels"))
            return -jnp.take_along_axis(log_p, labels[:, None], 1).sum()

        self.module.temperature.set_value(jnp.asarray(class_fit.best_temperature(lambda t: loss(np.float32(t)))))

    def _module(self, seed: int) -> Module:
        init = self.init_params
        parameters = dict(init["classifier_parameters"])
        if init["linear_classifier"]:
            parameters = {"by_batch": not init["use_labels_groups"], **parameters, "n_layers": 0}
        kept = {key: value for key, value in init.items() if key != "linear_classifier"}
        module = self._built({**kept, "classifier_parameters": parameters}, seed)
        assert isinstance(module, Module)
        return module
