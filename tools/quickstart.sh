#!/usr/bin/env bash
# From a clone to a trained policy: sets up .venv, then runs the main job on a CPU.
# Further arguments are settings, e.g.  ./tools/quickstart.sh run.seed=1 run.dir=runs/seed1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup_env.sh
exec "${SPEAR_VENV:-.venv}/bin/megatron-spear" train examples/alfworld/quickstart.yaml "$@"
