#!/usr/bin/env bash
# Step 5: make pseudo masks: CAMs spread by a random walk.
# usage: scripts/5_random_walk.sh METHOD [flags of run_sample.py]
set -euo pipefail
. "$(dirname "$0")/step.sh" random_walk "$@"
