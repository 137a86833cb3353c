"""Small flax.nnx blocks that operators and models are made of, and the modules SCVI and SCANVI."""

from .scanvi import SCANVI as SCANVI
from .scvi import SCVI as SCVI
