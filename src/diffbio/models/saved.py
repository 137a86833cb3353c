"""Models in folders: JSON and safetensors, no pickle."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import storage
from ..errors import ModelFileError, OutputError
from ..history import History
from ..operators.base import to_numpy
from .registry import Registry
from .state import flat_state, set_state

if TYPE_CHECKING:
    from anndata import AnnData

    from .base import Model


def write(model: "Model", dir_path: str | Path, *, adata: "AnnData | None" = None, **how: Any) -> Path:
    """What `Model.save` writes: arguments, registry and history as JSON, weights as arrays, and `adata` beside them.

    how: arguments of `AnnData.write_h5ad`.
    """
    header = {
        "kind": "model",
        "model": type(model).__name__,
        "registry": model.registry.to_json(),
        "init_params": model.init_params,
        "seed": model.seed,
        "is_trained": model.is_trained,
        "live": list(model.live),
        "history": {"rows": model.training_history.rows, "best_epoch": model.training_history.best_epoch,
                    "stopped_early": model.training_history.stopped_early},
    }
    arrays = {f"module/{name}": to_numpy(leaf) for name, leaf in flat_state(model.module).items()}
    arrays |= {f"trainable/{name}": np.asarray(value) for name, value in (model.trainable or {}).items()}
    notes = {name: getattr(model, name) for name in model.saved_notes}
    arrays |= {name: np.asarray(value) for name, value in notes.items() if value is not None}
    if model.library_prior is not None:
        arrays["library_mean"], arrays["library_var"] = model.library_prior
    folder = storage.save_folder(dir_path, header, arrays)
    if adata is not None:
        try:
            adata.write_h5ad(folder / storage.DATA, **how)
        except OSError as error:
            msg = f"save: cannot write {folder / storage.DATA}: {error}."
            raise OutputError(msg) from error
    return folder


def data_of(dir_path: str | Path) -> "AnnData | None":
    """The AnnData that was saved along with a model; None if there was none."""
    path = Path(dir_path) / storage.DATA
    if not path.is_file():
        return None
    from anndata import read_h5ad

    return read_h5ad(path)


def registry_of(dir_path: str | Path) -> Registry:
    """The registry of a saved model.

    Raises:
        ModelFileError: the folder is damaged or holds something else.
    """
    header, _ = storage.load_folder(dir_path)
    if not isinstance(header.get("registry"), dict):
        msg = f"load: {dir_path} holds {header.get('model') or header.get('operator')!r}, which has no registry."
        raise ModelFileError(msg)
    return Registry.from_json(header["registry"])


def read(cls: type["Model"], dir_path: str | Path) -> "Model":
    """The model in a folder, without data.

    Raises:
        ModelFileError: the folder is damaged or holds another kind of model.
    """
    if (Path(dir_path) / "model.pt").is_file():
        msg = (
            f"load: {dir_path} holds a model of scvi-tools, a pickle, which diffbio never reads; see "
            "diffbio.models.from_scvi_tools."
        )
        raise ModelFileError(msg)
    header, arrays = storage.load_folder(dir_path)
    if header.get("model") != cls.__name__:
        msg = f"load: {dir_path} holds {header.get('model') or header.get('operator')!r}, not {cls.__name__}."
        raise ModelFileError(msg)
    try:
        registry, history = Registry.from_json(header["registry"]), History(**header["history"])
        model = cls(None, registry=registry, seed=int(header["seed"]), **header["init_params"])
        model.live = tuple(header.get("live", ()))
        model.is_trained, model.training_history = bool(header["is_trained"]), history
        set_state(model.module, {k[7:]: v for k, v in arrays.items() if k.startswith("module/")})
    except (KeyError, TypeError, ValueError) as error:
        msg = f"load: {dir_path} does not fit {cls.__name__}: {error}"
        raise ModelFileError(msg) from error
    model.trainable = {k[10:]: v for k, v in arrays.items() if k.startswith("trainable/")} or None
    for name in cls.saved_notes:
        if name in arrays:
            setattr(model, name, arrays[name])
    if "library_mean" in arrays:
        model.library_prior = arrays["library_mean"], arrays["library_var"]
    return model
