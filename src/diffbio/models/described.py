"""What a model says of itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..errors import ConfigError
from . import saved
from .cells import counts_of_rows
from .kept import Kept
from .peer import ELSEWHERE, refuse
from .registry import Registry

if TYPE_CHECKING:
    from anndata import AnnData


class Described(Kept):
    """A model that tells its settings, its registry and its device."""

    @property
    def summary_string(self) -> str:
        """Settings, size and state, as `print(model)` shows them."""
        settings = ", ".join(f"{key}: {value}" for key, value in self.init_params.items())
        return (
            f"{type(self).__name__} model with the following parameters:\n{settings}.\n"
            f"{len(self.registry.var_names)} genes, {max(len(self.registry.batches), 1)} batches, "
            f"{len(self.registry.labels)} labels\n"
            f"Training status: {'Trained' if self.is_trained else 'Not Trained'}\n"
            f"Model's adata is minified?: {self.is_minified}"
        )

    def __repr__(self) -> str:
        return self.summary_string

    def __getattr__(self, name: str) -> Any:
        who = type(self).__name__
        if name in ELSEWHERE:
            msg = f"{who}.{name} is of scvi-tools and not of diffbio: {ELSEWHERE[name]}."
        else:
            msg = f"{who!r} object has no attribute {name!r}"
        raise AttributeError(msg)

    @property
    def device(self) -> jax.Device:
        """The device that answers are computed on."""
        found: jax.Device = jax.local_devices()[0]
        return found

    def to_device(self, device: Any) -> None:
        """Accepts the device that JAX computes on, and refuses others: JAX_PLATFORMS chooses it."""
        backend = jax.default_backend()
        names = {"auto", backend, str(self.device), *(("cuda",) if backend == "gpu" else ())}
        if str(device).split(":")[0] not in names:
            msg = f"to_device: JAX computes on {backend!r}, got {device!r}; choose by JAX_PLATFORMS."
            raise ConfigError(msg)

    def get_setup_arg(self, setup_arg: str) -> Any:
        """The argument of that name that `setup_anndata` was given.

        Raises:
            ConfigError: there is no such argument.
        """
        if setup_arg not in self.registry.setup:
            msg = f"get_setup_arg: no argument {setup_arg!r}; there are {', '.join(self.registry.setup)}."
            raise ConfigError(msg)
        return self.registry.setup[setup_arg]

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray:  # noqa: FBT001, FBT002
        """Names of the genes, in order."""
        refuse("get_var_names", {"legacy_mudata_format": legacy_mudata_format})
        return np.array(self.registry.var_names)

    def get_from_registry(self, adata: "AnnData", registry_key: str) -> Any:
        """What the model reads of `adata`: 'X', 'batch', 'labels', 'extra_categorical_covs',
        'extra_continuous_covs' or 'size_factor'; codes are those of the model.

        Raises:
            ConfigError: the model reads no such thing.
        """  # noqa: D205
        cells = self.cells(adata)
        if registry_key == "X" and cells.counts is not None:
            return counts_of_rows(cells.counts, np.arange(cells.n_cells))
        names = {
            "batch": "batch_labels", "labels": "labels", "extra_categorical_covs": "cat_covs",
            "extra_continuous_covs": "cont_covs", "size_factor": "size_factor",
        }
        column = cells.columns.get(names.get(registry_key, ""))
        if column is None and registry_key == "batch":
            column = np.zeros(cells.n_cells, np.int32)
        if column is None:
            there = ["X", *(key for key, name in names.items() if name in cells.columns)]
            msg = f"get_from_registry: nothing is read as {registry_key!r}; there are {', '.join(there)}."
            raise ConfigError(msg)
        return column.reshape(cells.n_cells, -1)

    def view_registry(self, hide_state_registries: bool = False) -> None:  # noqa: FBT001, FBT002
        """Prints what `setup_anndata` was given, and what it found unless that is hidden."""
        self.view_setup_method_args()
        if not hide_state_registries:
            print(self.view_anndata_setup().to_string(index=False))

    def view_setup_method_args(self) -> None:
        """Prints the arguments that `setup_anndata` was given."""
        print(f"Setup via {self.registry.model}.setup_anndata with arguments:")
        print("\n".join(f"  {key}: {value!r}" for key, value in self.registry.setup.items()))

    @staticmethod
    def load_registry(dir_path: str | Path, prefix: None = None) -> Registry:
        """The registry of a saved model.

        Raises:
            ModelFileError: the folder is damaged.
        """
        refuse("load_registry", {"prefix": prefix})
        return saved.registry_of(dir_path)

    @staticmethod
    def view_setup_args(dir_path: str | Path, prefix: None = None) -> None:
        """Prints the arguments that `setup_anndata` was given before the model in `dir_path` was trained."""
        refuse("view_setup_args", {"prefix": prefix})
        for key, value in saved.registry_of(dir_path).setup.items():
            print(f"{key}: {value!r}")
