"""Models on AnnData, with scvi-tools' verbs: `SCVI` and `SCANVI`."""

from .scanvi import SCANVI as SCANVI
from .scvi import SCVI as SCVI
