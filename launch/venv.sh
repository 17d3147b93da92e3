# shellcheck shell=bash
# Sourced by the other scripts: makes .venv from pinned requirements, once per change of them.
# usage: . launch/venv.sh REQUIREMENTS...    Leaves $PY, the environment's python.

PY=.venv/bin/python

# shellcheck source=launch/machine.sh
. launch/machine.sh

make_venv() {
  local python=${PYTHON:-python3} stamp wanted base
  command -v "$python" >/dev/null || fail "no $python: install Python 3.11 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: ditjax needs 3.11 or newer; set PYTHON to one"
  wanted=$(cat "$@" | cksum)
  # First requirements.txt itself, then the sets that were added to it: the demo's stays when the
  # tests' come.
  stamp=.venv/requirements.cksum
  base=$(cksum <requirements.txt)
  if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$base" ]; then
    rm -f "$stamp"
  elif [ -x "$PY" ] && grep -qxF "$wanted" "$stamp"; then
    return
  fi
  if [ ! -x "$PY" ]; then
    "$python" -m venv .venv || fail "no virtual environment: on Debian, apt-get install python3-venv"
  fi
  local flags=()
  for file in "$@"; do
    flags+=(-r "$file")
  done
  echo "installing $* into .venv" >&2
  # Modules are compiled when they are imported, as in any checkout: all of them would take longer
  # than the download.
  "$PY" -m pip install --quiet --disable-pip-version-check --no-compile "${flags[@]}" ||
    fail "pip could not install the requirements: its messages are above"
  [ -f "$stamp" ] || echo "$base" >"$stamp"
  echo "$wanted" >>"$stamp"
}

make_venv "$@"
