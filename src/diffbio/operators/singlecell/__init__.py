"""Operators of the single-cell workflow."""

from .soft_clustering import SoftClusteringConfig as SoftClusteringConfig
from .soft_clustering import SoftKMeansClustering as SoftKMeansClustering
