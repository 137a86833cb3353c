#!/usr/bin/env bash
# Make the environment of palantir 1.4.5 in benchmarks/envs/palantir (git-ignored, about 1 GB).
#
#   bash benchmarks/peers/make_palantir_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/palantir/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/palantir
fi
envs/palantir/bin/pip install palantir==1.4.5
envs/palantir/bin/python -c 'import importlib.metadata as m; print("palantir", m.version("palantir"))'
