#!/usr/bin/env bash
# Make the environment of phate 2.0.0 in benchmarks/envs/phate (git-ignored, about 700 MB).
#
#   bash benchmarks/peers/make_phate_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/phate/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/phate
fi
envs/phate/bin/pip install phate==2.0.0 graphtools==2.1.0
envs/phate/bin/python -c 'import phate; print("phate", phate.__version__)'
