#!/usr/bin/env bash
# One host, such as one with 8 GPUs: one process drives all its accelerators; it is started again
# when it dies, and goes on from its newest checkpoint.
# usage: bash launch/host.sh COMMAND --config=FILE --workdir=DIR [--config.KEY=VALUE ...]
#        bash launch/host.sh install      makes .venv only
#   A SIGTERM is passed on to it; when it has saved, this ends with status 143: stopped, not done.
#   ACCELERATOR=cuda12 (or cuda13, tpu, cpu), RESTARTS=10, COMPILER_FLAGS=gpu, DRY_RUN=1 may be set.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/machine.sh
. launch/machine.sh

ACCELERATOR=${ACCELERATOR:-cuda12}
[ "${1:-}" = install ] || ditjax_command "$@"
install
if [ "$1" = install ]; then exit 0; fi

left=${RESTARTS:-10}
while true; do
  stoppable TERM "$PY" -m "ditjax.$1" "${@:2}"
  [ -z "$stopped" ] || exit 143
  # A user's mistake (2) and an interrupt (130) would only come again.
  case $status in 0 | 2 | 130) exit "$status" ;; esac
  [ "$left" -gt 0 ] || exit "$status"
  echo "ditjax.$1 ended with status $status: starting it again, $left restarts left" >&2
  left=$((left - 1))
  sleep "${PAUSE:-10}"
done
