#!/usr/bin/env bash
# Make the environment of CellTypist in benchmarks/envs/celltypist (git-ignored, about 1 GB).
#
#   bash benchmarks/peers/make_celltypist_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply. celltypist 1.7.1 passes an
# argument to LogisticRegression that scikit-learn 1.8 no longer has.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/celltypist/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/celltypist
fi
envs/celltypist/bin/pip install celltypist==1.7.1 'scikit-learn<1.8'
envs/celltypist/bin/python -c 'import celltypist, sklearn; print("celltypist", celltypist.__version__, "scikit-learn", sklearn.__version__)'
