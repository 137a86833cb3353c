"""The seed of models that are given none."""

from typing import Any

from ..errors import ConfigError


class Defaults:
    """scvi-tools' `settings`, of which there is one here: `seed`, of models made afterwards without seed=."""

    def __init__(self) -> None:
        super().__setattr__("seed", None)

    seed: int | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {"verbosity", "progress_bar_style", "warnings_stacklevel"}:
            return  # what is written to the screen
        if name != "seed":
            instead = {"batch_size": "pass batch_size= to the call", "dl_num_workers": "files are read ahead anyway"}
            hint = instead.get(name, "seed is the one setting there is")
            msg = f"settings.{name} is of scvi-tools and not of diffbio: {hint}."
            raise ConfigError(msg)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            msg = f"settings.seed must be a whole number from 0 or None, got {value!r}."
            raise ConfigError(msg)
        super().__setattr__(name, value)


settings = Defaults()
