#!/usr/bin/env bash
# Make the environment of scVelo 0.3.4 in benchmarks/envs/scvelo (git-ignored, about 1 GB).
#
#   bash benchmarks/peers/make_scvelo_env.sh
#
# It is no dependency of the project: it needs numpy < 2, and versions of scanpy, anndata and pandas of that time. The
# interpreter is a Python 3.12 that uv knows, or the one named in PYTHON312. pip (not uv) installs, so that its own
# settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/scvelo/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/scvelo
fi
envs/scvelo/bin/pip install scvelo==0.3.4 'numpy<2' 'scanpy<1.11' 'anndata<0.12' 'pandas<2.3' 'scipy<1.15' 'matplotlib<3.10'
envs/scvelo/bin/python -c 'import scvelo; print("scvelo", scvelo.__version__)'
