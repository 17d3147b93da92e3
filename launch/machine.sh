# shellcheck shell=bash
# Sourced by the other scripts: errors, dry runs, a command of ditjax, the names of TPUs.

fail() {
  echo "error: $1" >&2
  exit 2
}

# need NAME WHAT: the variable NAME says it.
need() {
  [ -n "${!1:-}" ] || fail "$1 is not set: expected $2"
}

# quoted WORD...: a line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# run WORD...: runs the command; with DRY_RUN=1 it prints it instead.
run() {
  if [ -n "${DRY_RUN:-}" ]; then quoted "$@"; else "$@"; fi
}

# stoppable SIGNAL WORD...: runs the command, leaves its $status. SIGNAL is passed on to it as
# SIGTERM, and $stopped then says so: a training that is told to end saves and ends with 0, which
# is not to be taken for done.
stoppable() {
  local child again
  stopped='' status=0
  if [ -n "${DRY_RUN:-}" ]; then
    quoted "${@:2}"
    return
  fi
  # In a group of its own: what is sent to ours comes to it once, from here.
  set -m
  "${@:2}" &
  child=$!
  set +m
  trap 'stopped=yes again=yes; kill -TERM "$child" || true' "$1"
  trap 'again=yes; kill -INT "$child" || true' INT
  trap 'again=yes; kill -HUP "$child" || true' HUP
  while true; do
    again='' status=0
    wait "$child" || status=$?
    # It was the signal that ended the waiting.
    [ -n "$again" ] || break
  done
  trap - "$1" INT HUP
}

# ditjax_command COMMAND --FLAG...: checks that there is such a command.
ditjax_command() {
  [ $# -gt 0 ] || fail "no command given: expected one of ditjax's, such as train --config=FILE"
  grep -qs '^    cli\.run(main)$' "ditjax/$1.py" ||
    fail "$1 is no command of ditjax: expected train, encode, sweep or another of the README's"
}

# install: the environment for ACCELERATOR (cuda12, cuda13, tpu or cpu). Leaves $PY, its python.
install() {
  local requirements=(requirements.txt)
  case $ACCELERATOR in
    cuda12 | cuda13 | tpu) requirements+=("launch/requirements/$ACCELERATOR.txt") ;;
    cpu) ;;
    *) fail "ACCELERATOR=$ACCELERATOR: expected cuda12, cuda13, tpu or cpu" ;;
  esac
  if [ -n "${DRY_RUN:-}" ]; then
    PY=.venv/bin/python
    return
  fi
  # The images of clouds come with Python 3.10.
  if [ -z "${PYTHON:-}" ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    PATH=$PATH:~/.local/bin
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    uv python install --quiet 3.12
    PYTHON=$(uv python find --managed-python 3.12)
  fi
  # shellcheck source=launch/venv.sh
  . launch/venv.sh "${requirements[@]}"
  compiler_flags
}

# compiler_flags: with COMPILER_FLAGS=gpu or tpu, adds the flags of XLA that are published for it to
# the environment (ditjax/machines/chips.py has them and their source).
compiler_flags() {
  local variable flags
  [ -n "${COMPILER_FLAGS:-}" ] || return 0
  case $COMPILER_FLAGS in gpu | tpu) ;; *) fail "COMPILER_FLAGS=$COMPILER_FLAGS: expected gpu or tpu" ;; esac
  read -r variable flags < <(
    "$PY" -c "from ditjax.machines.chips import COMPILER_FLAGS as f; print(*f['$COMPILER_FLAGS'][:2])"
  )
  export "$variable=${!variable:+${!variable} }$flags"
  echo "$variable=${!variable}" >&2
}

# TPU=v5e:16x16, the name that `plan --topology` takes -> $tpu_topology, $tpu_chips, and what the
# tools call it: $tpu_name (XPK), $tpu_flags (gcloud), $tpu_label (GKE), $tpu_runtime (VM image).
# shellcheck disable=SC2034 # of the scripts that source this
tpu() {
  local type sides cores
  need TPU "a generation and a topology, such as v5e:16x16"
  tpu_topology=${TPU#*:}
  # The older generations are counted in cores, two a chip.
  case ${TPU%%:*} in
    v4) type=v4 sides=3 cores=2 tpu_label=tpu-v4-podslice tpu_runtime=tpu-ubuntu2204-base ;;
    v5e)
      type=v5litepod sides=2 cores=1
      tpu_label=tpu-v5-lite-podslice tpu_runtime=v2-alpha-tpuv5-lite
      ;;
    v5p) type=v5p sides=3 cores=2 tpu_label=tpu-v5p-slice tpu_runtime=v2-alpha-tpuv5 ;;
    v6e) type=v6e sides=2 cores=1 tpu_label=tpu-v6e-slice tpu_runtime=v2-alpha-tpuv6e ;;
    *) fail "TPU=$TPU: expected v4, v5e, v5p or v6e with a topology, such as v5e:16x16" ;;
  esac
  [[ $tpu_topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((sides - 1))}$ ]] ||
    fail "TPU=$TPU: expected a topology of $sides sides, such as 4x4$([ $sides = 2 ] || echo x4)"
  tpu_chips=$((${tpu_topology//x/*}))
  tpu_name=$type-$((tpu_chips * cores))
  if [ $sides = 2 ]; then
    tpu_flags=(--accelerator-type="$tpu_name")
  else
    tpu_flags=(--type="$type" --topology="$tpu_topology")
  fi
}
