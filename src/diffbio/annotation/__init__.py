"""Cell type annotation of AnnData and files: training an annotator, asking it, calling types."""

from .calls import Annotation as Annotation
from .calls import Calling as Calling
from .run import annotate as annotate
from .run import load as load
