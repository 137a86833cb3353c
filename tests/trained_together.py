"""A process of a run that test_parallel.py starts: several devices in one process, or one of two processes."""

import json
import os
import sys
from pathlib import Path


def on_two_devices(folder):
    """SCVI and SCANVI on one device and on two; largest relative differences of curves and batch statistics."""
    import anndata
    import jax
    import numpy as np
    from flax import nnx
    from scipy import sparse

    from diffbio.models import SCANVI, SCVI

    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(-1.0, 1.0, (3, 40)))[rng.integers(3, size=200)]
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)))
    adata.obs["batch"], adata.obs["type"] = rng.choice(["a", "b"], 200), rng.choice(["x", "y", "?"], 200)
    SCVI.setup_anndata(adata, batch_key="batch")
    labelled = adata.copy()
    SCANVI.setup_anndata(labelled, labels_key="type", unlabeled_category="?", batch_key="batch")
    cases = {"even": (SCVI, adata, 40), "uneven": (SCVI, adata, 35), "labelled": (SCANVI, labelled, 36)}
    found = {"devices": jax.device_count()}
    for name, (kind, cells, size) in cases.items():
        seen = []
        for devices in (1, -1):
            model = kind(cells, n_hidden=16, n_latent=4)
            history = model.train(max_epochs=2, batch_size=size, devices=devices, progress=False)
            statistics = jax.tree.leaves(nnx.state(model.module, nnx.BatchStat))
            curve = np.r_[history["loss"], history["validation_loss"]]
            seen.append([curve, np.concatenate([np.ravel(s) for s in statistics])])
        model.get_latent_representation()  # the weights are back on one device
        found[name] = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*seen, strict=True)]
    (folder / "devices.json").write_text(json.dumps(found))


def toy_run(data, folder, **settings):
    """Trains the toy until it stops early."""
    from flax import nnx
    from toy import Toy, ToyConfig

    from diffbio.fitting import fit

    settings = {"batch_size": 20, "max_epochs": 60, "patience": 3, "learning_rate": 0.02, "seed": 0, **settings}
    model = Toy(ToyConfig(), rngs=nnx.Rngs(0))
    history = fit(model, str(data), checkpoint=folder / "checkpoint", resume=True, **settings)
    return model, history


def in_two_processes(folder, process, coordinator):
    """One of two processes."""
    import numpy as np

    from diffbio import parallel, train
    from diffbio.errors import ConfigError, DiffBioError

    parallel.join(coordinator, 2, process, heartbeat_seconds=10)
    train.CHECKPOINT_SECONDS = 0.0
    step = train.Progress.step
    if os.environ.get("SLOWLY"):
        import time

        train.Progress.step = lambda *args: (time.sleep(0.02), step(*args))[1]
    try:
        toy_run(folder / "cells.h5ad", folder / "none", seed=process, progress=False)
    except ConfigError as error:
        refused = str(error)
    try:
        model, history = toy_run(folder / "cells.h5ad", folder)
    except DiffBioError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if error.exit_code == 8:
            raise
        sys.exit(error.exit_code)
    found = {
        "refused": refused, "loss": history["loss"], "validation": history["validation_loss"],
        "stopped_early": history.stopped_early,
        "weights": np.asarray(model.weights[...]).tolist(),
    }  # fmt: skip
    (folder / f"{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) == 2:
        on_two_devices(folder)
    else:
        in_two_processes(folder, int(sys.argv[2]), sys.argv[3])
