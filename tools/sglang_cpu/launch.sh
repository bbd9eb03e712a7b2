#!/usr/bin/env bash
# Starts the real SGLang server on the CPU, in the environment that setup.sh made.
#   tools/sglang_cpu/launch.sh VENV MODEL_FOLDER PORT [further arguments of sglang.launch_server]
# It answers GET /model_info once it is ready, after 60 to 130 s. Tensor parallelism needs the cores of
# each rank: SGLANG_CPU_OMP_THREADS_BIND="0|1" with --tp-size 2.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="$1" model="$2" port="$3"
shift 3
# The project's root, for weight receivers of ours named by --custom-weight-loader.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Plain torch backends, because the compiled operators are a stub; few tokens of cache, because
# SGLang would take a share of all memory.
exec "$venv/bin/python" -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$port" \
    --device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch \
    --grammar-backend none --disable-overlap-schedule --skip-server-warmup \
    --mem-fraction-static 0.1 --max-total-tokens 8192 "$@"
