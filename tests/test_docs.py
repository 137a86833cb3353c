"""Every python block of README and docs/ runs, in order, each page in one namespace."""

import re
import shutil
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from branching_cells import branching_cells
from tissue_cells import tissue_cells
from toy_cells import toy_cells

from diffbio.operators.base import REGISTRY

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def small_adata(n=120):
    import anndata

    rng = np.random.default_rng(0)
    from scipy import sparse

    counts = sparse.csr_matrix(rng.poisson(0.5, (n, 2000)).astype(np.float32))
    adata = anndata.AnnData(counts)
    adata.obs["batch"] = np.where(np.arange(n) % 2, "a", "b")
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    return adata


def pipeline_page():
    """What the pipeline page takes for granted: data, and the parts its pseudo-code names."""
    from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig
    from diffbio.pipelines import create_single_cell_pipeline

    def cells(seed, n=100):
        keys = jax.random.split(jax.random.key(seed), 2)
        return {
            "counts": jax.random.poisson(keys[0], 5.0, (n, 2000)).astype(jnp.float32),
            "ambient_profile": jnp.full((2000,), 1 / 2000),
            "batch_labels": jax.random.randint(keys[1], (n,), 0, 3),
        }

    from flax import nnx

    vae = VAENormalizer(VAENormalizerConfig(n_genes=2000, latent_dim=8), rngs=nnx.Rngs(0))
    umap = create_single_cell_pipeline(n_genes=2000, latent_dim=8, seed=1).dim_reduction
    embeddings = jax.random.normal(jax.random.key(1), (100, 8))
    centroids = embeddings[:4]

    def encode(counts):
        q = vae.vae.encode(jnp.asarray(counts, jnp.float32))
        return q.mean, q.logvar

    def distances(x, y):
        return ((x[:, None] - y[None]) ** 2).sum(-1)

    return {
        "adata": small_adata(),
        "key": jax.random.key(3),
        "empty_droplets": np.random.default_rng(1).poisson(0.2, (30, 2000)),
        "train_data": cells(4),
        "train_labels": jax.nn.one_hot(jnp.arange(100) % 10, 10),
        "new_data": cells(5, n=100),
        # names in the pseudo-code of the stages
        "encoder": encode,
        "reparameterize": lambda mean, logvar: mean + jnp.exp(logvar / 2) * embeddings,
        "decoder": lambda z: jax.nn.softmax(vae.vae.decoder.fraction(vae.vae.decoder.network(z))),
        "vae_decoder": lambda z: jax.nn.softmax(vae.vae.decoder.fraction(vae.vae.decoder.network(z))),
        "z": jnp.zeros((100, 8)),
        "ambient_fraction": 0.1,
        "n_iterations": 2,
        "embeddings": embeddings,
        "soft_kmeans": lambda x: jax.nn.softmax(-distances(x, centroids)),
        "compute_harmony_correction": lambda r, labels: jnp.zeros((len(r), 8)),
        "umap_network": lambda x: umap(x)["embedding"],
        "corrected_embeddings": embeddings,
        "compute_distances": distances,
        "softmax": jax.nn.softmax,
        "centroids": centroids,
        "temperature": 1.0,
    }


def scvi_tools_page():
    """An exported model, and its cells."""
    import anndata
    import pandas as pd

    oracles = ROOT / "tests" / "oracles" / "scvi_tools"
    shutil.copytree(oracles / "scanvi", "exported")
    with np.load(oracles / "scanvi.npz") as stored:
        counts, obs = stored["counts"], {k[4:]: stored[k] for k in stored if k.startswith("obs_")}
    names = {"index": [f"gene{i}" for i in range(counts.shape[1])]}
    obs = pd.DataFrame(obs, index=[f"cell{i}" for i in range(len(counts))])
    anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(**names)).write_h5ad("annotated.h5ad")
    return {}


def annotation_page():
    """Annotated cells, and others."""
    cells = toy_cells(200)
    return {"reference": cells[:120].copy(), "query": cells[120:160].copy(), "more": cells[160:].copy()}


def quality_page():
    """The demo's real cells, and a few droplets of soup beside toy cells."""
    import anndata
    from scipy import sparse

    from diffbio.data.datasets import pbmc68k

    cells, rng = toy_cells(60, 30), np.random.default_rng(0)
    profile = cells.var.pop("ambient_profile").to_numpy()
    soup = np.array([rng.multinomial(n, profile) for n in rng.integers(20, 100, 400)], np.float32)
    raw = anndata.AnnData(sparse.csr_matrix(np.vstack([20 * cells.X.toarray(), soup])), var=cells.var)
    raw.obs_names = [f"droplet{i}" for i in range(460)]
    return {"adata": pbmc68k(), "raw": raw}


def batches_page():
    """The demo's real cells, in two batches."""
    from diffbio.data.datasets import pbmc68k

    cells = pbmc68k()
    cells.obs["batch"] = np.where(np.arange(cells.n_obs) % 2, "a", "b")
    cells = cells[:300]
    return {"adata": cells[:, np.asarray(cells.X.sum(axis=0)).ravel() > 0].copy()}


def trajectories_page():
    """Cells of a process that divides, with a map."""
    adata = branching_cells()
    adata.obsm["X_umap"] = np.column_stack([adata.obs["time"], adata.obs["branch"] * adata.obs["time"]])
    return {"adata": adata}


def chain_page():
    """Counts of two batches, and days."""
    rng = np.random.default_rng(0)
    day = rng.integers(0, 3, 120)
    counts = rng.poisson(0.2 + 0.3 * day[:, None] * (np.arange(2000) % 3 == 0)).astype(np.float32)
    return {"counts": counts, "batch_labels": np.arange(120) % 2, "day": day}


