"""Training speed of the count VAE beside scvi-tools SCVI, at equal held-out likelihood: one table.

    uv run python -m benchmarks.speed.training                    # both sides, about ten CPU minutes
    uv run python -m benchmarks.speed.training --only diffbio     # scvi-tools as stored
    uv run python -m benchmarks.speed.training --likelihood nb

Both sides train on the same 18,000 of 20,000 x 2,000 NB counts (`make_counts.py`, 10 % not zero) with the same
network (128 hidden units, 10 latent dimensions, batch in the decoder), batches of 128, one KL warm-up, and no
early stopping, each in a process of its own on one core with one thread, and score the other 2,000 cells:

- CPU s: of the call that trains, compilation included: ours twice, with an empty compilation cache as on a
  machine that has never run it, and with the one that the first run left (the default after the first run);
- cells/CPU s: epochs x cells / CPU s; steady: of the median epoch, which leaves compilation out;
- ELBO, log p(x|z): held out, in nats per cell, constants included, mean of 5 draws of z.

The bar: at least 2.5 times scvi-tools' cells per CPU second, with a held-out ELBO at least as high.
scvi-tools runs in `benchmarks/envs/scvi` (`benchmarks/peers/make_env.sh`), its last result is stored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.speed.make_counts import load_counts, make_counts, save_counts

import diffbio  # before jax, which then keeps what it compiles

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "benchmarks" / "cache" / "speed" / "counts_20000x2000.npz"
STORED = REPO / "benchmarks" / "results" / "training_scvi.json"
SCVI_PYTHON = REPO / "benchmarks" / "envs" / "scvi" / "bin" / "python"
DRAWS = 5
BAR = 2.5


def held_out_likelihood(op: Any, counts: np.ndarray, batch: np.ndarray) -> dict[str, float]:
    """ELBO and log p(x | z) of cells, mean over cells and draws of z."""
    import jax
    import jax.numpy as jnp

    from diffbio.math.distributions import gaussian_kl
    from diffbio.nn.count_vae import Gaussian, count_log_prob, log_positive

    @jax.jit
    def score(x: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        one_hot = jax.nn.one_hot(labels, op.config.n_batches)
        q: Gaussian = op.vae.encode(x)
        z = q.mean + jnp.exp(0.5 * q.logvar) * jax.random.normal(key, q.mean.shape)
        p = op.vae.decode(z, log_positive(x.sum(-1)), one_hot)
        return count_log_prob(op.config.likelihood, x, p), gaussian_kl(q.mean, q.logvar)

    values = [
        np.asarray(score(counts[i : i + 500], batch[i : i + 500], jax.random.fold_in(jax.random.key(draw), i)))
        for draw in range(DRAWS)
        for i in range(0, len(counts), 500)
    ]
    reconstruction, kl = np.concatenate(values, axis=1).astype(float)
    return {
        "elbo": round(float((reconstruction - kl).mean()), 3),
        "reconstruction": round(float(reconstruction.mean()), 3),
    }


def run_ours(likelihood: str, epochs: int, warmup: int, seed: int) -> dict[str, Any]:
    """Trains `VAENormalizer` once; the figures of one row."""
    import jax.numpy as jnp
    import scipy.sparse as sp
    from flax import nnx

    from diffbio.data.source import as_source
    from diffbio.operators.normalization import VAENormalizer, VAENormalizerConfig

    data = load_counts(DATA)
    counts = sp.csr_matrix((data.data, data.indices, data.indptr), shape=data.shape)
    train = {"counts": counts[data.train], "batch_labels": data.batch[data.train]}
    source = as_source(train, cell_keys={"counts", "batch_labels", "library_size"})
    stamps: list[float] = []
    order = source.order

    def stamped(*args: Any) -> np.ndarray:  # `fit` asks for an order once an epoch
        stamps.append(time.process_time())
        return order(*args)

    source.order = stamped  # type: ignore[method-assign]
    config = VAENormalizerConfig(
        n_genes=data.shape[1], latent_dim=10, hidden_dims=(128,), likelihood=likelihood, n_batches=3
    )
    start = time.process_time()
    op = VAENormalizer(config, rngs=nnx.Rngs(seed))
    schedules = {"kl_weight": lambda epoch: jnp.minimum(1.0, jnp.floor(epoch) / warmup)}
    diffbio.fit(
        op, source, schedules=schedules, max_epochs=epochs, validation=0.0, batch_size=128, seed=seed, progress=False
    )
    cpu = time.process_time() - start
    cells = len(data.train)
    epoch_cpu = np.diff(stamps[1:])  # the first one compiles
    held_out = counts[data.held_out].toarray().astype(np.float32)
    return {
        "program": f"diffbio {diffbio.__version__}",
        "likelihood": likelihood,
        "epochs": epochs,
        "cpu_s": round(cpu, 2),
        "cells_per_cpu_s": round(cells * epochs / cpu, 1),
        "steady_cells_per_cpu_s": round(cells / float(np.median(epoch_cpu)), 1),
        "held_out": held_out_likelihood(op, held_out, data.batch[data.held_out]),
    }


def in_process(command: list[str], core: int, **more: str) -> dict[str, Any]:
    """Runs a command on one core with one thread; its last line is JSON. `more`: environment variables."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", **more}
    done = subprocess.run(
        command,
        env={**os.environ, **threads, **flags},
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def scvi_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """scvi-tools' rows, run now or as stored."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if args.only != "diffbio":
        rows = []
        for epochs in args.epochs:
            command = [str(SCVI_PYTHON), "benchmarks/speed/training_scvi_side.py", "--data", str(DATA)]
            command += ["--likelihood", args.likelihood, "--epochs", str(epochs), "--kl-warmup", str(args.warmup)]
            rows.append(in_process(command, args.core))
        stored[args.likelihood] = rows
        STORED.parent.mkdir(parents=True, exist_ok=True)
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    return list(stored.get(args.likelihood, []))


def main() -> None:
    """Runs both sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--likelihood", choices=("zinb", "nb", "poisson"), default="zinb")
    parser.add_argument("--epochs", type=int, nargs="+", default=[20])
    parser.add_argument("--warmup", type=int, default=10, help="epochs until the KL term has weight 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--only", choices=("diffbio",), help="leave scvi-tools as stored")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DATA.exists():
        save_counts(make_counts(), DATA)
    if args.side:
        print(json.dumps(run_ours(args.likelihood, args.epochs[0], args.warmup, args.seed)))
        return
    command = [sys.executable, "-m", "benchmarks.speed.training", "--side", "--likelihood", args.likelihood]
    command += ["--warmup", str(args.warmup), "--seed", str(args.seed)]
    ours = []
    for n in args.epochs:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "warm"):
                row = in_process([*command, "--epochs", str(n)], args.core, JAX_COMPILATION_CACHE_DIR=cache)
                ours.append(row | {"cache": state, "program": f"{row['program']}, {state} cache"})
    theirs = scvi_rows(args)
    print(f"{args.likelihood}, 18,000 cells x 2,000 genes, KL warm-up {args.warmup} epochs, one thread")
    print(f"{'program':38}{'epochs':>7}{'CPU s':>8}{'cells/CPU s':>13}{'steady':>9}{'ELBO':>10}{'log p(x|z)':>12}")
    for row in (*ours, *theirs):
        rates = f"{row['cells_per_cpu_s']:13.0f}{row['steady_cells_per_cpu_s']:9.0f}"
        held_out = f"{row['held_out']['elbo']:10.2f}{row['held_out']['reconstruction']:12.2f}"
        print(f"{row['program']:38}{row['epochs']:7}{row['cpu_s']:8.1f}{rates}{held_out}")
    for mine in ours:
        for peer in (row for row in theirs if row["epochs"] == mine["epochs"]):
            total = mine["cells_per_cpu_s"] / peer["cells_per_cpu_s"]
            steady = mine["steady_cells_per_cpu_s"] / peer["steady_cells_per_cpu_s"]
            gain = mine["held_out"]["elbo"] - peer["held_out"]["elbo"]
            speed = f"{total:.2f} times the speed (steady {steady:.2f}; bar {BAR})"
            print(f"{mine['epochs']} epochs, {mine['cache']} cache: {speed}, ELBO {gain:+.2f}")


if __name__ == "__main__":
    main()
