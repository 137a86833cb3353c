"""Arguments of scvi-tools that have no counterpart: refused with what to do instead, never dropped in silence."""

from collections.abc import Mapping
from typing import Any

import jax

from ..errors import ConfigError
from ..parallel import Devices

INSTEAD = {
    "dataloader": "pass adata= (it may be backed by a file) and indices=; cells are read in chunks of batch_size",
    "data_loader_kwargs": "batch_size= is the size of the chunks that cells are read in",
    "datamodule": "set up an AnnData; backed by a file, it is read in minibatches",
    "registry": "pass adata=, set up by setup_anndata; a saved model brings its registry along",
    "datasplitter_kwargs": "pass train_size=, validation_size=, shuffle_set_split= and batch_size=; "
    "the last, incomplete minibatch of an epoch is always left out",
    "adversarial_classifier": "the models have none; batches are told to the decoder",
    "logger": "history holds the numbers of every epoch",
    "callbacks": "history, checkpoint=, early_stopping= and seed= take their place",
    "enable_checkpointing": "pass checkpoint= the folder to save to, and resume=True to go on",
    "ckpt_path": "pass checkpoint= the folder and resume=True",
    "default_root_dir": "pass checkpoint= the folder to save to",
    "log_every_n_steps": "history has one row per epoch",
    "log_save_dir": "history is saved with the model",
    "strategy": "pass devices=; several processes are joined by diffbio.parallel",
    "num_nodes": "several processes are joined by diffbio.parallel",
    "precision": "weights are float32; in a block of jax.enable_x64(True) they are float64",
    "max_steps": "pass max_epochs=",
    "max_time": "pass checkpoint= and stop the run; resume=True goes on",
    "gradient_clip_algorithm": "gradient_clip_val= bounds the norm",
    "accumulate_grad_batches": "pass a larger batch_size=",
    "deterministic": "the same seed= gives the same weights anyway",
    "benchmark": "XLA compiles one program for all minibatches anyway",
    "early_stopping_warmup_epochs": "pass early_stopping_patience=; the best weights are kept, whenever they came",
    "simple_progress_bar": "progress= shows or hides it",
    "progress_bar_refresh_rate": "progress= shows or hides it",
    "learning_rate_monitor": "plan_kwargs lr_schedule and lr_warmup say how the rate goes",
    "prefix": "give every model a folder of its own",
    "backup_url": "download the folder first, then load it",
    "allowed_classes_names_list": "nothing is unpickled: a model is JSON and safetensors",
    "save_kwargs": "weights are written as safetensors",
    "legacy_mudata_format": "the models take AnnData",
    "ig_interpretability": "differentiate model.module.classify by the counts with jax.grad",
    "ig_args": "differentiate model.module.classify by the counts with jax.grad",
    "latent_distribution": "'normal' is the one there is; 'ln' is the softmax of z",
    "batch_representation": "'one-hot' is the one there is",
    "batch_embedding_kwargs": "batches are one-hot inputs",
    "var_activation": "variances are exponentials of what the encoder gives",
    "extra_encoder_kwargs": "n_hidden, n_layers, dropout_rate, use_batch_norm and use_layer_norm shape it",
    "extra_decoder_kwargs": "n_hidden, n_layers, use_batch_norm and use_layer_norm shape it",
    "extra_payload_autotune": "history holds what a search needs",
    "library_log_means": "they are taken from the data, by batch",
    "library_log_vars": "they are taken from the data, by batch",
    "use_size_factor_key": "pass size_factor_key= to setup_anndata",
    "use_observed_batches": "pass batch_correction=False",
    "use_gpu": "JAX computes on the device that it is installed for",
    "use_cuda": "JAX computes on the device that it is installed for",
    "frequency": "held-out cells are looked at after every epoch",
}
# the value at which an argument changes nothing
NO_CHANGE: dict[str, tuple[Any, ...]] = {
    "latent_distribution": ("normal",),
    "batch_representation": ("one-hot",),
    "enable_checkpointing": (False,),
    "early_stopping_warmup_epochs": (0,),
    "ig_interpretability": (False,),
    "extra_payload_autotune": (False,),
    "legacy_mudata_format": (False,),
    "simple_progress_bar": (True, False),
    "learning_rate_monitor": (False,),
    "deterministic": (True,),
    "benchmark": (True, False),
    "strategy": ("auto",),
    "num_nodes": (1,),
    "logger": (False,),
}
# verbs of scvi-tools' models that are somewhere else, or that there is no use for
ELSEWHERE = {
    "get_importance_weights": "pass weights='importance' to differential_expression or get_normalized_expression",
    "get_batch_representation": "batches are one-hot inputs here, without an embedding",
    "convert_legacy_save": "models of scvi-tools are read by diffbio.models.from_scvi_tools",
    "prepare_query_mudata": "the models take AnnData: prepare_query_anndata",
    "get_ranked_features": "differentiate model.module.classify by the counts with jax.grad",
    "shap_predict": "differentiate model.module.classify by the counts with jax.grad",
    "shap_adata_predict": "differentiate model.module.classify by the counts with jax.grad",
    "adata_manager": "model.registry says how the data are read",
    "get_anndata_manager": "model.registry says how the data are read",
    "register_manager": "setup_anndata notes all there is in adata.uns",
    "deregister_manager": "setup_anndata notes all there is in adata.uns",
    "get_state_registry": "model.registry has batches, labels and categories",
    "transfer_fields": "other AnnData need no setup: pass them as adata=",
    "data_registry": "model.view_anndata_setup() says where data are read from",
    "update_setup_method_args": "call setup_anndata again",
    "get_normalized_function_name": "get_normalized_expression",
    "run_id": "save the model under a name",
    "run_name": "save the model under a name",
}


