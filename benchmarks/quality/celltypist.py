"""Cell types from a classifier trained on labelled cells, beside CellTypist 1.7 and a baseline, one table.

    uv run python -m benchmarks.quality.celltypist              # ours anew, some 15 CPU minutes
    uv run python -m benchmarks.quality.celltypist --stored     # print what is stored, run nothing of ours
    uv run python -m benchmarks.quality.celltypist --peer       # first runs CellTypist anew, in its own environment

- `pbmc4k_ambient`, `pbmc3k`: 70/30 splits, stratified, five seeds.
- `pbmc_three_chemistries`: trained on two chemistries, asked about the third. Macro-F1 is of the types that the third
  has; types that training has not seen (DC and platelets of 10x_3p_v3) count as called wrong on all sides.
- held-out type: `pbmc3k`, each type left out of training in turn; AUROC of 1 - confidence for the cells of that type
  among the test cells of the others. Of CellTypist and the baseline the confidence is the largest probability.
- markers: rank (from 1) of textbook markers by `marker_scores`, all cells in training.

Ours: `DifferentiableCellAnnotator`, mode 'celltypist', on the N_GENES genes of `type_genes` (of the training cells),
`diffbio.fit` with FIT. CellTypist: `benchmarks.peers.run_celltypist`. Baseline: logistic regression on 50 principal
components of the training cells. CPU-seconds of training, one thread; ours with choice of genes and compilation.

Bars: 70/30 at least CellTypist, in accuracy and macro-F1 (means); other chemistry above it; mean AUROC at least 0.85;
each marker among the first 20.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from benchmarks.quality.integration_data import REPO, RESULTS, data_dir

PEER_RESULTS = RESULTS / "celltypist_peer.json"
OUR_RESULTS = RESULTS / "celltypist_diffbio.json"
PEER_PYTHON = REPO / "benchmarks" / "envs" / "celltypist" / "bin" / "python"
N_GENES = 3000
LATENT = 16  # dimensions beside those that tell the types apart
FIT: dict[str, Any] = {"max_epochs": 30, "batch_size": 128, "learning_rate": 1e-3, "patience": 10}
MARKERS = {
    "B": ("MS4A1",), "NK": ("GNLY",), "CD14+ Mono": ("CD14", "LYZ"), "CD8 T": ("CD8A",), "Platelet": ("PPBP",)
}
SEEDS = range(5)
CHEMISTRIES = ("10x_3p_v2", "10x_3p_v3", "10x_5p")


@dataclass(frozen=True)
class Cells:
    """Counts of genes seen in at least 3 cells, with what is known of the cells."""

    counts: sp.csr_matrix
    genes: np.ndarray
    obs: dict[str, np.ndarray]

    def labels(self, key: str) -> np.ndarray:
        """Names of the types."""
        return self.obs[key]


@dataclass(frozen=True)
class Split:
    """Cells to train on and to call; `unknown` is the type that training does not see."""

    name: str
    data: str
    key: str
    train: np.ndarray
    test: np.ndarray
    unknown: str | None = None


@cache
def load(name: str) -> Cells:
    """One data set; cells without a type are left out."""
    import anndata

    a = anndata.read_h5ad(data_dir() / f"{name}.h5ad")
    a = a[a.obs["cell_type"].astype(str) != "NA"]
    counts = sp.csr_matrix(a.X).astype(np.float32)
    seen = np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= 3)
    keys = [key for key in ("cell_type", "cell_type_fine", "batch") if key in a.obs]
    obs = {key: a.obs[key].astype(str).to_numpy() for key in keys}
    return Cells(counts[:, seen].tocsr(), a.var_names.to_numpy().astype(str)[seen], obs)


def splits() -> list[Split]:
    """All of them: 70/30 of two data sets, one chemistry held out, one type held out."""
    from sklearn.model_selection import train_test_split

    found = []
    for name in ("pbmc4k_ambient", "pbmc3k"):
        labels = load(name).labels("cell_type")
        for seed in SEEDS:
            train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
            found.append(Split(f"{name} {seed}", name, "cell_type", train, test))
    name = "pbmc_three_chemistries"
    batch = load(name).labels("batch")
    for key in ("cell_type", "cell_type_fine"):
        for held_out in CHEMISTRIES:
            new = batch == held_out
            found.append(Split(f"{key} {held_out}", name, key, np.flatnonzero(~new), np.flatnonzero(new)))
    labels = load("pbmc3k").labels("cell_type")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    for unknown in np.unique(labels):
        known, new = train[labels[train] != unknown], np.flatnonzero(labels == unknown)
        asked = np.concatenate([test[labels[test] != unknown], new])
        found.append(Split(f"unknown {unknown}", "pbmc3k", "cell_type", known, asked, str(unknown)))
    return found


def scores(split: Split, called: np.ndarray, confidence: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1; where a type is held out, the AUROC of 1 - confidence for it."""
    from sklearn.metrics import f1_score, roc_auc_score

    truth = load(split.data).labels(split.key)[split.test]
    if split.unknown is not None:
        return {"auroc": float(roc_auc_score(truth == split.unknown, 1.0 - confidence))}
    macro = f1_score(truth, called, average="macro", labels=np.unique(truth))
    return {"accuracy": float((called == truth).mean()), "macro_f1": float(macro)}


