#!/usr/bin/env bash
# Make the environment of POT 0.9.7, wot 1.0.8 and moscot 0.5.2 in benchmarks/envs/ot (git-ignored, about 2 GB).
#
#   bash benchmarks/peers/make_ot_env.sh
#
# It is no dependency of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/ot/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/ot
fi
envs/ot/bin/pip install POT==0.9.7 wot==1.0.8.post2 moscot==0.5.2
envs/ot/bin/python -c 'import ot; print("POT", ot.__version__)'
