# What the setup scripts share; they set name (for messages) and venv (a folder), and source this.
python="${SPEAR_PYTHON:-python3.11}"
command -v "$python" >/dev/null || python=python3
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
torch_index=()
[ -n "${SPEAR_CPU_INDEX:-}" ] && torch_index=(--index-url "$SPEAR_CPU_INDEX")

# The file that marks an environment as made from these files.
stamp_of() { echo "$venv/.spear-$(cat "$@" | sha256sum | cut -c1-16)"; }

need_python_311() {
    local version
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    [ "$version" = 3.11 ] && return
    echo "$name: found Python $version, the versions are pinned for 3.11." >&2
    echo "$name: install Python 3.11, or name it with SPEAR_PYTHON=/path/to/python3.11." >&2
    exit 2
}

# Of this torch, as the index has it: True or False, whether it would bring CUDA packages; its URL.
look_up_torch() {
    "${pip[@]}" install --quiet --dry-run --ignore-installed --no-deps --report - \
        "${torch_index[@]}" "$1" | "$venv/bin/python" -c '
import json, sys
found = json.load(sys.stdin)["install"][0]
requires = found["metadata"].get("requires_dist", [])
needs = any(r.startswith(("nvidia-", "cuda-")) and "extra ==" not in r for r in requires)
print(needs, found["download_info"]["url"])'
}

finish_env() { # STAMP
    rm -f "$venv"/.spear-*
    touch "$1"
    echo "$name: done ($venv)"
}

# --- For the engines' environments: exact pins without dependencies, one line a step.

step=0
# Says what is done; if it fails, shows the end of what it wrote and which step it was.
run_step() { # TITLE COMMAND...
    local title="$1" log status=0
    shift
    step=$((step + 1))
    echo "$name: $step. $title"
    log="$(mktemp)"
    "$@" >"$log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || tail -n 30 "$log" >&2
    rm -f "$log"
    [ "$status" -eq 0 ] && return
    echo "$name: step $step ($title) failed with status $status; its last lines are above." >&2
    echo "$name: once the cause is gone, run this again: what is installed already is quick." >&2
    exit 1
}

# Torch first, and without dependencies: the engines' own would bring gigabytes of CUDA packages.
install_pins() { # REQUIREMENTS
    local torch_spec found=""
    torch_spec="$(grep '^torch==' "$1")"
    [ -x "$venv/bin/python" ] || run_step "a virtual environment" "$python" -m venv "$venv"
    if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        found="$(look_up_torch "$torch_spec")"
    fi
    if [ "${found%% *}" = True ]; then
        echo "$name: this package index has $torch_spec for CUDA only. Name one for the CPU:" >&2
        echo "$name:   SPEAR_CPU_INDEX=https://download.pytorch.org/whl/cpu $0" >&2
        exit 2
    fi
    run_step "$torch_spec for the CPU (about 200 MB)" \
        "${pip[@]}" install --progress-bar off --no-deps "${torch_index[@]}" "$torch_spec"
    run_step "the other pinned packages (several minutes)" \
        "${pip[@]}" install --progress-bar off --no-deps --requirement "$1"
}
