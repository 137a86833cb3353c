"""Operators of the single-cell workflow."""

from .ambient_removal import AmbientRemovalConfig as AmbientRemovalConfig
from .ambient_removal import DifferentiableAmbientRemoval as DifferentiableAmbientRemoval
from .harmony import BatchCorrectionConfig as BatchCorrectionConfig
from .harmony import DifferentiableHarmony as DifferentiableHarmony
from .soft_clustering import SoftClusteringConfig as SoftClusteringConfig
from .soft_clustering import SoftKMeansClustering as SoftKMeansClustering
