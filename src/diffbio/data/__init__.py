"""AnnData, zarr and 10x files to and from dicts of arrays: read, check, stream, select genes, write."""

from diffbio.data.source import ArraySource as ArraySource
from diffbio.data.source import FileSource as FileSource
from diffbio.data.source import Source as Source
from diffbio.data.source import as_source as as_source
from diffbio.data.source import chunks as chunks
from diffbio.data.validate import batch_codes as batch_codes
