"""Small scvi-tools models and what scvi-tools computes with them; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 benchmarks/envs/scvi/bin/python benchmarks/peers/make_scvi_oracle.py

Writes ``tests/oracles/scvi_tools/<case>``: the exported model, and ``<case>.npz``: cells and results. The latent
variables are at their means (torch's Normal is made to draw its mean), so that every number is exact.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "tests" / "oracles" / "scvi_tools"
CELLS, GENES = 48, 15
SMALL = {"n_hidden": 6, "n_latent": 3}
CASES = {
    # name: (class, arguments, arguments of setup_anndata)
    "scvi": ("SCVI", {}, {"covariates": True}),
    "scvi_latent_library": (
        "SCVI",
        {
            "gene_likelihood": "nb", "dispersion": "gene-batch", "use_observed_lib_size": False, "n_layers": 2,
            "encode_covariates": True,
        },
        {"covariates": True},
    ),
    "scvi_shallow": (
        "SCVI",
        {
            "gene_likelihood": "poisson", "n_layers": 2, "deeply_inject_covariates": False, "use_batch_norm": "encoder",
            "log_variational": False,
        },
        {"size_factor_key": "size"},
    ),
    "scvi_one_batch": ("SCVI", {"dispersion": "gene-label", "gene_likelihood": "nb"}, {"labels_key": "type"}),
    "scanvi": ("SCANVI", {"dispersion": "gene-cell"}, {"covariates": True}),
    "scanvi_linear": (
        "SCANVI",
        {"linear_classifier": True, "n_layers": 2, "y_prior": torch.tensor([[0.2, 0.5, 0.3]])},
        {},
    ),
}  # fmt: skip


def cells() -> anndata.AnnData:
    """Counts of three types in two batches, with a further category and a number."""
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(0, 3, CELLS), rng.integers(0, 2, CELLS)
    of_gene = rng.gamma(0.5, 2.0, (3, GENES))[kind] * rng.gamma(3.0, 1 / 3, (2, GENES))[batch]
    counts = rng.poisson(of_gene * rng.gamma(5, 1.0, (CELLS, 1)))
    counts[:, 0] += 1
    known = np.where(rng.random(CELLS) < 0.4, "unknown", np.array(["B", "NK", "T"])[kind])
    obs = pd.DataFrame(
        {
            "batch": np.array(["one", "two"])[batch],
            "type": known,
            "donor": np.array(["x", "y", "z"])[rng.integers(0, 3, CELLS)],
            "age": rng.normal(size=CELLS),
            "size": rng.uniform(0.5, 2.0, CELLS),
        },
        index=[f"cell{i}" for i in range(CELLS)],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(GENES)])
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def train(name: str) -> tuple[scvi.model.base.BaseModelClass, anndata.AnnData]:
    """A model after a few epochs."""
    scvi.settings.seed = 0
    kind, arguments, setup = CASES[name]
    setup, adata = dict(setup), cells()
    if setup.pop("covariates", False):
        setup |= {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    if kind == "SCANVI":
        setup |= {"labels_key": "type", "unlabeled_category": "unknown"}
    if name != "scvi_one_batch":
        setup["batch_key"] = "batch"
    model_class = getattr(scvi.model, kind)
    model_class.setup_anndata(adata, **setup)
    model = model_class(adata, **SMALL, **arguments)
    model.train(max_epochs=25, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 0.02}, batch_size=16)
    # running averages of a few steps are still close to where they start: every part should matter
    with torch.no_grad():
        for part, value in model.module.state_dict().items():
            if part.endswith(("running_mean", "running_var")) or (part.endswith("bias") and "fc_layers" in part):
                value += 0.3 * torch.rand_like(value)
    return model, adata


@contextlib.contextmanager
def at_the_mean() -> Iterator[None]:
    """Draws from a Normal are its mean."""
    normal = torch.distributions.Normal
    before = normal.rsample, normal.sample
    normal.rsample = normal.sample = lambda self, *shape: self.loc + 0 * before[0](self, *shape)
    try:
        yield
    finally:
        normal.rsample, normal.sample = before


def expected(model: scvi.model.base.BaseModelClass, adata: anndata.AnnData) -> dict[str, np.ndarray]:
    """What scvi-tools computes."""
    model.module.eval()
    (tensors,) = list(model._make_data_loader(adata=adata, batch_size=CELLS))
    with torch.no_grad():
        inference, generative, loss = model.module(tensors)
    qz, px = inference["qz"], generative["px"]
    found = {
        "qz_m": qz.loc,
        "qz_v": qz.scale**2,
        "px_scale": px.scale,
        "px_rate": px.rate if hasattr(px, "rate") else px.mu,
        "reconstruction": sum(loss.reconstruction_loss.values()),
        "kl": sum(loss.kl_local.values()),
    }
    if inference["ql"] is not None:
        found |= {"ql_m": inference["ql"].loc, "ql_v": inference["ql"].scale ** 2}
    if hasattr(px, "theta"):
        found["px_r"] = px.theta
    if hasattr(px, "zi_logits"):
        found["px_dropout"] = px.zi_logits
    found = {k: v.numpy().astype(np.float32) for k, v in found.items()}
    found["latent"] = model.get_latent_representation()
    if isinstance(model, scvi.model.SCANVI):
        probabilities = model.predict(soft=True)
        found |= {"probabilities": probabilities.to_numpy(), "types": np.array(list(probabilities.columns))}
    return found


def main() -> None:
    """Make every case."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    script = ROOT / "src" / "diffbio" / "models" / "export_scvi_tools.py"
    spec = importlib.util.spec_from_file_location("export", script)
    exporter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exporter)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    for name in CASES:
        model, adata = train(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder, overwrite=True)
            exporter.export(folder, str(OUTPUT / name))
        obs = {f"obs_{k}": adata.obs[k].to_numpy() for k in ("batch", "type", "donor", "age", "size")}
        obs = {k: v.astype(str) if v.dtype == object else v for k, v in obs.items()}
        counts = adata.X.toarray().astype(np.uint16)
        with at_the_mean():
            found = expected(model, adata)
        np.savez_compressed(OUTPUT / f"{name}.npz", counts=counts, **obs, **found)
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
