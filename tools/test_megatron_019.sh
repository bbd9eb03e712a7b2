#!/usr/bin/env bash
# The policy's tests with megatron-core 0.19.2, the GPU stack's version: laid over .venv in a folder
# of its own (it declares Python 3.12 and imports triton, but runs on 3.11). Arguments go to pytest.
#   MEGATRON_SPEAR_SKIP_019=1   do not run them
#   --install                   make the folder only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${MEGATRON_SPEAR_SKIP_019:-0}" = 1 ]; then
    echo "skipped: the tests with megatron-core 0.19.2 (MEGATRON_SPEAR_SKIP_019=1)" >&2
    exit 0
fi
tools/setup_env.sh
venv="${SPEAR_VENV:-.venv}"
overlay="$venv/megatron-0.19.2"
if [ ! -f "$overlay/.complete" ]; then
    echo "setup: installing megatron-core 0.19.2 and triton into $overlay (about 1 GB)"
    rm -rf "$overlay"
    if ! "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps \
        --no-compile --ignore-requires-python --target "$overlay" megatron-core==0.19.2 triton==3.9.0; then
        echo "error: megatron-core 0.19.2 and triton could not be installed (see above)," >&2
        echo "error: so nothing was tested with them; to go without: MEGATRON_SPEAR_SKIP_019=1" >&2
        exit 1
    fi
    touch "$overlay/.complete"
fi
[ "${1:-}" != --install ] || exit 0
export PYTHONPATH="$overlay" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
version="$("$venv/bin/python" -c 'import megatron.core as m; print(m.__version__)' 2>/dev/null)"
[ "${version%%+*}" = 0.19.2 ] || { echo "found megatron-core $version, expected 0.19.2" >&2; exit 1; }
echo "megatron-core $version"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder \
    tests/unit/policy tests/distributed -m "not gpu and not slow"
exec "$venv/bin/python" -m pytest "$@"
