"""Operators of the single-cell workflow."""

from .gates import StochasticGateConfig as StochasticGateConfig
from .gates import StochasticGateSelector as StochasticGateSelector
from .library_size import LibrarySizeConfig as LibrarySizeConfig
from .library_size import LibrarySizeNormalizer as LibrarySizeNormalizer
from .pca import DifferentiablePCA as DifferentiablePCA
from .pca import MatrixFreePCA as MatrixFreePCA
from .pca import MatrixFreePCAConfig as MatrixFreePCAConfig
from .pca import PCAConfig as PCAConfig
from .phate import DifferentiablePHATE as DifferentiablePHATE
from .phate import PHATEConfig as PHATEConfig
from .projection import LearnableOrthogonalProjection as LearnableOrthogonalProjection
from .projection import LearnableProjection as LearnableProjection
from .projection import ProjectionConfig as ProjectionConfig
from .projection import SoftComponentConfig as SoftComponentConfig
from .projection import SoftComponentSelection as SoftComponentSelection
from .scaler import DifferentiableScaler as DifferentiableScaler
from .scaler import ScalerConfig as ScalerConfig
from .umap import DifferentiableUMAP as DifferentiableUMAP
from .umap import UMAPConfig as UMAPConfig
from .vae_normalizer import VAENormalizer as VAENormalizer
from .vae_normalizer import VAENormalizerConfig as VAENormalizerConfig