def adapted_page():
    """Cells of two types, every third an almost empty droplet; a third of the genes vary with something else."""
    rng = np.random.default_rng(0)
    label, damaged = np.arange(120) % 2, np.arange(120) % 3 == 2
    noisy = np.arange(60) >= 40

    def cells():
        rates = 3.0 * np.where(np.arange(60) < 6, 1 + 3 * label[:, None], 1.0)
        rates = rates * np.where(noisy, np.exp(rng.normal(0, 0.6, (120, 1)) * np.where(np.arange(60) % 2, 1, -1)), 1.0)
        rates = np.where(damaged[:, None], 0.4 * rates[~label.astype(bool)].mean(axis=0), rates)
        return {"counts": rng.poisson(rates).astype(np.float32), "label": label.astype(np.float32)}

    return {"seen": cells(), "unseen": cells(), "damaged": damaged, "noisy": noisy}


def trajectory_loss_page():
    """Counts of a time course whose largest variation has nothing to do with time."""
    rng = np.random.default_rng(0)
    day, other, genes = rng.integers(0, 4, 200), rng.uniform(0, 1, 200), np.arange(60)
    size = 1 + 3 * (genes < 40) * (1 + np.sin(np.pi * (other[:, None] + genes / 20)))
    age = day + rng.normal(0, 0.3, 200) - 1.5
    counts = rng.poisson(size * np.exp(0.25 * age[:, None] * (genes >= 40)))
    return {"counts": counts.astype(np.float32), "day": day.astype(np.float32)}


def clustering_page():
    """Three kinds of cells in two batches, in halves."""
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(0, 3, 240), np.arange(240) % 2
    rates = np.exp(rng.normal(0, 1, (3, 60)))[kind] * np.exp(0.7 * rng.normal(0, 1, (2, 60)))[batch]
    cells = {"counts": rng.poisson(rates).astype(np.float32), "batch_labels": batch}
    return {name: {k: jnp.asarray(v[half]) for k, v in cells.items()} for name, half in
            (("seen", slice(120)), ("unseen", slice(120, None)))}  # fmt: skip


def few_labels_page():
    """Three types, each with genes of its own; five labels per type."""
    rng = np.random.default_rng(0)
    types = np.arange(150) % 3
    counts = rng.poisson(0.3 + 2.0 * (np.arange(60) % 3 == types[:, None])).astype(np.float32)
    label = np.where(np.arange(150) < 15, types, -1)
    return {"counts": counts, "label": label, "ambient_profile": counts.sum(axis=0) / counts.sum(), "truth": types}


PRELUDES = {
    "few_labels.md": few_labels_page,
    "trajectory_loss.md": trajectory_loss_page,
    "adapted_preprocessing.md": adapted_page,
    "space_networks_expression.md": lambda: {"adata": tissue_cells()},
    "joint_clustering.md": clustering_page,
    "trained_as_one.md": chain_page,
    "trajectories.md": trajectories_page,
    "batches_maps_groups.md": batches_page,
    "quality_control.md": quality_page,
    "single_cell_pipeline.md": pipeline_page,
    "scvi_tools_models.md": scvi_tools_page,
    "cell_type_annotation.md": annotation_page,
}
# An elision that a reader fills in: the one place where a block is not run word for word.
ELISIONS = {"jnp.array([0, 0, 1, 1, 2, ...])": "jnp.array([0, 0, 1, 1, 2])"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    small_adata().write_h5ad("data.h5ad")
    small_adata().write_h5ad("cells.h5ad")
    namespace = {"__name__": "documentation"}
    namespace |= PRELUDES.get(page.name, dict)()
    text = page.read_text()
    blocks = [(text[: m.start()].count("\n") + 2, m.group(1)) for m in BLOCK.finditer(text)]
    for line, block in blocks:
        for elided, filled in ELISIONS.items():
            block = block.replace(elided, filled)
        code = compile("\n" * (line - 1) + textwrap.dedent(block), str(page), "exec")
        exec(code, namespace)
    plt.close("all")


def test_the_pipeline_page_holds_what_it_says(tmp_path, monkeypatch):
    """The quick start, with its sizes: exact keys and shapes, an honest mark, and training that lowers the loss."""
    text = (ROOT / "docs" / "single_cell_pipeline.md").read_text()
    namespace = {}
    exec(BLOCK.search(text).group(1), namespace)
    result, _, metadata = namespace["pipeline"].apply(namespace["data"], {}, None)
    shapes = {key: value.shape for key, value in result.items()}
    assert shapes == {
        "counts": (100, 2000),
        "ambient_profile": (2000,),
        "batch_labels": (100,),
        "decontaminated_counts": (100, 2000),
        "normalized": (100, 2000),
        "latent": (100, 64),
        "corrected_embeddings": (100, 64),
        "embeddings_2d": (100, 2),
        "cluster_assignments": (100, 10),
    }
    assert set(metadata["unfitted"]) == set(shapes) - {"counts", "ambient_profile", "batch_labels"}
    np.testing.assert_allclose(result["cluster_assignments"].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(result["normalized"].sum(1), 1, rtol=1e-4)


def test_the_overview_of_gradients_names_every_operator_with_a_path():
    """The table is printed by a command; an operator that is added without running it again is missed here."""
    import diffbio.operators.normalization
    import diffbio.operators.singlecell  # noqa: F401 - registers all

    text = (ROOT / "docs" / "gradients.md").read_text()
    named = set(re.findall(r"^\| (\w+) \|", text, flags=re.MULTILINE)) - {"operator"}
    able = {
        name for name, kind in REGISTRY.items()
        if kind.__module__.startswith("diffbio.operators") and kind.smooth_in and kind.smooth_out
    }  # fmt: skip
    assert named == able
