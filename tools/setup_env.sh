#!/usr/bin/env bash
# Makes .venv with the pinned CPU dependencies; quick when everything is there already.
#   SPEAR_CPU_INDEX=URL       package index that has CPU builds of torch (used for torch alone)
#   SPEAR_ALLOW_CUDA=1        go on although torch would bring gigabytes of CUDA packages
#   SPEAR_VENV=DIR            the environment's folder (default .venv)
#   SPEAR_UV=1                install with uv: a fifth of pip's time, but pip's settings are not read
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=setup
venv="${SPEAR_VENV:-.venv}"
source tools/cpu_venv.sh
constraints=tools/constraints-cpu.txt
torch_spec="$(grep -E '^torch==' "$constraints")"
stamp="$(stamp_of setup.py "$constraints")"
[ -f "$stamp" ] && exit 0
need_python_311
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

uv=""
if [ "${SPEAR_UV:-0}" = 1 ] && "${pip[@]}" install --quiet --constraint "$constraints" uv; then
    uv="$venv/bin/uv"
fi

# With uv, and with pip where uv is not wanted or fails. Of what pip says, one line for each download
# and for each installation.
pip_install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python "$venv/bin/python" --constraint "$constraints" "$@" &&
            return
        echo "setup: uv could not (see above); pip goes on"
        uv=""
    fi
    "${pip[@]}" install --progress-bar off --constraint "$constraints" "$@" | awk '
        /^ *Downloading / && !/\.metadata/ { sub(/^ */, ""); print "setup:   " $0; fflush() }
        /^Installing collected/ { print "setup:   Installing", NF - 3, "packages"; fflush() }'
}

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "setup: looking up $torch_spec"
    found="$(look_up_torch "$torch_spec")"
    needs_cuda="${found%% *}"
    if [ "$needs_cuda" = True ] && [ "${SPEAR_ALLOW_CUDA:-0}" != 1 ]; then
        cat >&2 <<'MESSAGE'
setup: this package index offers torch with CUDA: several gigabytes would be downloaded.
setup: for the small CPU build, name an index that has it:
         SPEAR_CPU_INDEX=https://download.pytorch.org/whl/cpu ./tools/quickstart.sh
setup: to take the CUDA build all the same:
         SPEAR_ALLOW_CUDA=1 ./tools/quickstart.sh
MESSAGE
        exit 2
    fi
    echo "setup: 1 of 4: $torch_spec (about 200 MB)"
    [ -z "$uv" ] || pip_install "${found#* }" # the wheel that pip has found
    [ -n "$uv" ] || pip_install "${torch_index[@]}" "$torch_spec"
fi
echo "setup: 2 of 4: setuptools"
pip_install setuptools
echo "setup: 3 of 4: the other dependencies and megatron_spear"
pip_install --no-build-isolation -e '.[dev]'
echo "setup: 4 of 4: trl, for the chat templates in it (its dependencies are left out)"
pip_install --no-deps "$(grep -E '^trl==' "$constraints")"
finish_env "$stamp"
