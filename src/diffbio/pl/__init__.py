"""Figures of what `pp` and `tl` wrote; each function returns matplotlib axes."""

from .analysis import MAP_WIDTH as MAP_WIDTH
from .analysis import ambient as ambient
from .analysis import cluster as cluster
from .analysis import colors_of as colors_of
from .analysis import embed as embed
from .analysis import highly_variable as highly_variable
from .analysis import history_of as history_of
from .analysis import integrate as integrate
from .analysis import normalize as normalize
from .analysis import pipeline as pipeline
from .analysis import stages_of as stages_of
from .analysis import training as training
from .analysis import vae as vae
from .annotation import agreement as agreement
from .annotation import annotate as annotate
from .annotation import confidence as confidence
from .annotation import confusion as confusion
from .annotation import markers as markers
from .drawing import PALETTE as PALETTE
from .drawing import codes_of as codes_of
from .drawing import color_of as color_of
from .drawing import record_of as record_of
from .drawing import scatter as scatter
