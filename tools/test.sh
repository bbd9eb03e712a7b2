#!/usr/bin/env bash
# Everything CI checks: lint, format, types, import contract, tests. Further arguments go to pytest.
# Made for two cores: what waits (installing, Slurm) goes on beside what computes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start; what one has compiled serves all
SPEAR_UV="${SPEAR_UV:-1}" tools/setup_env.sh
bin="${SPEAR_VENV:-.venv}/bin"
export WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
logs="$(mktemp -d)"
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT

check_code() {
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/mypy"
    "$bin/lint-imports"
}
if [ $# -gt 0 ]; then
    check_code
    "$bin/python" -m pytest "$@"
    exit
fi

# A real Slurm and bubblewrap, of a few megabytes, and Chromium, of 360, for their tests; they are
# skipped where these cannot be installed.
try_install() { # WHAT PACKAGE..
    local what="$1" packages=("${@:2}")
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
    echo "test: installing ${packages[*]}"
    timeout 60 apt-get -qq update >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive timeout 180 \
        apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
        echo "test: $what could not be installed; its tests are skipped"
}
# Questions for the tests of its adapter; they are skipped where its pycosat cannot be compiled.
install_reasoning_gym() {
    local find='import importlib.util, sys; sys.exit(importlib.util.find_spec("reasoning_gym") is None)'
    if "$bin/python" -c "$find"; then return; fi
    echo "test: installing reasoning-gym"
    timeout 300 "$bin/python" -m pip --disable-pip-version-check install -q \
        --constraint tools/constraints-cpu.txt reasoning-gym >/dev/null 2>&1 ||
        echo "test: reasoning-gym could not be installed; its tests are skipped"
}
install_what_tests_need() {
    if ! [ -x /usr/sbin/slurmctld ] || ! [ -x /usr/sbin/slurmd ] || ! [ -x /usr/sbin/munged ]; then
        try_install Slurm slurmctld slurmd slurm-client munge
    fi
    if ! command -v bwrap >/dev/null; then
        try_install bubblewrap bubblewrap
    fi
    if ! command -v chromium >/dev/null; then
        try_install Chromium chromium
    fi
    install_reasoning_gym
    tools/test_megatron_019.sh --install
}
install_what_tests_need >"$logs/install" 2>&1 &
installing=$!
check_code
wait "$installing" || { cat "$logs/install" && exit 1; }
cat "$logs/install"

export OMP_NUM_THREADS=1
# Two processes on two cores: three take a quarter less, as many tests wait, and show more races. A
# file's tests run in one process, as they share results of ranks and whole runs; in this order, in
# which the long files come first.
failed=0
"$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30 \
    -m "not gpu and not slurm and not real_engine" || failed=1
# The same policy on the GPU stack's Megatron version. Where the versions differ: checkpoint files (of
# each layout; on a full disk; written in a thread by the units), experts and TransformerEngine's layers
# (on one and two ranks, all of untied models, so that the layouts need the tied one only), the
# optimizer on the CPU and fused Adam (units), schedules and gradient buffers (each layout). With it
# comes triton, whose kernels run in its interpreter (which has to be chosen before triton is imported).
TRITON_INTERPRET=1 tools/test_megatron_019.sh -p no:cacheprovider -k "not untied" \
    tests/distributed/test_layouts.py tests/distributed/test_transformer_engine.py \
    tests/distributed/test_full_disk.py tests/distributed/test_stock_megatron.py \
    tests/unit/policy tests/unit/algorithms/test_logprobs_triton.py >"$logs/megatron" 2>&1 &
beside=$!
# Beside it jobs on a real Slurm, one at a time, which wait more than they compute, and want a core.
"$bin/python" -m pytest -p no:cacheprovider -m slurm tests/slurm || failed=1
wait "$beside" || failed=1
cat "$logs/megatron"
exit "$failed"
