#!/usr/bin/env bash
# Makes .venv with the pinned CPU dependencies; quick when everything is there already.
#   SPEAR_CPU_INDEX=URL       package index that has CPU builds of torch (used for torch alone)
#   SPEAR_ALLOW_CUDA=1        go on although torch would bring gigabytes of CUDA packages
#   SPEAR_VENV=DIR            the environment's folder (default .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${SPEAR_VENV:-.venv}"
python="${SPEAR_PYTHON:-python3.11}"
command -v "$python" >/dev/null || python=python3
constraints=tools/constraints-cpu.txt
torch_spec="$(grep -E '^torch==' "$constraints")"
stamp="$venv/.spear-$(cat setup.py "$constraints" | sha256sum | cut -c1-16)"
[ -f "$stamp" ] && exit 0

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
if [ "$version" != 3.11 ]; then
    echo "setup: found Python $version, the CPU default is pinned for 3.11." >&2
    echo "setup: install Python 3.11, or name it with SPEAR_PYTHON=/path/to/python3.11." >&2
    exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# One line for each download and for each installation; the rest of what pip says is left out.
pip_install() {
    "${pip[@]}" install --progress-bar off --constraint "$constraints" "$@" | awk '
        /^ *Downloading / && !/\.metadata/ { sub(/^ */, ""); print "setup:   " $0; fflush() }
        /^Installing collected/ { print "setup:   Installing", NF - 3, "packages"; fflush() }'
}

torch_index=()
[ -n "${SPEAR_CPU_INDEX:-}" ] && torch_index=(--index-url "$SPEAR_CPU_INDEX")

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "setup: looking up $torch_spec"
    needs_cuda="$("${pip[@]}" install --quiet --dry-run --ignore-installed --no-deps --report - \
        "${torch_index[@]}" "$torch_spec" | "$venv/bin/python" -c '
import json, sys
requires = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
print(any(r.startswith(("nvidia-", "cuda-")) and "extra ==" not in r for r in requires))')"
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
    echo "setup: 1 of 3: $torch_spec (about 200 MB)"
    pip_install "${torch_index[@]}" "$torch_spec"
fi
echo "setup: 2 of 3: setuptools"
pip_install setuptools
echo "setup: 3 of 3: the other dependencies and megatron_spear"
pip_install --no-build-isolation -e '.[dev]'
rm -f "$venv"/.spear-*
touch "$stamp"
echo "setup: done ($venv)"
