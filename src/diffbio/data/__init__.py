"""AnnData, zarr and 10x files to and from dicts of arrays: read, check, stream, select genes, write."""

from diffbio.data.datasets import pbmc68k as pbmc68k
from diffbio.data.datasets import stream_counts as stream_counts
from diffbio.data.genes import highly_variable_genes as highly_variable_genes
from diffbio.data.names import GeneAlignment as GeneAlignment
from diffbio.data.names import align_genes as align_genes
from diffbio.data.names import batch_codes as batch_codes
from diffbio.data.names import check_names as check_names
from diffbio.data.names import encode_with as encode_with
from diffbio.data.names import label_codes as label_codes
from diffbio.data.provenance import fingerprint as fingerprint
from diffbio.data.provenance import provenance as provenance
from diffbio.data.read import read as read
from diffbio.data.source import ArraySource as ArraySource
from diffbio.data.source import FileSource as FileSource
from diffbio.data.source import Source as Source
from diffbio.data.source import as_source as as_source
from diffbio.data.source import chunks as chunks
from diffbio.data.source import counts_of as counts_of
from diffbio.data.stream import RowStream as RowStream
from diffbio.data.validate import CountSummary as CountSummary
from diffbio.data.validate import check_ambient_profile as check_ambient_profile
from diffbio.data.validate import check_counts as check_counts
from diffbio.data.write import add_results as add_results
from diffbio.data.write import check_output as check_output
from diffbio.data.write import write_results as write_results
