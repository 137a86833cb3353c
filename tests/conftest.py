"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

# The cache is the user's; tests neither read nor write it.
os.environ.setdefault("DIFFBIO_COMPILATION_CACHE", "off")
os.environ.setdefault("MPLBACKEND", "Agg")


def data_folder() -> Path | None:
    """Where the real data lies: DIFFBIO_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("DIFFBIO_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if (folder / "pbmc3k.h5ad").is_file() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = data_folder()
    if folder is None:
        pytest.skip("real data not found: set DIFFBIO_DATA to the folder that holds pbmc3k.h5ad")
    return folder
