#!/usr/bin/env bash
# Runs the linter, the formatter, the type checker, shellcheck and the tests. With --oracles it
# compares with PyTorch instead, and with --tpu it compiles for TPUs that are not here.
# usage: bash launch/test.sh [--oracles | --tpu] [pytest arguments]
# PYTHON=python3.13 VENV=.venv-3.13 runs it on another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
# Tests start hundreds of processes: without compiled modules each would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE

if [ "${1:-}" = --oracles ]; then
  # The public implementations, live: PyTorch and diffusers are several gigabytes.
  shift
  # shellcheck source=launch/venv.sh
  . launch/venv.sh requirements.txt tests/requirements.txt tests/oracles/requirements.txt
  "$PY" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r tests/oracles/no-deps.txt
  # torch-fidelity 0.4.0 installs its own tests as a package named `tests`, which would hide ours.
  rm -rf "$VENV"/lib/python3*/site-packages/tests
  exec "$PY" -m pytest --numprocesses="${JOBS:-$(nproc)}" --dist=loadfile --no-loadscope-reorder tests/oracles "$@"
fi

if [ "${1:-}" = --tpu ]; then
  # libtpu is 700 MB and compiling takes minutes: run it by hand, not in CI.
  shift
  # shellcheck source=launch/venv.sh
  . launch/venv.sh requirements.txt tests/requirements.txt launch/requirements/tpu.txt
  exec "$PY" -m pytest tests/oracles/test_tpu.py tests/oracles/test_plan.py "$@"
fi

# shellcheck source=launch/venv.sh
. launch/venv.sh requirements.txt tests/requirements.txt

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$VENV/bin/shellcheck" --external-sources launch/*.sh .ci/run
# The type checker needs one core for a minute: it runs beside the tests.
types=
if "$PY" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  "$PY" -m mypy &
  types=$!
  trap 'kill "$types" 2>/dev/null || true' INT TERM
else
  echo "types: not checked on $("$PY" --version), only on 3.11: the newer NumPy's stubs differ"
fi
status=0
# In the order of tests/conftest.py, not by the number of a file's tests.
"$PY" -m pytest --numprocesses="${JOBS:-$(nproc)}" --dist=loadfile --no-loadscope-reorder "$@" ||
  status=$?
if [ -n "$types" ] && ! wait "$types"; then
  echo "error: mypy found errors, or was stopped: its messages are above" >&2
  status=1
fi
exit "$status"
