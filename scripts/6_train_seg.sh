#!/usr/bin/env bash
# Step 6: train the segmentation network on the pseudo masks.
# usage: scripts/6_train_seg.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" train_seg "$@"
