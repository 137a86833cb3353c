#!/usr/bin/env bash
# Make the environment of liana 1.10.0 in benchmarks/envs/liana (git-ignored, about 1 GB).
#
#   bash benchmarks/peers/make_liana_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/liana/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/liana
fi
envs/liana/bin/pip install liana==1.10.0 scanpy==1.12.4
envs/liana/bin/python -c 'import importlib.metadata as m; print("liana", m.version("liana"))'
