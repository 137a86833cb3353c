"""Losses: callables on arrays."""

from .vae import VAELoss as VAELoss
