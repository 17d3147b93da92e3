#!/usr/bin/env bash
# The demo: a Gflops-against-FD-digits study of nine models on real digits, on two CPU cores.
# usage: bash launch/demo.sh [--config.KEY=VALUE ...]    WORKDIR and JOBS may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh requirements.txt

workdir=${WORKDIR:-runs/digits}
jobs=${JOBS:-$(nproc)}
exec "$PY" -m ditjax.sweep --config=experiments/digits.py --workdir="$workdir" --jobs="$jobs" "$@"
