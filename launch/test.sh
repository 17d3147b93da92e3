#!/usr/bin/env bash
# Linter, formatter, types, shell scripts, and the tests.
# usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh requirements.txt tests/requirements.txt

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
.venv/bin/shellcheck --external-sources launch/*.sh .ci/run
exec "$PY" -m pytest --numprocesses="${JOBS:-$(nproc)}" --dist=loadfile "$@"
