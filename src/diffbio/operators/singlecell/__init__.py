"""Operators of the single-cell workflow."""
