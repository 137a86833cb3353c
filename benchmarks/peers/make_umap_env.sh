#!/usr/bin/env bash
# Make the environment of umap-learn's ParametricUMAP in benchmarks/envs/umap (git-ignored, about 2 GB).
#
#   bash benchmarks/peers/make_umap_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/umap/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/umap
fi
envs/umap/bin/pip install umap-learn==0.5.12 tensorflow-cpu==2.21.0 keras==3.15.1
envs/umap/bin/python -c 'import umap; print("umap-learn", umap.__version__)'
