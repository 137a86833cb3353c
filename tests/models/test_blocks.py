"""Large minibatches come to the CPU in blocks: the same training, for every model that reads counts."""

import jax
import numpy as np
import pytest

from diffbio import parallel
from diffbio.data.source import as_source
from diffbio.math.sparse import blocks_in_turn
from diffbio.models import SCANVI, SCVI
from diffbio.models.cells import cells_of

from .conftest import cells

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="an accelerator takes a batch whole")


@pytest.mark.parametrize(("n_rows", "n_blocks"), [(1, 1), (128, 1), (131, 1), (256, 2), (300, 3), (1000, 8), (1024, 8)])
def test_blocks_are_equal_and_of_a_size_that_pays(n_rows, n_blocks):
    assert blocks_in_turn(n_rows) == n_blocks
    assert n_rows % n_blocks == 0


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [(SCVI, {"dispersion": "gene-batch"}), (SCANVI, {}), (SCANVI, {"dispersion": "gene-label"})],
)
def test_training_in_blocks_is_training(cls, arguments, monkeypatch):
    curves = []
    for n_blocks in (blocks_in_turn, lambda n_rows: 1):
        monkeypatch.setattr(parallel, "blocks_in_turn", n_blocks)
        adata = cells()
        labels = {"labels_key": "cell_type", "unlabeled_category": "unknown"} if cls is SCANVI else {}
        cls.setup_anndata(adata, batch_key="batch", **labels)
        model = cls(adata, n_hidden=8, n_latent=2, **arguments)
        model.train(max_epochs=4, batch_size=256, train_size=1.0, early_stopping=False, progress=False)
        curves.append(np.array([row["loss"] for row in model.training_history.rows]))
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_only_counts_come_in_blocks():
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch")
    source = cells_of(adata, SCVI(adata).registry)
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:256]
    batch, whole = parallel.OneDevice().batch(source, rows), source.take(rows)
    assert batch["counts"].in_turn
    assert batch["counts"].index.shape[0] == 2
    assert set(batch) == set(whole)
    np.testing.assert_array_equal(batch["counts"].dense(), whole["counts"])
    np.testing.assert_array_equal(batch["batch_labels"], whole["batch_labels"])


@pytest.mark.parametrize("genes", [None, np.arange(5, 30)])
def test_a_file_comes_in_blocks_too(genes, tmp_path):
    cells().write_h5ad(tmp_path / "cells.h5ad")
    source = as_source(tmp_path / "cells.h5ad", cell_keys=("counts",), mapping={"counts": "X"}, genes=genes)
    rows = np.sort(np.random.default_rng(0).permutation(300)[:256])
    batch = parallel.OneDevice().batch(source, rows)["counts"]
    assert batch.in_turn
    assert batch.index.shape[0] == 2
    np.testing.assert_array_equal(batch.dense(), source.take(rows)["counts"])
