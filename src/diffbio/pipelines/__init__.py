"""Operators composed into whole analyses."""

from .chain import Chain as Chain
from .chain_stages import Stage as Stage
from .joining import Part as Part
from .single_cell import SingleCellPipeline as SingleCellPipeline
from .single_cell import SingleCellPipelineConfig as SingleCellPipelineConfig
from .single_cell import create_single_cell_pipeline as create_single_cell_pipeline
from .terms import Own as Own
from .terms import Term as Term
