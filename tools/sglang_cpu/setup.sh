#!/usr/bin/env bash
# Makes an environment in which the real SGLang server starts on an AVX2 CPU, for tests of the wire:
# exact pins, no CUDA package, two import stubs (see stubs/). 2 to 6 minutes, 2.7 GB; quick when
# everything is there already.
#   tools/sglang_cpu/setup.sh [VENV]     the environment's folder (default .venv-sglang-cpu)
#   SPEAR_PYTHON=PYTHON                  Python 3.11
#   SPEAR_CPU_INDEX=URL                  package index that has CPU builds of torch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name=sglang
venv="${1:-$(dirname "$(dirname "$here")")/.venv-sglang-cpu}"
source "$here/../cpu_venv.sh"

requirements="$here/requirements.txt"
stamp="$(stamp_of "$here/setup.sh" "$requirements" "$here"/stubs/*.py)"
[ -f "$stamp" ] && exit 0
need_python_311

copy_stubs() {
    local site="$venv/lib/python3.11/site-packages"
    mkdir -p "$site/sgl_kernel" &&
        cp "$here/stubs/sgl_kernel.py" "$site/sgl_kernel/__init__.py" &&
        cp "$here/stubs/sitecustomize.py" "$site/sitecustomize.py"
}

install_pins "$requirements"
run_step "import stubs for torchvision and sgl_kernel" copy_stubs
run_step "a look whether SGLang imports" "$venv/bin/python" -c 'import sglang.launch_server'
finish_env "$stamp"
