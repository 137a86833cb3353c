"""scvi-tools' layout, so that of a script for it the import alone changes.

`from diffbio.models import as_scvi as scvi`, in place of `import scvi`, brings `scvi.model.SCVI`,
`scvi.model.SCANVI` and `scvi.settings.seed`.
"""

from typing import Any

from .. import __version__ as __version__
from .. import models as model
from .seeds import settings as settings

__all__ = ["model", "settings"]


def __getattr__(name: str) -> Any:
    if name in {"autotune", "criticism", "data", "dataloaders", "external", "hub", "module"}:
        msg = f"scvi.{name} has no counterpart: diffbio.models has SCVI and SCANVI, diffbio.nn their modules."
        raise AttributeError(msg)
    msg = f"module 'diffbio.models.as_scvi' has no attribute {name!r}"
    raise AttributeError(msg)
