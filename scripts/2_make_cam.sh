#!/usr/bin/env bash
# Step 2: infer the CAMs of the training images.
# usage: scripts/2_make_cam.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" make_cam "$@"
