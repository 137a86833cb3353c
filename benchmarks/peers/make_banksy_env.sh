#!/usr/bin/env bash
# Make the environment of pybanksy 1.3.5 in benchmarks/envs/banksy (git-ignored, about 1 GB).
#
#   bash benchmarks/peers/make_banksy_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/banksy/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/banksy
fi
envs/banksy/bin/pip install pybanksy==1.3.5 scanpy==1.12.4 scikit-learn==1.9.1
envs/banksy/bin/python -c 'import importlib.metadata as m; print("pybanksy", m.version("pybanksy"))'
