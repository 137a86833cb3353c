"""What the AnnData functions share."""

import anndata as ad
import numpy as np

from diffbio.recording import recorded


@recorded
def marked(adata, *, value=1, copy=False):
    adata.obs["mark"] = value


def test_copy_of_a_file_is_in_memory(tmp_path):
    path = tmp_path / "cells.h5ad"
    ad.AnnData(np.ones((3, 2), np.float32)).write_h5ad(path)
    backed = ad.read_h5ad(path, backed="r")
    copied = marked(backed, value=2, copy=True)
    assert not copied.isbacked
    assert (copied.obs["mark"] == 2).all()
    assert copied.uns["diffbio"]["marked"]["params"]["value"] == 2
    assert "mark" not in backed.obs
    backed.file.close()
