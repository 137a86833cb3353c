"""SCVI on AnnData: setup, training, and all that `Queries` answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..history import History
from ..nn.scvi import SCVI as Module
from .base import setup
from .defaults import SCVI_TRAINING
from .peer import refuse
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
        latent_distribution: 'normal' is the one there is.
        log_variational: the encoders read log(1 + counts).
        encode_covariates: the encoders are told batch and covariates, too; what `load_query_data` needs to adapt
            the embedding of a query to it.
        deeply_inject_covariates: every layer is told batch and covariates, not the first alone.
        use_batch_norm, use_layer_norm: where hidden layers have such a norm: 'encoder' | 'decoder' | 'both' | 'none'.
        seed: of the weights, and of training unless `train` is given another; None is `as_scvi.settings.seed`, or 0.
        registry: of another model, in place of that which `setup_anndata` noted in `adata`.
        model_kwargs: further arguments of scvi-tools; refused, with what takes their place, unless they change
            nothing.

    Raises:
        DataError: `adata` has not been set up.
        ConfigError: an argument is out of range.
    """

    module_class = Module
    fit_defaults: ClassVar[Mapping[str, Any]] = SCVI_TRAINING

    def __init__(
        self,
        adata: "AnnData | None" = None,
        registry: "Registry | None" = None,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        dispersion: str = "gene",
        gene_likelihood: str = "zinb",
        use_observed_lib_size: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        latent_distribution: str = "normal",
        *,
        log_variational: bool = True,
        encode_covariates: bool = False,
        deeply_inject_covariates: bool = True,
        use_batch_norm: str = "both",
        use_layer_norm: str = "none",
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> None:
        refuse("SCVI", {"latent_distribution": latent_distribution, **model_kwargs})
        init = {
            "n_hidden": n_hidden, "n_latent": n_latent, "n_layers": n_layers, "dropout_rate": dropout_rate,
            "dispersion": dispersion, "gene_likelihood": gene_likelihood,
            "use_observed_lib_size": use_observed_lib_size, "log_variational": log_variational,
            "encode_covariates": encode_covariates, "deeply_inject_covariates": deeply_inject_covariates,
            "use_batch_norm": use_batch_norm, "use_layer_norm": use_layer_norm,
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
        **kwargs: Any,
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
            kwargs: none are known.

        Raises:
            MissingKeyError: a column or layer is not there.
            DataError: values are no counts, or a covariate has missing values.
        """
        refuse("setup_anndata", kwargs)
        setup(cls.__name__, adata, {
            "layer": layer, "batch_key": batch_key, "labels_key": labels_key, "size_factor_key": size_factor_key,
            "categorical_covariate_keys": listed(categorical_covariate_keys),
            "continuous_covariate_keys": listed(continuous_covariate_keys),
        })

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: Any = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,  # noqa: FBT001, FBT002 - scvi-tools' signature
        load_sparse_tensor: bool = False,  # noqa: FBT001, FBT002
        batch_size: int | None = None,
        early_stopping: bool = True,  # noqa: FBT001, FBT002
        datasplitter_kwargs: Mapping[str, Any] | None = None,
        plan_config: Mapping[str, Any] | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        datamodule: None = None,
        trainer_config: Mapping[str, Any] | None = None,
        *,
        early_stopping_patience: int | None = None,
        early_stopping_min_delta: float | None = None,
        gradient_clip_val: float | None = None,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        seed: int | None = None,
        **trainer_kwargs: Any,
    ) -> History:
        """Trains the model, which ends with the weights of its best epoch.

        What is left at None is in `fit_defaults`.

        Args:
            max_epochs: passes over the cells at most; the default, `defaults.scvi_epochs`, falls with their number.
            accelerator: 'auto', or the backend that JAX runs on: nothing else can be chosen here.
            devices: that share every minibatch: how many, -1 for all, a list of numbers or of JAX devices; 'auto' is
                one device, or in a run of several processes (`diffbio.parallel.join`) all of theirs.
            train_size: fraction of the cells to train on.
            validation_size: fraction that decides when to stop; None is the rest. What remains of both is a test
                set, `test_indices`.
            shuffle_set_split: False takes validation, training and test cells in the order of the data.
            load_sparse_tensor: accepted; counts that are sparse stay so on the device anyway.
            batch_size: cells in a minibatch, by default 128, or 64 of fewer than 1,000 cells (of a query always 128);
                the last, incomplete one of an epoch is left out.
            early_stopping: stops when the held-out bound has not become better for
                early_stopping_patience epochs; the best weights are kept either way.
            datasplitter_kwargs: of scvi-tools; refused, but for drop_last=True.
            plan_config: as plan_kwargs, which go before it.
            plan_kwargs: lr, lr_schedule ('cosine' | 'constant'), lr_warmup (share of the steps), eps, weight_decay,
                decay_matrices_only (kernels without the rows of batch and categories in the decoder; not biases,
                norms, dispersions), encoder_decay (share of weight_decay in the encoder of z), optimizer ('Adam' |
                'AdamW' | an optax optimizer), n_epochs_kl_warmup, n_steps_kl_warmup, min_kl_weight, max_kl_weight.
            datamodule: of scvi-tools; refused.
            trainer_config: as trainer_kwargs, which go before it.
            early_stopping_patience: see above.
            early_stopping_min_delta: by how much, relative to the loss, a better one must be better.
            gradient_clip_val: largest norm of a gradient.
            checkpoint: folder to save to every half minute and on SIGINT or SIGTERM.
            resume: goes on from `checkpoint` if it is there, bit-identical to a run that was never stopped.
            progress: a bar on a terminal, a line per epoch elsewhere.
            seed: of split, minibatches and weights' start; None is the model's.
            trainer_kwargs: Lightning's arguments: enable_progress_bar=False hides the progress;
                check_val_every_n_epoch is met by any number, for held-out cells are looked at after every epoch;
                early_stopping_monitor may be 'elbo_validation' or 'validation_loss', which are the same. Others are
                refused, with what takes their place.

        Raises:
            ConfigError: an argument is out of range, or has no counterpart here.
            DataError: the data are minified.
            TrainingDivergedError: loss or gradient stayed NaN or infinite.
            ProcessLostError: another process of this run is gone.
        """
        given = {name: value for name, value in locals().items() if name not in {"self", "checkpoint", "resume"}}
        source = self._trainable_cells()
        return self._train(source=source, run=self._run(source.n_cells, given), checkpoint=checkpoint, resume=resume)


def listed(keys: Sequence[str] | None) -> list[str] | None:
    """Keys as a list, also where one is given by itself."""
    return None if keys is None else [keys] if isinstance(keys, str) else list(keys)
