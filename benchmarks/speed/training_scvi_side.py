"""The scvi-tools side of the training-speed benchmark; runs in the ``scvi`` environment.

    OMP_NUM_THREADS=1 benchmarks/envs/scvi/bin/python benchmarks/speed/training_scvi_side.py \
        --data benchmarks/cache/speed/counts_20000x2000.npz --likelihood nb --epochs 20

Reads a file of ``make_counts.py``, trains ``scvi.model.SCVI`` (defaults but for the likelihood) on
its ``train`` cells and scores its ``held_out`` cells. The last line printed is one JSON object:

- ``cpu_s``: process CPU seconds of ``train()``, all threads, without imports and evaluation;
  ``cells_per_cpu_s`` = epochs x training cells / ``cpu_s``; ``steady_cells_per_cpu_s`` takes
  the median epoch in place of the mean;
- ``held_out``: ``reconstruction`` = log p(x | z) with one z drawn from the posterior, ``elbo`` =
  that minus the whole KL term (weight 1 whatever the warm-up did); summed over genes, constant
  terms such as log x! included, mean over the held-out cells and over 5 draws;
- ``curve``: the same figures at every ``--eval-every`` epochs, with the CPU seconds of training
  up to then.

This file imports nothing from the project, so that it can be run by path.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import anndata
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch

DRAWS = 5


class Clock(pl.Callback):
    """Takes the CPU time of every epoch, and stops while the held-out cells are scored."""

    def __init__(self, evaluate, every: int):
        self.epoch_cpu_s: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.paused_s = 0.0
        self._evaluate = evaluate
        self._every = every
        self._start = 0.0

    def on_train_epoch_start(self, *_) -> None:
        """Note when the epoch begins."""
        self._start = time.process_time()

    def on_train_epoch_end(self, *_) -> None:
        """Store the epoch's time; score where a point of the curve is due."""
        now = time.process_time()
        self.epoch_cpu_s.append(now - self._start)
        epoch = len(self.epoch_cpu_s)
        if self._every and epoch % self._every == 0:
            point = {"epoch": epoch, "cpu_s": round(sum(self.epoch_cpu_s), 2)}
            self.curve.append(point | self._evaluate())
            self.paused_s += time.process_time() - now


def read(path: Path) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Return the training cells and the held-out cells."""
    with np.load(path) as file:
        counts = sp.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
        batch = pd.Categorical([f"b{code}" for code in file["batch"]])
        obs = pd.DataFrame({"batch": batch}, index=[f"c{row}" for row in range(len(batch))])
        adata = anndata.AnnData(counts, obs=obs)
        return adata[file["train"]].copy(), adata[file["held_out"]].copy()


def held_out_likelihood(model, cells: anndata.AnnData) -> dict[str, float]:
    """Return ELBO and reconstruction log-likelihood, mean over cells and draws."""
    training, trained = model.module.training, model.is_trained_
    model.is_trained_ = True
    model.module.eval()  # get_elbo does not: it counts on train() having ended
    with torch.random.fork_rng():
        torch.manual_seed(0)
        elbo = [float(model.get_elbo(cells)) for _ in range(DRAWS)]
        error = [float(model.get_reconstruction_error(cells)["reconstruction_loss"]) for _ in range(DRAWS)]
    model.module.train(training)
    model.is_trained_ = trained
    return {
        "elbo": round(float(np.mean(elbo)), 3),
        "reconstruction": round(-abs(float(np.mean(error))), 3),
    }


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train once and return the figures."""
    torch.set_num_threads(args.threads)
    scvi.settings.seed = args.seed
    scvi.settings.verbosity = logging.WARNING
    train, held_out = read(args.data)
    scvi.model.SCVI.setup_anndata(train, batch_key="batch")
    model = scvi.model.SCVI(train, gene_likelihood=args.likelihood)
    clock = Clock(lambda: held_out_likelihood(model, held_out), args.eval_every)
    wall, cpu = time.perf_counter(), time.process_time()
    model.train(
        max_epochs=args.epochs,
        batch_size=args.batch_size,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[clock],
        plan_kwargs={"n_epochs_kl_warmup": args.kl_warmup},
    )
    cpu = time.process_time() - cpu - clock.paused_s
    wall = time.perf_counter() - wall
    return {
        "program": f"scvi-tools {scvi.__version__}, torch {torch.__version__}",
        "data": args.data.name,
        "likelihood": args.likelihood,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "epochs": args.epochs,
        "kl_warmup_epochs": args.kl_warmup,
        "n_train": train.n_obs,
        "n_genes": train.n_vars,
        "n_held_out": held_out.n_obs,
        "n_parameters": sum(p.numel() for p in model.module.parameters()),
        "cpu_s": round(cpu, 2),
        "wall_s_with_evaluation": round(wall, 2),
        "cells_per_cpu_s": round(train.n_obs * args.epochs / cpu, 1),
        "steady_cells_per_cpu_s": round(train.n_obs / float(np.median(clock.epoch_cpu_s)), 1),
        "held_out": held_out_likelihood(model, held_out),
        "curve": clock.curve,
    }


def main() -> None:
    """Parse the arguments, run, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--likelihood", choices=("zinb", "nb", "poisson"), default="zinb")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl-warmup", type=int, default=400, help="epochs; scVI's default is 400")
    parser.add_argument("--eval-every", type=int, default=0, help="epochs between curve points")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result = json.dumps(run(args))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(result + "\n")
    print(result, flush=True)


if __name__ == "__main__":
    main()
