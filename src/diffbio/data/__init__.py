"""AnnData, zarr and 10x files to and from dicts of arrays: read, check, stream, select genes, write."""

from .datasets import pbmc68k as pbmc68k
from .datasets import stream_counts as stream_counts
from .genes import highly_variable_genes as highly_variable_genes
from .names import GeneAlignment as GeneAlignment
from .names import align_genes as align_genes
from .names import batch_codes as batch_codes
from .names import check_names as check_names
from .names import encode_with as encode_with
from .names import label_codes as label_codes
from .provenance import fingerprint as fingerprint
from .provenance import provenance as provenance
from .read import read as read
from .source import ArraySource as ArraySource
from .source import FileSource as FileSource
from .source import Source as Source
from .source import as_source as as_source
from .source import chunks as chunks
from .source import counts_of as counts_of
from .stream import RowStream as RowStream
from .validate import CountSummary as CountSummary
from .validate import check_ambient_profile as check_ambient_profile
from .validate import check_counts as check_counts
from .write import add_results as add_results
from .write import check_output as check_output
from .write import write_results as write_results
