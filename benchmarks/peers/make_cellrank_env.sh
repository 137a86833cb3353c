#!/usr/bin/env bash
# Make the environment of CellRank 2.3.3 in benchmarks/envs/cellrank (git-ignored, about 1.2 GB).
#
#   bash benchmarks/peers/make_cellrank_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply. PETSc and SLEPc are left out, as in
# CellRank's own `pip install cellrank`: Schur vectors come from scipy and linear systems from its GMRES.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/cellrank/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/cellrank
fi
envs/cellrank/bin/pip install cellrank==2.3.3 scanpy==1.12.4 'scipy<1.17'
envs/cellrank/bin/python -c 'import cellrank; print("cellrank", cellrank.__version__)'
