#!/bin/bash
# Submits one of the paper's runs. What comes behind the three names goes to `launch slurm`: further
# files, settings, --dry-run. SITE is the file that says what your cluster is like, RUNS a folder that
# all nodes see.
#   slurm/paper.sh alfworld drbot-gigpo-spear qwen2.5-7b-32gpus --dry-run
#   slurm/paper.sh math_code drbot-grpo-spear qwen3-32b-128gpus examples/math_code/32k.yaml
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 TASK METHOD LAYOUT [FILE.yaml | a.b=c | --dry-run] ..." >&2
    exit 2
fi
cd "$(dirname "$0")/.."
name=$1-$2-$3
files=("examples/$1/paper.yaml" "examples/methods/$2.yaml" "examples/layouts/$3.yaml")
shift 3
exec megatron-spear launch slurm "${files[@]}" "${SITE:-slurm/sites/venv.yaml}" \
    "run.name=$name" "run.dir=${RUNS:-runs}/$name" "$@"
