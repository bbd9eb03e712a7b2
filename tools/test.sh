#!/usr/bin/env bash
# Everything CI checks: lint, format, types, import contract, tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup_env.sh
bin="${SPEAR_VENV:-.venv}/bin"
export WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
if [ $# -gt 0 ]; then
    exec "$bin/python" -m pytest "$@"
fi
# A real Slurm of a few megabytes, for its tests; they are skipped where it cannot be installed.
install_slurm() {
    local packages=(slurmctld slurmd slurm-client munge)
    if [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ] && [ -x /usr/sbin/munged ]; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
    echo "test: installing ${packages[*]}"
    timeout 60 apt-get -qq update >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive timeout 180 \
        apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
        echo "test: Slurm could not be installed; its tests are skipped"
}
install_slurm
# A file's tests run in one process, as they share results of ranks and whole runs; in this order, in
# which the long files come first.
export OMP_NUM_THREADS=1 # two processes on two cores
"$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30 \
    -m "not gpu and not slurm and not real_engine"
# One at a time: their jobs have nodes of this machine to themselves.
"$bin/python" -m pytest -m slurm tests/slurm
# The same policy on the GPU stack's Megatron version, in at most 2.5 minutes. Where the versions
# differ: checkpoint files (of each layout; on a full disk; written in a thread by the units), experts
# and TransformerEngine's layers (on one and two ranks, all of untied models, so that the layouts need
# the tied one only), the optimizer on the CPU and fused Adam (units), schedules and gradient buffers
# (each layout). With it comes triton, whose kernels run in its interpreter (which has to be chosen
# before triton is imported).
TRITON_INTERPRET=1 tools/test_megatron_019.sh tests/distributed/test_layouts.py \
    tests/distributed/test_transformer_engine.py tests/distributed/test_full_disk.py \
    tests/distributed/test_stock_megatron.py \
    tests/unit/policy tests/unit/algorithms/test_logprobs_triton.py -k "not untied"
