#!/usr/bin/env bash
# Sets everything up and runs the linter and the tests. Further arguments go to pytest.
# --fast, as the first argument, leaves out the tests that are marked slow.
set -euo pipefail
. "$(dirname "$0")/env.sh" requirements.txt requirements-test.txt
# built from source: where that fails, the tests against it are skipped and say so
try_package pydensecrf2 pydensecrf.densecrf "the tests against pydensecrf are skipped"
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
echo "== ruff check ."
.venv/bin/ruff check .
echo "== pytest $*"
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -q -n "${WORKERS:-2}" "$@"
