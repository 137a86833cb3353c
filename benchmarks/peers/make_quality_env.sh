#!/usr/bin/env bash
# Make the environment of scrublet, magic-impute and scanpy in benchmarks/envs/quality (git-ignored, about 1 GB).
#
#   bash benchmarks/peers/make_quality_env.sh
#
# They are no dependencies of the project. The interpreter is a Python 3.12 that uv knows, or the one named
# in PYTHON312. pip (not uv) installs, so that its own settings apply.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
mkdir -p envs
if [ ! -x envs/quality/bin/python ]; then
  "${PYTHON312:-$(uv python find 3.12)}" -m venv envs/quality
fi
envs/quality/bin/pip install scrublet==0.2.3 magic-impute==3.0.0 scanpy==1.12.4 scikit-misc==0.5.3 setuptools
envs/quality/bin/python -c '
import magic, scanpy, scrublet
from importlib.metadata import version
for name in ("scrublet", "magic-impute", "scanpy"):
    print(name, version(name))'
