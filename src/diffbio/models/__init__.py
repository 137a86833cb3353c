"""Models on AnnData, with scvi-tools' verbs: `SCVI` and `SCANVI`."""

from .scanvi import SCANVI as SCANVI
from .scvi import SCVI as SCVI
from .scvi_tools import from_scvi_tools as from_scvi_tools
