"""Tools on AnnData: `diffbio.tl.cluster(adata, n_clusters=8)`; each writes what its docstring lists."""

from .annotate import annotate as annotate
from .archetypes import archetypes as archetypes
from .cluster import cluster as cluster
from .embed import embed as embed
from .integrate import integrate as integrate
from .ot_trajectory import ot_trajectory as ot_trajectory
from .pipeline import pipeline as pipeline
from .project import project as project
from .simulate import simulate as simulate
from .vae import vae as vae
