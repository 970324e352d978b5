#!/usr/bin/env bash
# Step 7: predict and score the validation images.
# usage: scripts/7_infer_seg.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" infer_seg "$@"
