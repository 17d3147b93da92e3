# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment from pinned requirements, and updates
# it when they change.
# usage: . launch/venv.sh REQUIREMENTS...
# PYTHON is the interpreter (python3), VENV the folder (.venv). Sets $PY to the folder's python.

VENV=${VENV:-.venv}
PY=$VENV/bin/python

# shellcheck source=launch/machine.sh
. launch/machine.sh

make_venv() {
  local python=${PYTHON:-python3} stamp wanted base found
  command -v "$python" >/dev/null || fail "no $python: install Python 3.11 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: ditjax needs 3.11 or newer; set PYTHON to one"
  # What venv wrote down, such as 3.11.7.
  found=$(sed -n 's/^version *= *//p' "$VENV/pyvenv.cfg" 2>/dev/null) || true
  if [ -n "${PYTHON:-}" ] && [ -n "$found" ] &&
    [[ $("$python" --version) != "Python ${found%.*}".* ]]; then
    fail "$VENV has Python $found, and PYTHON is $("$python" --version): remove it or set VENV"
  fi
  wanted=$(cat "$@" | cksum)
  # The stamp holds the checksum of requirements.txt, then one of each set installed on top of it:
  # adding the tests' requirements leaves the demo's valid.
  stamp=$VENV/requirements.cksum
  base=$(cksum <requirements.txt)
  if [ "$(head -n 1 "$stamp" 2>/dev/null)" != "$base" ]; then
    rm -f "$stamp"
  elif [ -x "$PY" ] && grep -qxF "$wanted" "$stamp"; then
    return
  fi
  if [ ! -x "$PY" ]; then
    "$python" -m venv "$VENV" ||
      fail "no virtual environment: on Debian, apt-get install python3-venv"
  fi
  local flags=()
  for file in "$@"; do
    flags+=(-r "$file")
  done
  echo "installing $* into $VENV" >&2
  # Modules are compiled when they are imported: compiling all of them would take longer than the
  # download.
  "$PY" -m pip install --quiet --disable-pip-version-check --no-compile "${flags[@]}" ||
    fail "pip could not install the requirements: its messages are above"
  [ -f "$stamp" ] || echo "$base" >"$stamp"
  echo "$wanted" >>"$stamp"
}

make_venv "$@"
