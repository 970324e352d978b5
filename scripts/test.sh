#!/usr/bin/env bash
# Sets everything up and runs the linter and the tests. Further arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/env.sh" requirements.txt requirements-test.txt
echo "== ruff check ."
.venv/bin/ruff check .
echo "== pytest $*"
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -q -n "${WORKERS:-2}" "$@"
