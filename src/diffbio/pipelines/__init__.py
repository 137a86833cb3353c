"""Operators composed into whole analyses."""

from .single_cell import SingleCellPipeline as SingleCellPipeline
from .single_cell import SingleCellPipelineConfig as SingleCellPipelineConfig
from .single_cell import create_single_cell_pipeline as create_single_cell_pipeline