def refuse(who: str, given: Mapping[str, Any]) -> None:
    """Refuses arguments that are not None and not at the value at which they change nothing.

    Raises:
        ConfigError: naming the argument and what takes its place.
    """
    for name, value in given.items():
        idle = NO_CHANGE.get(name, ())
        if value is None or (isinstance(value, Mapping) and not value) or any(value is v or value == v for v in idle):
            continue
        hint = INSTEAD.get(name)
        if hint is None:
            msg = f"{who}: unknown argument {name}={value!r:.60}."
        else:
            msg = f"{who}: {name}={value!r:.60} is of scvi-tools and not of diffbio: {hint}."
        raise ConfigError(msg)


def devices_of(who: str, accelerator: Any, devices: Any) -> Devices:
    """scvi-tools' names for devices as `diffbio.train.train` takes them.

    accelerator: 'auto', or the name of the backend that JAX runs on.
    devices: 'auto', a number, '1', -1, a list of numbers or of JAX devices.

    Raises:
        ConfigError: JAX runs on something else, or there is no such device.
    """
    backend = jax.default_backend()
    names = {"auto", backend, *({"gpu", "cuda"} if backend in {"gpu", "cuda", "rocm"} else ())}
    if accelerator is not None and accelerator not in names:
        msg = (
            f"{who}: accelerator={accelerator!r}, but JAX computes on {backend!r}: leave it at 'auto', and install "
            "JAX for the device you mean."
        )
        raise ConfigError(msg)
    if devices is None or devices == "auto":
        return None
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        return int(devices)
    if isinstance(devices, list | tuple) and devices and all(isinstance(d, int) for d in devices):
        there = jax.local_devices()
        if not all(0 <= d < len(there) for d in devices):
            msg = f"{who}: devices={devices!r}, but JAX sees {len(there)}, numbered from 0."
            raise ConfigError(msg)
        return [there[d] for d in devices]
    if isinstance(devices, int) or (isinstance(devices, list | tuple) and devices):
        found: Devices = devices
        return found
    msg = f"{who}: devices must be 'auto', a number, or a list of devices, got {devices!r}."
    raise ConfigError(msg)


def merged(who: str, config: Any, given: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """scvi-tools' *_config under the arguments that were given by themselves.

    Raises:
        ConfigError: it is no mapping.
    """
    if config is not None and not isinstance(config, Mapping):
        msg = f"{who}: {name} must be a dict, got {type(config).__name__}."
        raise ConfigError(msg)
    return {**(config or {}), **(given or {})}
