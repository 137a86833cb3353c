"""A model on disk, a query mapped onto it, and data that hold its latent posterior in place of counts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from scipy import sparse

from ..chunks import joined
from ..errors import ConfigError, DataError
from . import posterior, saved, surgery
from .base import MINIFIED_TYPE, Model
from .cells import LATENT_MEAN, LATENT_VAR, LIBRARY
from .peer import devices_of, refuse
from .registry import MINIFIED

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


class Kept(Model):
    """A model that is saved, loaded, minified, and mapped onto."""

    def save(
        self,
        dir_path: str | Path,
        prefix: None = None,
        overwrite: bool = False,  # noqa: FBT001, FBT002 - scvi-tools' signature
        save_anndata: bool = False,  # noqa: FBT001, FBT002
        save_kwargs: None = None,
        legacy_mudata_format: bool = False,  # noqa: FBT001, FBT002
        datamodule: None = None,
        **anndata_write_kwargs: Any,
    ) -> Path:
        """Writes settings, registry, history and weights to the folder `dir_path` (JSON and safetensors).

        Args:
            dir_path: made if it is not there.
            prefix: of scvi-tools; refused, like save_kwargs, legacy_mudata_format and datamodule.
            overwrite: replaces a model that is there.
            save_anndata: writes the model's AnnData beside it, as adata.h5ad, which `load` finds.
            save_kwargs: see above.
            legacy_mudata_format: see above.
            datamodule: see above.
            anndata_write_kwargs: of `AnnData.write_h5ad`, such as compression='gzip'.

        Raises:
            OutputError: something stands there that is not a model, or it cannot be written.
            ConfigError: a model stands there, and overwrite is off.
        """
        refuse("save", {
            "prefix": prefix, "save_kwargs": save_kwargs, "legacy_mudata_format": legacy_mudata_format,
            "datamodule": datamodule,
        })
        if anndata_write_kwargs and not save_anndata:
            msg = f"save: {', '.join(anndata_write_kwargs)} concern save_anndata=True; pass it, or leave them out."
            raise ConfigError(msg)
        if save_anndata and self.adata is None:
            msg = "save: the model was loaded without data, so that save_anndata=True has nothing to write."
            raise ConfigError(msg)
        if not overwrite and Path(dir_path).exists():
            msg = f"save: {dir_path} exists; pass overwrite=True to replace it."
            raise ConfigError(msg)
        return saved.write(self, dir_path, adata=self.adata if save_anndata else None, **anndata_write_kwargs)

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: "AnnData | bool | None" = None,
        accelerator: str = "auto",
        device: Any = "auto",
        prefix: None = None,
        backup_url: None = None,
        datamodule: None = None,
        allowed_classes_names_list: None = None,
    ) -> Self:
        """Reads a model that `save` wrote; no data is needed until it is asked about cells.

        Args:
            dir_path: the folder.
            adata: the data to go on with; its genes and categories have to be those of the model. None takes those
                that were saved along, if any; False takes none.
            accelerator: 'auto', or the backend that JAX runs on.
            device: the same.
            prefix: of scvi-tools; refused, like the following.
            backup_url: see above.
            datamodule: see above.
            allowed_classes_names_list: see above.

        Raises:
            ModelFileError: the folder is damaged or holds another kind of model.
            DataError: `adata` does not fit the model.
        """
        refuse("load", {
            "prefix": prefix, "backup_url": backup_url, "datamodule": datamodule,
            "allowed_classes_names_list": allowed_classes_names_list,
        })
        devices_of("load", accelerator, device)
        model = saved.read(cls, dir_path)
        assert isinstance(model, cls)
        if adata is None:
            adata = saved.data_of(dir_path)
        if adata is True:
            msg = "load: adata must be an AnnData, None for what was saved along, or False for none, got True."
            raise ConfigError(msg)
        if adata is not None and adata is not False:
            model._check_var_names(adata)
            model.registry.store(adata)
            model._attach(adata)
        return model

    def _check_var_names(self, adata: "AnnData") -> None:
        names = tuple(map(str, adata.var_names))
        if names != self.registry.var_names:
            shared = len(set(names) & set(self.registry.var_names))
            msg = (
                f"load: the AnnData has {len(names)} genes, {shared} of the model's {len(self.registry.var_names)}, "
                "or in another order; subset it to the model's genes, or use load_query_data."
            )
            raise DataError(msg)

    # -- mapping a query -------------------------------------------------------------------------------------------

    @classmethod
    def load_query_data(
        cls,
        adata: "AnnData | None" = None,
        reference_model: "Self | str | Path | None" = None,
        registry: None = None,
        inplace_subset_query_vars: bool = False,  # noqa: FBT001, FBT002 - scvi-tools' signature
        accelerator: str = "auto",
        device: Any = "auto",
        unfrozen: bool = False,  # noqa: FBT001, FBT002
        freeze_dropout: bool = True,  # noqa: FBT001, FBT002
        freeze_expression: bool = True,  # noqa: FBT001, FBT002
        freeze_decoder_first_layer: bool = True,  # noqa: FBT001, FBT002
        freeze_batchnorm_encoder: bool = True,  # noqa: FBT001, FBT002
        freeze_batchnorm_decoder: bool = True,  # noqa: FBT001, FBT002
        freeze_classifier: bool = True,  # noqa: FBT001, FBT002
        transfer_batch: bool = True,  # noqa: FBT001, FBT002
        datamodule: None = None,
    ) -> Self:
        """A model of a query, `adata`, with the reference's weights: scArches (Lotfollahi et al. 2022).

        New batches and categories get inputs of their own, which start as an average known one; `train` of the
        new model moves their weights alone, so that reference cells keep their embedding. Genes are found by
        name. `adata` needs no setup; it may lack labels.

        Args:
            adata: the query, with the columns that the reference was set up with.
            reference_model: a model of this class, or the folder of a saved one.
            registry: of scvi-tools; refused.
            inplace_subset_query_vars: gives `adata` the reference's genes first, see `prepare_query_anndata`.
            accelerator: 'auto', or the backend that JAX runs on.
            device: the same.
            unfrozen: `train` moves all weights.
            freeze_dropout: no dropout while the new weights are trained. False, like the following, lets `train`
                move more than the new weights; reference cells then do not keep their embedding.
            freeze_expression: the first layers' weights of the genes stay.
            freeze_decoder_first_layer: the decoder's first layer stays.
            freeze_batchnorm_encoder: the encoder's batch norms stay.
            freeze_batchnorm_decoder: the decoder's batch norms stay (True; scvi-tools moves them).
            freeze_classifier: the classifier stays.
            transfer_batch: False refuses batches that the reference does not have.
            datamodule: of scvi-tools; refused.

        Raises:
            DataError: the query lacks a column, or more than a fifth of the genes.
            ConfigError: the reference is of another class.

        Warns:
            DataWarning: genes are missing and taken as zero.
        """
        refuse("load_query_data", {"registry": registry, "datamodule": datamodule})
        devices_of("load_query_data", accelerator, device)
        if adata is None or reference_model is None:
            msg = "load_query_data: pass adata=, the query, and reference_model=, a model or the folder of one."
            raise ConfigError(msg)
        reference = surgery.loaded(cls, reference_model)
        if inplace_subset_query_vars:
            surgery.padded(adata, reference, load=cls.load, only_names=False, inplace=True)
        frozen = surgery.Frozen(
            dropout=freeze_dropout, expression=freeze_expression, decoder_first_layer=freeze_decoder_first_layer,
            batchnorm_encoder=freeze_batchnorm_encoder, batchnorm_decoder=freeze_batchnorm_decoder,
            classifier=freeze_classifier,
        )
        query = surgery.query_model(
            cls, adata, reference, unfrozen=unfrozen, frozen=frozen, transfer_batch=transfer_batch
        )
        assert isinstance(query, cls)
        return query

    @classmethod
    def prepare_query_anndata(
        cls,
        adata: "AnnData",
        reference_model: "Self | str | Path",
        return_reference_var_names: bool = False,  # noqa: FBT001, FBT002 - scvi-tools' signature
        inplace: bool = True,  # noqa: FBT001, FBT002
    ) -> Any:
        """Gives `adata` the reference's genes in its order; missing ones are zero, with a warning.

        Args:
            adata: the query.
            reference_model: a model, or the folder of a saved one.
            return_reference_var_names: returns the names of the genes and does nothing else.
            inplace: changes `adata`; otherwise returns a new one.

        Raises:
            DataError: more than a fifth of the genes are missing.
        """
        return surgery.padded(
            adata, reference_model, load=cls.load, only_names=return_reference_var_names, inplace=inplace
        )

    # -- minified data --------------------------------------------------------------------------------------------

    def minify_adata(
        self,
        minified_data_type: str = MINIFIED_TYPE,
        use_latent_qzm_key: str = LATENT_MEAN,
        use_latent_qzv_key: str = LATENT_VAR,
    ) -> None:
        """Replaces the model's AnnData by one with the latent posterior in place of the counts.

        `model.adata` is a new AnnData: an empty X, `obsm["X_latent_qzm"]` and `obsm["X_latent_qzv"]` (mean and
        variance of q(z | x)), `obs["diffbio_library"]`, and all of obs, var and uns. What needs counts raises
        afterwards. What is in `obsm` under these names before is not read: the posterior is computed.

        Raises:
            ConfigError: another minified_data_type, or other keys.
            DataError: the data are minified already.
        """
        from anndata import AnnData

        if minified_data_type != MINIFIED_TYPE:
            with_counts = f"{MINIFIED_TYPE}_with_counts"
            hint = "; an AnnData that keeps its counts needs none of it" if minified_data_type == with_counts else ""
            msg = f"minify_adata: minified_data_type must be {MINIFIED_TYPE!r}, got {minified_data_type!r}{hint}."
            raise ConfigError(msg)
        if (use_latent_qzm_key, use_latent_qzv_key) != (LATENT_MEAN, LATENT_VAR):
            msg = (
                f"minify_adata: the posterior is computed and written to obsm[{LATENT_MEAN!r}] and "
                f"obsm[{LATENT_VAR!r}]; leave use_latent_qzm_key and use_latent_qzv_key out."
            )
            raise ConfigError(msg)
        latent = joined(self.evaluate(posterior.latents, needs_counts="minify_adata"))
        size = joined(self.evaluate(posterior.library))["mean"]
        adata = self.adata
        assert adata is not None
        small = AnnData(
            sparse.csr_matrix(adata.shape, dtype=np.float32), obs=cast("pd.DataFrame", adata.obs).copy(),
            var=cast("pd.DataFrame", adata.var).copy(), uns=dict(adata.uns), obsm=dict(cast("Any", adata.obsm)),
        )
        small.obsm[LATENT_MEAN], small.obsm[LATENT_VAR] = latent["mean"], latent["var"]
        small.obs[LIBRARY] = size
        small.uns[MINIFIED] = MINIFIED_TYPE
        self._attach(small)
