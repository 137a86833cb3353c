"""Differentiable operators: dicts of arrays in, dicts of arrays out."""
