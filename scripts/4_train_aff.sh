#!/usr/bin/env bash
# Step 4: train the affinity network.
# usage: scripts/4_train_aff.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" train_aff "$@"
