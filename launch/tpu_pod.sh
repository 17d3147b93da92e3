#!/usr/bin/env bash
# A slice of a TPU pod through gcloud: asked for, given this commit, run on every worker.
# usage: export NAME=dit ZONE=us-west4-a TPU=v5e:16x16
#   bash launch/tpu_pod.sh create                   asks for it (a queued resource)
#   bash launch/tpu_pod.sh run COMMAND --FLAG...    starts the commit's command in the background
#   bash launch/tpu_pod.sh keep COMMAND --FLAG...   both, and again when it is preempted
#   bash launch/tpu_pod.sh log | stop | delete
#   SPOT=1, PROJECT, RUNTIME=the VM's image, RESTARTS, DITJAX_DATA, DRY_RUN=1 may be set, and
#   SETUP='sudo mount ...': shell commands for every worker first. --workdir must be on a file
#   system that all workers share.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/machine.sh
. launch/machine.sh

action=${1:-}
shift || true
case $action in
  create | log | stop | delete) ;;
  run | keep)
    ditjax_command "$@"
    git rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
      fail "$PWD has no commit of git, which is what the workers are given"
    ;;
  *) fail "'$action' is no action: expected create, run, keep, log, stop or delete" ;;
esac
need NAME "a name for the slice"
need ZONE "a zone, such as us-west4-a"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

create() {
  tpu
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
    "${tpu_flags[@]}" --runtime-version="${RUNTIME:-$tpu_runtime}" ${SPOT:+--spot}
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

# on WORKERS COMMAND: runs shell commands there.
on() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

# What every worker does to start COMMAND --FLAG...; its pid, log and status lie beside the files.
worker_script() {
  cat <<'END'
set -e
if [ -e ditjax.pid ] && kill -0 "$(cat ditjax.pid)" 2>/dev/null; then
  echo "error: a command is running here: stop it first" >&2
  exit 2
fi
END
  if [ -n "${SETUP:-}" ]; then echo "$SETUP"; fi
  cat <<'END'
mkdir -p ditjax
find ditjax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf ditjax.tar.gz -C ditjax
rm -f ditjax.status
END
  echo "export ACCELERATOR=tpu RESTARTS=$(quoted "${RESTARTS:-10}")"
  if [ -n "${DITJAX_DATA:-}" ]; then echo "export DITJAX_DATA=$(quoted "$DITJAX_DATA")"; fi
  echo 'bash ditjax/launch/host.sh install'
  # shellcheck disable=SC2016 # the worker expands it
  # Stopped (143) is no status: the command that is kept goes on when its slice is there again.
  echo 'nohup setsid bash -c '\''trap : TERM; bash ditjax/launch/host.sh "$@"; status=$?
[ $status = 143 ] || echo $status >ditjax.status'\' \
    "ditjax $(quoted "$@" --distributed) >>ditjax.log 2>&1 </dev/null &"
  echo 'echo $! >ditjax.pid'
}

start() {
  local archive=${TMPDIR:-/tmp}/ditjax-$NAME.tar.gz
  git diff --quiet HEAD || echo "note: changes that are not committed stay here" >&2
  run git archive --format=tar.gz --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:ditjax.tar.gz" "${where[@]}" --worker=all &&
    on all "$(worker_script "$@")"
}

# The command on worker 0: running, its status when it ended, or none.
progress() {
  # shellcheck disable=SC2016 # the worker expands it
  on 0 'if [ -e ditjax.status ]; then cat ditjax.status
elif [ -e ditjax.pid ] && kill -0 "$(cat ditjax.pid)" 2>/dev/null; then echo running
else echo none; fi'
}

keep() {
  local state found='' asked=''
  if [ -n "${DRY_RUN:-}" ]; then
    create
    start "$@"
    return
  fi
  while true; do
    # No answer is no news: gcloud fails when the network does.
    state=$(gcloud compute tpus queued-resources list "${where[@]}" \
      --filter="name ~ /$NAME\$" --format='value(state.state)') || state=UNKNOWN
    case ${state:-NONE} in
      NONE)
        create || [ -n "$asked" ] || fail "gcloud refused to create $NAME: its message is above"
        asked=yes
        ;;
      SUSPENDED | FAILED) delete || true ;;
      ACTIVE)
        found=$(progress) || found=running
        case $found in
          running) ;;
          none) start "$@" || true ;;
          *) exit "$found" ;;
        esac
        ;;
    esac
    echo "$(date -u +%H:%M:%S) $NAME: ${state:-NONE} $found" >&2
    found=''
    sleep "${PAUSE:-60}"
  done
}

stop() {
  # shellcheck disable=SC2016 # the workers expand it
  on all 'kill -- "-$(cat ditjax.pid)"'
}

case $action in
  create | delete | stop) "$action" ;;
  run) start "$@" ;;
  keep) keep "$@" ;;
  log) on 0 'tail -n 100 -f ditjax.log' ;;
esac