def trained(split: Split) -> tuple[Any, np.ndarray, np.ndarray]:
    """The annotator trained on the split's training cells, the names of its types, and the columns of its genes."""
    from flax import nnx

    import diffbio
    from diffbio.data.type_genes import type_genes
    from diffbio.operators.singlecell import CellAnnotatorConfig, DifferentiableCellAnnotator

    data = load(split.data)
    names, codes = np.unique(data.labels(split.key)[split.train], return_inverse=True)
    counts = data.counts[split.train]
    genes = type_genes(counts, codes, N_GENES)
    config = CellAnnotatorConfig(
        annotation_mode="celltypist", n_cell_types=len(names), n_genes=len(genes), latent_dim=len(names) - 1 + LATENT,
        gene_likelihood="nb",
    )
    annotator = DifferentiableCellAnnotator(config, rngs=nnx.Rngs(0))
    cells = {"counts": counts[:, genes].tocsr(), "labels": codes.astype(np.int32)}
    diffbio.fit(annotator, cells, progress=False, **FIT)
    return annotator, names, genes


def ours(split: Split) -> dict[str, float]:
    """Scores of the trained annotator, its calibration error (15 bins), and CPU-seconds of training."""
    import jax.numpy as jnp

    start = time.process_time()
    annotator, names, genes = trained(split)
    cpu = time.process_time() - start
    data = load(split.data)
    found = annotator.judge({"counts": jnp.asarray(data.counts[split.test][:, genes].toarray())})
    p = np.asarray(found["probabilities"])
    called = names[p.argmax(1)]
    result = scores(split, called, np.asarray(found["confidence"]))
    if split.unknown is None:
        right = called == data.labels(split.key)[split.test]
        bins = np.minimum((p.max(1) * 15).astype(int), 14)
        gaps = [abs(p.max(1)[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
        result["ece"] = float(sum(gaps))
    return {**result, "cpu_s": cpu}


def marker_ranks() -> dict[str, float]:
    """Rank of the best textbook marker of each type, from 1, by an annotator trained on all of pbmc3k."""
    import jax.numpy as jnp

    data = load("pbmc3k")
    everything = np.arange(data.counts.shape[0])
    annotator, names, genes = trained(Split("markers", "pbmc3k", "cell_type", everything, everything))
    codes = np.searchsorted(names, data.labels("cell_type"))
    counts = jnp.asarray(data.counts[:, genes].toarray())
    by_gene = np.asarray(annotator.mode.classifier.marker_scores(counts, jnp.asarray(codes)))
    order = data.genes[genes][np.argsort(-by_gene, axis=1)]
    return {
        name: 1 + min(list(order[list(names).index(name)]).index(gene) for gene in markers)
        for name, markers in MARKERS.items()
    }


def baseline(split: Split) -> dict[str, float]:
    """Scores of logistic regression on 50 principal components."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    data = load(split.data)
    start = time.process_time()
    reference, query = (_log_expression(data.counts[cells]) for cells in (split.train, split.test))
    pca = PCA(50, svd_solver="arpack", random_state=0).fit(reference)
    model = LogisticRegression(max_iter=2000).fit(pca.transform(reference), data.labels(split.key)[split.train])
    cpu = time.process_time() - start
    p = model.predict_proba(pca.transform(query))
    return {**scores(split, model.classes_[p.argmax(1)], p.max(1)), "cpu_s": cpu}


def _log_expression(counts: sp.csr_matrix) -> np.ndarray:
    x: np.ndarray = counts.toarray()
    return np.log1p(1e4 * x / x.sum(1, keepdims=True))


def stored(path: Any) -> dict[str, dict[str, float]]:
    """Rows of a results file by the names of their splits."""
    return {row["split"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def keep(name: str, found: dict[str, float]) -> None:
    """Puts a row of ours, or of the baseline's, into the results file, in place of an older one."""
    rows = {**stored(OUR_RESULTS), name: {"split": name, **{key: round(value, 4) for key, value in found.items()}}}
    body = ",\n ".join(map(json.dumps, rows.values()))
    OUR_RESULTS.write_text(f'{{"rows": [\n {body}\n]}}\n')


def run(chosen: list[Split]) -> None:
    """Ours and the baseline, anew."""
    for split in chosen:
        keep(split.name, ours(split))
        keep(f"baseline {split.name}", baseline(split))
        print(split.name, stored(OUR_RESULTS)[split.name], file=sys.stderr, flush=True)
    keep("markers", marker_ranks())


def table() -> list[bool]:
    """Prints what is stored; for every row, whether its bar is met."""
    own, peer = stored(OUR_RESULTS), stored(PEER_RESULTS)
    groups: dict[str, list[str]] = {}
    for split in splits():
        groups.setdefault(split.data if split.name.startswith("pbmc") else split.name, []).append(split.name)
    verdicts = []
    print("| row | ours | CellTypist | PCA + LR | bar | CPU s ours | CellTypist | PCA + LR | |\n" + "|---" * 9 + "|")
    held_out: list[list[float]] = []
    for row, names in groups.items():
        sides = [[side.get(f"{prefix}{name}") for name in names] for side, prefix in
                 ((own, ""), (peer, ""), (own, "baseline "))]
        if not all(all(side) for side in sides):
            continue
        cpu = [f"{np.mean([r['cpu_s'] for r in side]):.0f}" for side in sides]
        if row.startswith("unknown"):
            values = [side[0]["auroc"] for side in sides]
            held_out.append(values)
            texts, bar, verdict = [f"{v:.3f}" for v in values], "", ""
        else:
            means = [[float(np.mean([r[key] for r in side])) for key in ("accuracy", "macro_f1")] for side in sides]
            texts = [" / ".join(f"{v:.4f}" for v in mean) for mean in means]
            texts[0] += f" (ece {np.mean([r['ece'] for r in sides[0]]):.3f})"
            within = row.startswith("pbmc")
            met = all(a >= b if within else a > b for a, b in zip(*means[:2], strict=True))
            verdicts.append(met)
            bar, verdict = "at least CellTypist" if within else "above CellTypist", _said(met=met)
        print(f"| {row} | {' | '.join(texts)} | {bar} | {' | '.join(cpu)} | {verdict} |")
    if held_out:
        mean = np.mean(held_out, axis=0)
        verdicts.append(bool(mean[0] >= 0.85))
        print(f"| unknown: mean of {len(held_out)} types | {' | '.join(f'{v:.3f}' for v in mean)} | 0.85 | | | |"
              f" {_said(met=verdicts[-1])} |")
    ranks = own.get("markers", {})
    for name, markers in MARKERS.items():
        if name in ranks:
            verdicts.append(ranks[name] <= 20)
            print(f"| marker of {name}: {' or '.join(markers)} | rank {ranks[name]} | | | 20 | | | |"
                  f" {_said(met=verdicts[-1])} |")
    return verdicts


def _said(*, met: bool) -> str:
    return "met" if met else "NOT met"


def main() -> int:
    """Prints the table; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stored", action="store_true", help="run nothing of ours, print what is stored")
    parser.add_argument("--peer", action="store_true", help="first run CellTypist anew")
    parser.add_argument("--only", default="", help="run splits whose name contains this")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.peer:
        subprocess.run([str(PEER_PYTHON), "-m", "benchmarks.peers.run_celltypist"], cwd=REPO, check=True)
    if not args.stored:
        run([split for split in splits() if args.only in split.name])
    verdicts = table()
    return int(not verdicts or not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
