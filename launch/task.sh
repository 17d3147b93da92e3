#!/usr/bin/env bash
# One process of a job whose scheduler starts it again unless it ends with 0 (Kubernetes, Slurm).
# usage: bash launch/task.sh WORD...
#   Told to end by SIGTERM, a training saves and ends with 0; this then ends with 143, so that the
#   scheduler does not take what was stopped for done.
set -euo pipefail
# shellcheck source=launch/machine.sh
. "$(dirname "$0")/machine.sh"

stoppable TERM "$@"
if [ -n "$stopped" ] && [ "$status" = 0 ]; then status=143; fi
exit "$status"
