"""Models of scvi-tools, after its user has exported them: the same networks with the same weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import storage
from ..errors import ModelFileError
from ..nn.count_vae import Encoder
from ..nn.mlp import MLP
from . import export_scvi_tools
from .registry import Registry
from .scanvi import SCANVI
from .scvi import SCVI

if TYPE_CHECKING:
    from anndata import AnnData

# arguments of scvi-tools that our models lack, and the value at which they change nothing
ONLY: dict[str, tuple[Any, ...]] = {
    "latent_distribution": ("normal",),
    "batch_representation": ("one-hot",),
    "use_labels_groups": (False,),  # scvi-tools 1.1 to 1.4 divide logits there, which gives no probabilities
    "var_activation": (None,),
    "extra_encoder_kwargs": (None, {}),
    "extra_decoder_kwargs": (None, {}),
}
# what scvi-tools takes where its file names no value; our defaults may differ
THEIR_DEFAULTS: dict[str, Any] = {
    "n_hidden": 128, "n_latent": 10, "n_layers": 1, "dropout_rate": 0.1, "dispersion": "gene",
    "gene_likelihood": "zinb", "use_observed_lib_size": True, "log_variational": True, "encode_covariates": False,
    "deeply_inject_covariates": True, "use_batch_norm": "both", "use_layer_norm": "none",
}  # fmt: skip
# arguments whose effect is all in the weights, or that concern training alone
IN_THE_WEIGHTS = frozenset({
    "extra_payload_autotune", "batch_embedding_kwargs", "y_prior",
    "library_log_means", "library_log_vars", "labels_groups", "use_labels_groups",
})  # fmt: skip


def from_scvi_tools(folder: str | Path, adata: "AnnData | None" = None) -> SCVI | SCANVI:
    """Reads a model of scvi-tools that `export_scvi_tools.py` has written; nothing is unpickled here.

    Run the script, which is a file of this package and needs nothing else of it, where scvi-tools is installed:

        python .../diffbio/models/export_scvi_tools.py MODEL_FOLDER OUTPUT_FOLDER

    The model gives what scvi-tools' model gives.

    Args:
        folder: OUTPUT_FOLDER.
        adata: the data to go on with, set up or not; its genes and categories have to be those of the model.

    Returns:
        The model; its `module` is the network.

    Raises:
        ModelFileError: the folder is none, is damaged, or holds a model that has no counterpart here.
        DataError: `adata` does not fit the model.
    """
    header, arrays = _read(Path(folder))
    kind = header["model"]
    setup, init = _setup(header), _init_params(header)
    labels = header["labels"] if setup["labels_key"] else ()
    registry = Registry(
        model=kind,
        setup=setup,
        var_names=tuple(header["var_names"]),
        batches=tuple(header["batches"]) if setup["batch_key"] else (),
        labels=tuple(name for name in labels if name != setup.get("unlabeled_category")),
        categories={key: tuple(names) for key, names in header["categories"].items()},
    )
    if kind == "SCANVI":
        prior = arrays["y_prior"].ravel()
        init["y_prior"] = None if np.ptp(prior) == 0 else [float(p) for p in prior]
    model = {"SCVI": SCVI, "SCANVI": SCANVI}[kind](None, registry=registry, **init)
    take_weights(model.module, arrays)
    if "library_log_means" in arrays:
        model.library_prior = arrays["library_log_means"].ravel(), arrays["library_log_vars"].ravel()
    model.is_trained = header["is_trained"]
    if adata is not None:
        model._check_var_names(adata)
        registry.store(adata)
        model._attach(adata)
    return model


def take_weights(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives an nn.SCVI or nn.SCANVI the weights of scvi-tools' module, by the names of its state_dict.

    Raises:
        ModelFileError: weights are missing, or of another shape.
    """
    weights = _Weights(arrays)
    vae: Any = module.vae  # type: ignore[attr-defined]
    decoder = vae.decoder
    weights.encoder(vae.encoder, "z_encoder", "encoder")
    if vae.library_encoder is not None:
        weights.encoder(vae.library_encoder, "l_encoder", "encoder")
    weights.network(decoder.network, "decoder.px_decoder")
    weights.linear(decoder.fraction, "decoder.px_scale_decoder.0")
    if decoder.extra_zeros is not None:
        weights.linear(decoder.extra_zeros, "decoder.px_dropout_decoder")
    if decoder.cell_theta is not None:
        weights.linear(decoder.cell_theta, "decoder.px_r_decoder")
    if decoder.log_theta is not None:
        weights.set(decoder.log_theta, "px_r", arrays["px_r"].T)  # one row per group, there one column
    classifier: Any = getattr(module, "classifier", None)
    if classifier is not None:
        hidden = len(classifier.network.blocks) > 0
        weights.network(classifier.network, "classifier.classifier.0")
        weights.linear(classifier.logits, f"classifier.classifier.{int(hidden)}")
        weights.encoder(module.encoder_z2_z1, "encoder_z2_z1", "encoder")  # type: ignore[attr-defined]
        weights.encoder(module.decoder_z1_z2, "decoder_z1_z2", "decoder")  # type: ignore[attr-defined]


