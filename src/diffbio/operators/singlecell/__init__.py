"""Operators of the single-cell workflow, those of `operators.normalization` among them."""

from ..normalization import DifferentiableUMAP as DifferentiableUMAP
from ..normalization import LibrarySizeConfig as LibrarySizeConfig
from ..normalization import LibrarySizeNormalizer as LibrarySizeNormalizer
from ..normalization import UMAPConfig as UMAPConfig
from ..normalization import VAENormalizer as VAENormalizer
from ..normalization import VAENormalizerConfig as VAENormalizerConfig
from .ambient_removal import AmbientRemovalConfig as AmbientRemovalConfig
from .ambient_removal import DifferentiableAmbientRemoval as DifferentiableAmbientRemoval
from .cell_annotation import CellAnnotatorConfig as CellAnnotatorConfig
from .cell_annotation import DifferentiableCellAnnotator as DifferentiableCellAnnotator
from .diffusion_imputation import DifferentiableDiffusionImputer as DifferentiableDiffusionImputer
from .diffusion_imputation import DiffusionImputerConfig as DiffusionImputerConfig
from .doublet_detection import DifferentiableDoubletScorer as DifferentiableDoubletScorer
from .doublet_detection import DoubletScorerConfig as DoubletScorerConfig
from .harmony import BatchCorrectionConfig as BatchCorrectionConfig
from .harmony import DifferentiableHarmony as DifferentiableHarmony
from .quality_filter import DifferentiableQualityFilter as DifferentiableQualityFilter
from .quality_filter import QualityFilterConfig as QualityFilterConfig
from .soft_clustering import SoftClusteringConfig as SoftClusteringConfig
from .soft_clustering import SoftKMeansClustering as SoftKMeansClustering
from .soft_hvg import SoftHVGConfig as SoftHVGConfig
from .soft_hvg import SoftHVGSelector as SoftHVGSelector
