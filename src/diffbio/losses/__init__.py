"""Losses: callables on arrays."""

from .clustering import BatchMixingLoss as BatchMixingLoss
from .clustering import ClusteringCompactnessLoss as ClusteringCompactnessLoss
from .vae import VAELoss as VAELoss
