#!/usr/bin/env bash
# Step 8: draw and score boxes on the validation images, on data sets of boxes (CUB-200-2011).
# usage: scripts/8_localise.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" localise "$@"
