#!/usr/bin/env bash
# Sets everything up and runs the sample: SEAM from tags to masks on generated images, in minutes on a CPU.
# Further arguments go to run_sample.py.
set -euo pipefail
. "$(dirname "$0")/env.sh" requirements.txt
echo "== python run_sample.py $*"
exec .venv/bin/python run_sample.py "$@"
