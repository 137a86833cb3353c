"""Mapping a query onto a reference model without touching the reference (scArches, Lotfollahi et al. 2022).

New batches widen the one-hot inputs; only the weights of the new inputs are trained.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
from flax import nnx

from ..data.matrix import DiskMatrix
from ..data.names import align_genes
from ..data.source import counts_of
from ..errors import ConfigError, DataError
from ..operators.base import to_numpy
from .registry import Registry, check_setup_counts
from .state import flat_state, set_state

if TYPE_CHECKING:
    from anndata import AnnData

    from .base import Model
    from .kept import Kept

Input = tuple[str, Any]  # a one-hot input: field and category


class Frozen(NamedTuple):
    """What of the reference stays as it is while the weights of new categories are trained (scvi-tools' switches).

    dropout: is off. expression: the first layers' weights of the genes. decoder_first_layer: of the latent
    dimensions. batchnorm_encoder, batchnorm_decoder: weights and running averages. classifier: all of it.
    """

    dropout: bool
    expression: bool
    decoder_first_layer: bool
    batchnorm_encoder: bool
    batchnorm_decoder: bool
    classifier: bool

    def opens(self, name: str) -> bool:
        """Whether all of the weights `name` are trained."""
        encoder = name.startswith(("vae/encoder/", "vae/library_encoder/"))
        decoder = name.startswith("vae/decoder/network/")
        return (
            (encoder and "blocks/0/linear" in name and not self.expression)
            or (decoder and "blocks/0/linear" in name and not self.decoder_first_layer)
            or (encoder and "/norm/" in name and not self.batchnorm_encoder)
            or (decoder and "/norm/" in name and not self.batchnorm_decoder)
            or (name.startswith("classifier") and not self.classifier)
        )

    @property
    def live(self) -> tuple[str, ...]:
        """What is in train mode."""
        return tuple(
            name for name in ("dropout", "batchnorm_encoder", "batchnorm_decoder") if not getattr(self, name)
        )


def query_model(
    cls: type["Model"], adata: "AnnData", reference: "Model", *, unfrozen: bool, frozen: "Frozen", transfer_batch: bool
) -> "Model":
    """A model of the query `adata` with the reference's weights, widened by the query's new categories."""
    old = reference.registry
    check_setup_counts(adata, old.setup.get("layer"))
    new = old.extended(adata)
    if not transfer_batch and new.batches != old.batches:
        unseen = ", ".join(map(repr, new.batches[len(old.batches) :]))
        msg = f"load_query_data: transfer_batch=False, but {unseen} are no batches of the reference."
        raise DataError(msg)
    model = cls(None, registry=new, seed=reference.seed, **reference.init_params)
    weights, mask = widened(
        {name: to_numpy(leaf) for name, leaf in flat_state(reference.module).items()},
        {name: to_numpy(leaf).shape for name, leaf in flat_state(model.module).items()},
        old, new,
    )
    set_state(model.module, weights)
    params = {name for name, leaf in flat_state(model.module).items() if isinstance(leaf, nnx.Param)}
    if not unfrozen:
        open_all = np.ones((), np.float32)
        model.trainable = {name: open_all if frozen.opens(name) else m for name, m in mask.items() if name in params}
        model.live = frozen.live
    model.new_batches = np.arange(len(old.batches), len(new.batches))
    for name in cls.handed_on:
        setattr(model, name, getattr(reference, name))
    model.is_trained = reference.is_trained
    model._attach(adata)
    if reference.library_prior is not None and model.library_prior is not None:
        for ours, theirs in zip(model.library_prior, reference.library_prior, strict=True):
            ours[: len(theirs)] = theirs
        model._attach(adata)
    new.store(adata)
    return model


def widened(
    weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], old: Registry, new: Registry
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The reference's weights in the shapes of the query's module, and for each what of it is new (1, else 0).

    The weights of a new category start at the mean of the known ones of its field.
    """
    inputs_old, inputs_new = one_hot_inputs(old), one_hot_inputs(new)
    batches_old: list[Input] = [("batch", b) for b in old.batches]
    batches_new: list[Input] = [("batch", b) for b in new.batches]
    result, mask = {}, {}
    for name, shape in shapes.items():
        value = weights[name] if name in weights else np.zeros(shape, np.float32)  # by_batch, after a single batch
        if value.shape == shape:
            result[name], mask[name] = value, np.zeros((), np.float32)
        elif name.endswith("log_theta"):  # one row for each batch
            result[name], mask[name] = rows_by_name(value, batches_old, batches_new)
        elif name.endswith("by_batch"):  # a classifier's share for each batch: none for a new one
            rows, is_new = rows_by_name(value, batches_old, batches_new)
            result[name], mask[name] = np.where(is_new > 0, 0, rows), np.zeros((), np.float32)
        else:  # the one-hot inputs are the last ones of a layer
            own = len(value) - len(inputs_old)
            rows, is_new = rows_by_name(value[own:], inputs_old, inputs_new)
            result[name] = np.concatenate([value[:own], rows])
            mask[name] = np.concatenate([np.zeros_like(value[:own]), is_new])
    return result, mask


def one_hot_inputs(registry: Registry) -> list[Input]:
    """The one-hot inputs of the networks, in order; a field with one category has none."""
    fields: list[tuple[str, Sequence[Any]]] = [("batch", registry.batches), *registry.categories.items()]
    return [(field, name) for field, names in fields if len(names) > 1 for name in names]


def padded(
    adata: "AnnData", reference: "Model | str | Path", *, load: Any, only_names: bool, inplace: bool
) -> "AnnData | pd.Index | None":
    """`adata` with the reference's genes in its order; those that are missing are zero."""
    from anndata import AnnData

    model = load(reference, adata=False) if isinstance(reference, str | Path) else reference
    names = pd.Index(list(model.registry.var_names))
    if only_names:
        return names
    layer = model.registry.setup.get("layer")
    if adata.isbacked or isinstance(counts_of(adata, layer=layer), DiskMatrix):
        msg = "prepare_query_anndata: the data lie in a file; call adata.to_memory() first."
        raise DataError(msg)
    alignment = align_genes(adata.var_names, names)
    obs, var = cast("pd.DataFrame", adata.obs), cast("pd.DataFrame", adata.var)
    result = AnnData(
        None if adata.X is None else alignment.apply(adata.X), obs=obs.copy(), var=var.reindex(names),
        uns=dict(adata.uns), obsm=dict(cast("Any", adata.obsm)), obsp=dict(cast("Any", adata.obsp)),
        layers={key: alignment.apply(value) for key, value in cast("Any", adata.layers).items() if key},
    )
    if not inplace:
        return result
    adata._init_as_actual(result)
    return None


def loaded(cls: type["Kept"], reference: "Model | str | Path") -> "Model":
    """The reference model itself, or from a folder.

    Raises:
        ConfigError: it is a model of another class.
    """
    model = cls.load(reference, adata=False) if isinstance(reference, str | Path) else reference
    if type(model) is not cls:
        msg = f"load_query_data: reference_model is of class {type(model).__name__}, not {cls.__name__}."
        raise ConfigError(msg)
    return model


def rows_by_name(value: np.ndarray, old: list[Input], new: list[Input]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of weights of the inputs `new` out of those of `old`, and which of them are new."""
    place = {entry: i for i, entry in enumerate(old)}
    known_fields = {field for field, _ in old}
    rows = np.zeros((len(new), *value.shape[1:]), value.dtype)
    is_new = np.zeros_like(rows)
    for i, entry in enumerate(new):
        if entry in place:
            rows[i] = value[place[entry]]
            continue
        same_field = [j for (field, _), j in place.items() if field == entry[0]]
        if same_field:
            rows[i] = value[same_field].mean(0)
        # a field that had one category had no inputs: its first category stays without effect
        first = entry == next(e for e in new if e[0] == entry[0])
        is_new[i] = not (first and entry[0] not in known_fields)
    return rows, is_new
