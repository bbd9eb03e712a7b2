# Sourced by tools/sglang_cpu/setup.sh and tools/vllm_cpu/setup.sh: one way to make an environment
# with exact pins on CPU torch. The caller sets $name, $venv and $python first.
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
step=0

# Says what is done now; when the command fails, shows what it wrote and which step it was.
run_step() {
    local title="$1" log status=0
    shift
    step=$((step + 1))
    echo "$name: $step. $title"
    log="$(mktemp)"
    "$@" >"$log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$log" >&2
        echo "$name: step $step ($title) failed with status $status; its last lines are above." >&2
        echo "$name: run this script again after the cause is gone; finished steps are quick." >&2
    fi
    rm -f "$log"
    return "$status"
}

need_python_311() {
    local version
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || true
    [ "$version" = 3.11 ] && return
    echo "$name: $python is Python ${version:-that does not start}; the pins are for 3.11." >&2
    echo "$name: install Python 3.11, or name it with SPEAR_PYTHON=/path/to/python3.11." >&2
    exit 2
}

# The stamp of the files given: an environment that has it needs no work.
stamp_of() { echo "$venv/.spear-$(cat "$@" | sha256sum | cut -c1-16)"; }

finish_env() {
    rm -f "$venv"/.spear-*
    touch "$1"
    echo "$name: done ($venv, $(du -sh "$venv" | cut -f1))"
}

# CPU torch comes first: the engines' own metadata would bring gigabytes of CUDA packages.
install_cpu_torch() {
    "$venv/bin/python" -c "import torch; assert torch.__version__.startswith('$1')" 2>/dev/null && return
    local index=()
    [ -n "${SPEAR_CPU_INDEX:-}" ] && index=(--index-url "$SPEAR_CPU_INDEX")
    "${pip[@]}" install --no-deps --progress-bar off "${index[@]}" "torch==$1"
    "$venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

needs = metadata.requires("torch") or []
if any(line.startswith(("nvidia-", "cuda-")) and "extra ==" not in line for line in needs):
    raise SystemExit(
        "this package index has torch with CUDA only; for the CPU build name an index that has it: "
        "SPEAR_CPU_INDEX=https://download.pytorch.org/whl/cpu"
    )
PYTHON
}

install_pins() { "${pip[@]}" install --no-deps --progress-bar off --requirement "$1"; }
