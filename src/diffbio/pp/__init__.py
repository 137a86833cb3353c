"""Preprocessing on AnnData: `diffbio.pp.highly_variable(adata)`; each writes what its docstring lists."""

from .ambient import ambient as ambient
from .call_cells import call_cells as call_cells
from .doublets import doublets as doublets
from .highly_variable import highly_variable as highly_variable
from .impute import impute as impute
from .normalize import normalize as normalize
from .quality import quality as quality
