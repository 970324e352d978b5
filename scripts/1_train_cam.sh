#!/usr/bin/env bash
# Step 1: train the CAM network of METHOD from tags.
# usage: scripts/1_train_cam.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" train_cam "$@"
