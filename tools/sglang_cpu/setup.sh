#!/usr/bin/env bash
# Makes an environment in which the real SGLang 0.5.23 server starts on an AVX2 CPU, for tests of the
# wire: exact pins, no CUDA package, two import stubs (see stubs/). About 6 minutes and 3.4 GB; quick
# when everything is there already.
#   tools/sglang_cpu/setup.sh [VENV]     the environment's folder (default .venv-sglang-cpu)
#   SPEAR_PYTHON=PYTHON                  Python 3.11 (default python3.11)
#   SPEAR_CPU_INDEX=URL                  package index that has CPU builds of torch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name=sglang
venv="${1:-$here/../../.venv-sglang-cpu}"
python="${SPEAR_PYTHON:-python3.11}"
source "$here/../engine_env.sh"

stamp="$(stamp_of "$here/setup.sh" "$here/requirements.txt" "$here"/stubs/*.py)"
if [ -f "$stamp" ]; then
    echo "$name: nothing to do ($venv)"
    exit 0
fi
need_python_311

copy_stubs() {
    local site
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp "$here/stubs/sitecustomize.py" "$site/sitecustomize.py"
    mkdir -p "$site/sgl_kernel"
    cp "$here/stubs/sgl_kernel.py" "$site/sgl_kernel/__init__.py"
}

check_import() { "$venv/bin/python" -c 'import sglang.launch_server'; }

[ -x "$venv/bin/python" ] || run_step "a virtual environment" "$python" -m venv "$venv"
run_step "torch 2.13.0 for the CPU (200 MB)" install_cpu_torch 2.13.0
run_step "the pinned packages, SGLang among them (several minutes)" install_pins "$here/requirements.txt"
run_step "import stubs for torchvision and sgl_kernel" copy_stubs
run_step "SGLang's server imports" check_import
finish_env "$stamp"
