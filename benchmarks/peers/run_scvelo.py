"""scVelo 0.3.4: prepared data for both sides, and what scVelo makes of them.

    benchmarks/envs/scvelo/bin/python benchmarks/peers/run_scvelo.py DATA_DIR OUT_DIR [seeds]

Writes per data set OUT_DIR/NAME.npz (normalised spliced and unspliced, principal components, neighbours, moments,
gamma, velocity, pseudotime of each mode) and OUT_DIR/simulation_SEED.npz, and OUT_DIR/peer.json with CPU seconds.
The steps on the pancreas are those by which the stored figures were made.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import scanpy as sc
import scipy.sparse as sp

warnings.filterwarnings("ignore")
import scvelo as scv  # noqa: E402

scv.settings.verbosity = 0


def prepared(path, shared):
    """Filtered, normalised, with moments; and what labels it has."""
    adata = sc.read_h5ad(path)
    for layer in ("spliced", "unspliced"):
        adata.layers[layer] = sp.csr_matrix(adata.layers[layer])
    adata.X = adata.layers["spliced"].copy()
    if shared:
        scv.pp.filter_genes(adata, min_shared_counts=shared)
    scv.pp.normalize_per_cell(adata)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=30, random_state=0)
    sc.pp.neighbors(adata, n_neighbors=30, random_state=0)
    scv.pp.moments(adata, n_pcs=None, n_neighbors=None)
    return adata


def neighbours(adata):
    """Row numbers of the neighbours, itself excluded."""
    return adata.obsp["distances"].indices.reshape(adata.n_obs, -1).astype(np.int32)


def modes(adata, kinds, found):
    """Velocity, graph, pseudotime and confidence of each mode, added to `found`."""
    seconds = {}
    for kind in kinds:
        for key in ("root_cells", "end_points", "velocity_pseudotime"):
            adata.obs.drop(columns=key, errors="ignore", inplace=True)
        start = time.process_time()
        if kind == "dynamical":
            scv.tl.recover_dynamics(adata, n_jobs=1, show_progress_bar=False)
        scv.tl.velocity(adata, mode=kind)
        seconds[kind + " velocity"] = round(time.process_time() - start, 2)
        start = time.process_time()
        scv.tl.velocity_graph(adata, n_jobs=1, show_progress_bar=False, backend="threading")
        chain = scv.utils.get_transition_matrix(adata)
        seconds[kind + " graph"] = round(time.process_time() - start, 2)
        scv.tl.velocity_confidence(adata)
        scv.tl.velocity_pseudotime(adata)
        found[kind + "_velocity"] = np.asarray(adata.layers["velocity"], np.float32)
        found[kind + "_genes"] = adata.var.velocity_genes.to_numpy()
        gamma = adata.var.fit_gamma if kind == "dynamical" else adata.var.velocity_gamma
        found[kind + "_gamma"] = gamma.to_numpy()
        chain = sp.coo_matrix(chain)
        found[kind + "_rows"], found[kind + "_columns"] = chain.row.astype(np.int32), chain.col.astype(np.int32)
        found[kind + "_weights"] = chain.data.astype(np.float32)
        found[kind + "_confidence"] = adata.obs.velocity_confidence.to_numpy()
        found[kind + "_pseudotime"] = adata.obs.velocity_pseudotime.to_numpy()
        found[kind + "_roots"] = adata.obs.root_cells.to_numpy()
        if kind == "dynamical":
            scv.tl.latent_time(adata)
            found["dynamical_latent_time"] = adata.obs.latent_time.to_numpy()
            for name in ("alpha", "beta", "scaling", "likelihood"):
                found["dynamical_" + name] = adata.var["fit_" + name].to_numpy()
            if "X_pca" in adata.obsm:
                scv.tl.velocity_embedding(adata, basis="pca", autoscale=False)
                found["dynamical_pca"] = adata.obsm["velocity_pca"][:, :2]
    return seconds


def main():
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    seeds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    out.mkdir(parents=True, exist_ok=True)
    told = {"scvelo": scv.__version__}
    for seed in range(seeds):
        made = scv.datasets.simulation(
            n_obs=500, n_vars=30, t_max=25, alpha=5, beta=0.3, gamma=0.5, noise_level=0.8, random_seed=seed
        )
        made.var_names = [f"g{i}" for i in range(made.n_vars)]
        sc.pp.pca(made, n_comps=10)
        sc.pp.neighbors(made, n_neighbors=30)
        scv.pp.moments(made, n_pcs=None, n_neighbors=None)
        found = {"spliced": made.layers["spliced"], "unspliced": made.layers["unspliced"], "pca": made.obsm["X_pca"]}
        found |= {"true_t": made.obs.true_t.to_numpy(), "neighbors": neighbours(made)}
        found["true_ratio"] = (made.var.true_gamma / made.var.true_beta).to_numpy()
        scv.tl.velocity(made, mode="deterministic")
        found["deterministic_gamma"] = made.var.velocity_gamma.to_numpy()
        start = time.process_time()
        scv.tl.recover_dynamics(made, var_names="all", n_jobs=1, show_progress_bar=False)
        told[f"simulation {seed} dynamical"] = round(time.process_time() - start, 2)
        found["dynamical_ratio"] = (made.var.fit_gamma / made.var.fit_beta).to_numpy()
        scv.tl.velocity(made, mode="dynamical")
        scv.tl.velocity_graph(made, n_jobs=1, show_progress_bar=False)
        scv.tl.latent_time(made)
        found["dynamical_latent_time"] = made.obs.latent_time.to_numpy()
        np.savez_compressed(out / f"simulation_{seed}.npz", **found)
    for name, shared in (("pancreas_velocity", 20), ("grn_sergio_ds8", None), ("pancreas_endocrinogenesis", 20)):
        adata = prepared(data / f"{name}.h5ad", shared)
        found = {layer: adata.layers[layer].toarray().astype(np.float32) for layer in ("spliced", "unspliced")}
        found |= {"pca": adata.obsm["X_pca"], "neighbors": neighbours(adata)}
        found |= {"Ms": adata.layers["Ms"], "Mu": adata.layers["Mu"]}
        found["genes"] = adata.var_names.to_numpy().astype(str)
        found["cell_type"] = adata.obs.cell_type.astype(str).to_numpy().astype(str)
        if "stage_rank" in adata.obs:
            found["stage_rank"] = adata.obs.stage_rank.astype(str).astype(float).to_numpy()
        told[name] = modes(adata, ("deterministic", "stochastic", "dynamical"), found)
        np.savez_compressed(out / f"{name}.npz", **found)
        (out / "peer.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
