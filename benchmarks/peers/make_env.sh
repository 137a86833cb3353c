#!/usr/bin/env bash
# Make the environments of the peer programs in benchmarks/envs (git-ignored, about 3 GB).
#
#   bash benchmarks/peers/make_env.sh            # both
#   bash benchmarks/peers/make_env.sh scvi       # scvi-tools only (Python 3.11)
#   bash benchmarks/peers/make_env.sh scib       # scib-metrics, harmonypy, scanpy (Python 3.12)
#
# They are no dependencies of the project. The interpreters are those that uv knows, or named in
# PYTHON311 and PYTHON312. pip (not uv) installs, so that its own settings apply: where PyPI's
# torch would bring CUDA, point PIP_FIND_LINKS or PIP_INDEX_URL at a CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p envs
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

find_python() { # version: the first installed interpreter that can make an environment with pip
  local path
  while read -r _ path _; do
    if "$path" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$path"
      return
    fi
  done < <(uv python list --only-installed "$1")
  echo "no Python $1 with venv and ensurepip found: name one in PYTHON${1/./}" >&2
  return 1
}

make_venv() { # name, interpreter
  if [ ! -x "envs/$1/bin/python" ]; then
    "$2" -m venv "envs/$1"
  fi
}

make_scvi() {
  local python
  python="${PYTHON311:-$(find_python 3.11)}"
  make_venv scvi "$python"
  envs/scvi/bin/pip install torch==2.13.0
  envs/scvi/bin/pip install scvi-tools==1.4.2
  envs/scvi/bin/python -c 'import scvi, torch; print("scvi-tools", scvi.__version__, "torch", torch.__version__)'
}

make_scib() {
  local python
  python="${PYTHON312:-$(find_python 3.12)}"
  make_venv scib "$python"
  envs/scib/bin/pip install scib-metrics==0.6.1 harmonypy==2.1.0 scanpy==1.12.4 \
    scikit-misc==0.5.3 leidenalg==0.12.0 igraph==1.0.0
  envs/scib/bin/python -c 'import scib_metrics as m; print("scib-metrics", m.__version__)'
}

if [ "$#" -eq 0 ]; then
  set -- scvi scib
fi
for name in "$@"; do
  case "$name" in
  scvi) make_scvi ;;
  scib) make_scib ;;
  *)
    echo "unknown environment '$name'; known: scvi, scib" >&2
    exit 2
    ;;
  esac
done
