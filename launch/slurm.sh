#!/usr/bin/env bash
# A Slurm job, or an array of them: one process a node drives all its GPUs.
# usage, from the repository's root, which all nodes share:
#   sbatch --nodes=2 launch/slurm.sh train --config=FILE --workdir=DIR ...
#   sbatch --array=0-8 launch/slurm.sh sweep --config=FILE --workdir=DIR ...   a job a cell
#   sbatch --array=0-3 launch/slurm.sh encode --config=FILE --out=DIR ...      a job a share of files
#   A job that is preempted, out of time, or died is queued again and goes on from its checkpoint.
#   Partition, account, time and GPUs are options of sbatch: they win over those below.
#   ACCELERATOR=cuda12 (or cuda13, cpu), RESTARTS=10, COMPILER_FLAGS=gpu, DRY_RUN=1 may be set.
#SBATCH --job-name=ditjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.log
set -euo pipefail
# Slurm runs a copy of this file from a directory of its own.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if ! [ -f launch/machine.sh ]; then
  echo "error: $PWD is not the root of ditjax: run sbatch from there" >&2
  exit 2
fi
# shellcheck source=launch/machine.sh
. launch/machine.sh

ditjax_command "$@"
flags=("${@:2}")
nodes=${SLURM_JOB_NUM_NODES:-1}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  [ "$nodes" = 1 ] || fail "an array of jobs on $nodes nodes: expected --nodes=1, a process a job"
  case $1 in
    sweep) flags+=(--index="$SLURM_ARRAY_TASK_ID") ;;
    encode)
      [ "${SLURM_ARRAY_TASK_MIN:-0}" = 0 ] ||
        fail "an array that does not start at 0: expected --array=0-N"
      flags+=(--index="$SLURM_ARRAY_TASK_ID" --count="$SLURM_ARRAY_TASK_COUNT")
      ;;
    *) fail "$1 in an array: expected sweep or encode, which take an --index" ;;
  esac
fi
[ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] || fail "a node's GPUs are one task's: expected --ntasks-per-node=1"

ACCELERATOR=${ACCELERATOR:-cuda12}
# The jobs of an array start together, and one of them makes the environment.
exec 9>.venv.lock
flock 9
install
exec 9>&-

again() {
  echo "$1: the job is queued again" >&2
  run scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

command=(bash launch/task.sh "$PY" -m "ditjax.$1" "${flags[@]}")
if [ "$nodes" -gt 1 ]; then
  # Not --distributed: JAX takes a task of Slurm for a process with one GPU.
  command+=(--coordinator="$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 10000))" --processes="$nodes")
  # shellcheck disable=SC2016 # the task expands it
  command=(bash -c 'exec "$@" --process="$SLURM_PROCID"' ditjax "${command[@]}")
fi
# USR1 comes when the time is nearly up: all save, and then the job is queued again.
stoppable USR1 srun --kill-on-bad-exit=1 --cpu-bind=none "${command[@]}"
[ -z "$stopped" ] || again "time is up"
# A user's mistake (2) would only come again.
case $status in 0 | 2) exit "$status" ;; esac
[ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-10}" ] || exit "$status"
again "srun ended with status $status"