class _Weights:
    """Copies torch's parameters into the parts of a module."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    def get(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            msg = f"from_scvi_tools: the exported model lacks {name!r}; export it again, with scvi-tools 0.15 or newer."
            raise ModelFileError(msg)
        return self.arrays[name]

    def set(self, variable: nnx.Variable[Any] | None, name: str, value: np.ndarray) -> None:
        assert variable is not None
        if variable[...].shape != value.shape:
            msg = (
                f"from_scvi_tools: {name} of the exported model has shape {value.shape}, where its settings say "
                f"{variable[...].shape}; diffbio does not know such a model."
            )
            raise ModelFileError(msg)
        variable.set_value(jnp.asarray(value, jnp.float32))

    def linear(self, layer: nnx.Linear, name: str) -> None:
        self.set(layer.kernel, name, self.get(f"{name}.weight").T)
        self.set(layer.bias, name, self.get(f"{name}.bias"))

    def encoder(self, part: Encoder, name: str, kind: str) -> None:
        self.network(part.network, f"{name}.{kind}")
        self.linear(part.mean, f"{name}.mean_{kind}")
        self.linear(part.logvar, f"{name}.var_{kind}")

    def network(self, mlp: MLP, name: str) -> None:
        for i, block in enumerate(mlp.blocks):
            layer = f"{name}.fc_layers.Layer {i}"
            self.set(block.linear.kernel, layer, self.get(f"{layer}.0.weight").T)
            bias, norm = self.get(f"{layer}.0.bias"), block.norm
            if norm is None:
                self.set(block.linear.bias, layer, bias)
                continue
            mean, var, scale, shift = (
                self.get(f"{layer}.1.{part}") for part in ("running_mean", "running_var", "weight", "bias")
            )
            # our layers have no bias in front of the norm
            for variable, value in ((norm.mean, mean - bias), (norm.var, var), (norm.scale, scale), (norm.bias, shift)):
                self.set(variable, layer, value)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if (folder / "model.pt").is_file():
        msg = (
            f"from_scvi_tools: {folder} is a pickle, which diffbio never reads. Where scvi-tools is installed, run "
            f"python {export_scvi_tools.__file__} {folder} OUTPUT_FOLDER, then read OUTPUT_FOLDER."
        )
        raise ModelFileError(msg)
    header, arrays = storage.load_folder(folder)
    if header.get("kind") != "scvi-tools":
        msg = f"from_scvi_tools: {folder} is a model of diffbio; read it with {header.get('model', 'SCVI')}.load."
        raise ModelFileError(msg)
    if header["model"] not in {"SCVI", "SCANVI"}:
        msg = f"from_scvi_tools: {folder} holds a {header['model']}; SCVI and SCANVI can be read."
        raise ModelFileError(msg)
    return header, arrays


def _setup(header: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `setup_anndata`, those of ours alone."""
    ours = ["layer", "batch_key", "labels_key", "size_factor_key"]
    ours += ["categorical_covariate_keys", "continuous_covariate_keys"]
    ours += ["unlabeled_category"] if header["model"] == "SCANVI" else []
    return {key: header["setup_args"].get(key) or None for key in ours}


def _init_params(header: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(header["init_params"])
    for name, allowed in ONLY.items():
        if name in given and given[name] not in allowed:
            msg = f"from_scvi_tools: the model has {name}={given[name]!r}, which diffbio does not have."
            raise ModelFileError(msg)
    known = {*THEIR_DEFAULTS, "linear_classifier", "classifier_parameters"}
    if odd := sorted(set(given) - known - set(ONLY) - IN_THE_WEIGHTS):
        msg = f"from_scvi_tools: the model has the arguments {', '.join(odd)}, which diffbio does not know."
        raise ModelFileError(msg)
    kept = THEIR_DEFAULTS | {name: value for name, value in given.items() if name in known}
    if header["model"] == "SCANVI":
        kept.setdefault("linear_classifier", False)  # scvi-tools' default
        kept["classifier_parameters"] = {"by_batch": False, **(kept.get("classifier_parameters") or {})}
    if kept.get("classifier_parameters"):
        kept["classifier_parameters"] = {k: v for k, v in kept["classifier_parameters"].items() if k != "logits"}
    return kept
