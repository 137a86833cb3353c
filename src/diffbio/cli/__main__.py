"""`python -m diffbio.cli`."""

from . import main

main()
