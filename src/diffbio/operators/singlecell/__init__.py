"""Operators of the single-cell workflow."""

from .harmony import BatchCorrectionConfig as BatchCorrectionConfig
from .harmony import DifferentiableHarmony as DifferentiableHarmony
from .soft_clustering import SoftClusteringConfig as SoftClusteringConfig
from .soft_clustering import SoftKMeansClustering as SoftKMeansClustering
