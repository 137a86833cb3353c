"""Tools on AnnData: `diffbio.tl.cluster(adata, n_clusters=8)`; each writes what its docstring lists."""

from .align_slices import align_slices as align_slices
from .annotate import annotate as annotate
from .archetypes import archetypes as archetypes
from .cluster import cluster as cluster
from .communication import communication as communication
from .differential_distribution import differential_distribution as differential_distribution
from .embed import embed as embed
from .fate import driver_genes as driver_genes
from .fate import fate as fate
from .gene_trends import gene_trends as gene_trends
from .grn import grn as grn
from .integrate import integrate as integrate
from .ligand_receptor import ligand_receptor as ligand_receptor
from .ot_trajectory import ot_trajectory as ot_trajectory
from .pipeline import pipeline as pipeline
from .project import project as project
from .pseudotime import pseudotime as pseudotime
from .simulate import simulate as simulate
from .spatial_domains import spatial_domains as spatial_domains
from .switch_de import switch_de as switch_de
from .vae import vae as vae
from .velocity import velocity as velocity
