#!/usr/bin/env bash
# Step 3: make affinity labels from the CAMs.
# usage: scripts/3_make_aff_label.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" make_aff_label "$@"
