"""Operators of the single-cell workflow."""

from .library_size import LibrarySizeConfig as LibrarySizeConfig
from .library_size import LibrarySizeNormalizer as LibrarySizeNormalizer
from .umap import DifferentiableUMAP as DifferentiableUMAP
from .umap import UMAPConfig as UMAPConfig
from .vae_normalizer import VAENormalizer as VAENormalizer
from .vae_normalizer import VAENormalizerConfig as VAENormalizerConfig
