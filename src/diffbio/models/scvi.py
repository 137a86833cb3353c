"""SCVI on AnnData: setup, training, and all that `Queries` answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..history import History
from ..nn.scvi import SCVI as Module
from ..parallel import Devices
from ..train import Split
from .base import setup
from .defaults import SCVI_TRAINING
from .queries import Queries

if TYPE_CHECKING:
    from anndata import AnnData

    from .registry import Registry


class SCVI(Queries):
    """Single-cell variational inference (Lopez et al. 2018) on AnnData.

    Args:
        adata: as `SCVI.setup_anndata` was called with.
        n_hidden: width of the hidden layers.
        n_latent: dimension of z.
        n_layers: hidden layers of encoder and decoder.
        dropout_rate: in the encoders.
        dispersion: 'gene' | 'gene-batch' | 'gene-label' | 'gene-cell'.
        gene_likelihood: 'zinb' | 'nb' | 'poisson'.
        use_observed_lib_size: the library size is the sum of the counts, not a latent variable.
        log_variational: the encoders read log(1 + counts).
        encode_covariates: the encoders are told batch and covariates, too; what `load_query_data` needs to adapt
            the embedding of a query to it.
        seed: of the weights, and of training unless `train` is given another.

    Raises:
        DataError: `adata` has not been set up.
        ConfigError: an argument is out of range.
    """

    module_class = Module
    fit_defaults: ClassVar[Mapping[str, Any]] = SCVI_TRAINING

    def __init__(
        self,
        adata: "AnnData | None" = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        use_observed_lib_size: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        *,
        log_variational: bool = True,
        encode_covariates: bool = False,
        registry: "Registry | None" = None,
        seed: int = 0,
    ) -> None:
        init = {
            "n_hidden": n_hidden, "n_latent": n_latent, "n_layers": n_layers, "dropout_rate": dropout_rate,
            "dispersion": dispersion, "gene_likelihood": gene_likelihood,
            "use_observed_lib_size": use_observed_lib_size, "log_variational": log_variational,
            "encode_covariates": encode_covariates,
        }
        super().__init__(adata, init, registry=registry, seed=seed)

    @classmethod
    def setup_anndata(
        cls,
        adata: "AnnData",
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
    ) -> None:
        """Checks the counts and notes where a model finds what it reads, in `adata.uns["diffbio_setup"]`.

        Args:
            adata: cells x genes, in memory or backed.
            layer: of the counts; None is X.
            batch_key: column of obs.
            labels_key: column of obs with cell types; read by dispersion 'gene-label' and by SCANVI.
            size_factor_key: column of obs to use in place of the library size.
            categorical_covariate_keys: further columns of obs with categories to correct for.
            continuous_covariate_keys: columns of obs with numbers to correct for; scale them to about 1.

        Raises:
            MissingKeyError: a column or layer is not there.
            DataError: values are no counts, or a covariate has missing values.
        """
        setup(cls.__name__, adata, {
            "layer": layer, "batch_key": batch_key, "labels_key": labels_key, "size_factor_key": size_factor_key,
            "categorical_covariate_keys": listed(categorical_covariate_keys),
            "continuous_covariate_keys": listed(continuous_covariate_keys),
        })

    def train(
        self,
        max_epochs: int | None = None,
        *,
        train_size: float | None = None,
        batch_size: int | None = None,
        early_stopping: bool = True,
        early_stopping_patience: int | None = None,
        early_stopping_min_delta: float | None = None,
        gradient_clip_val: float | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        seed: int | None = None,
        devices: Devices = None,
    ) -> History:
        """Trains the model, which ends with the weights of its best epoch.

        What is left at None is in `fit_defaults`.

        Args:
            max_epochs: passes over the cells at most; the default, `defaults.scvi_epochs`, falls with their number.
            train_size: fraction of the cells to train on; the others decide when to stop.
            batch_size: cells in a minibatch.
            early_stopping: stops when the held-out bound has not become better for
                early_stopping_patience epochs; the best weights are kept either way.
            early_stopping_patience: see above.
            early_stopping_min_delta: by how much, relative to the loss, a better one must be better.
            gradient_clip_val: largest norm of a gradient.
            plan_kwargs: lr, lr_schedule ('cosine' | 'constant'), lr_warmup (share of the steps), eps, weight_decay,
                decay_matrices_only, optimizer ('Adam' | 'AdamW' | an optax optimizer), n_epochs_kl_warmup,
                n_steps_kl_warmup, min_kl_weight, max_kl_weight.
            checkpoint: folder to save to every half minute and on SIGINT or SIGTERM.
            resume: goes on from `checkpoint` if it is there, bit-identical to a run that was never stopped.
            progress: a bar on a terminal, a line per epoch elsewhere.
            seed: of split, minibatches and weights' start; None is the model's.
            devices: that share every minibatch: how many, -1 for all, or a list of JAX devices; None is one device,
                or in a run of several processes (`diffbio.parallel.join`) all of theirs.

        Raises:
            ConfigError: an argument is out of range.
            DataError: the data are minified.
            TrainingDivergedError: loss or gradient stayed NaN or infinite.
            ProcessLostError: another process of this run is gone.
        """
        source = self._trainable_cells()
        settings = self._settings(
            max_epochs=max_epochs, train_size=train_size, batch_size=batch_size, early_stopping=early_stopping,
            early_stopping_patience=early_stopping_patience, early_stopping_min_delta=early_stopping_min_delta,
            gradient_clip_val=gradient_clip_val, seed=seed, n_cells=source.n_cells,
        )
        return self._train(
            source=source, held_out=Split.of(source.n_cells, settings, held_out=True), settings=settings,
            plan_kwargs=plan_kwargs, checkpoint=checkpoint, resume=resume, progress=progress,
            devices=devices,
        )


def listed(keys: Sequence[str] | None) -> list[str] | None:
    """Keys as a list, also where one is given by itself."""
    return None if keys is None else [keys] if isinstance(keys, str) else list(keys)
