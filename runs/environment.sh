# shellcheck shell=bash
# The project's own Python environment, for the scripts of this folder (bash 3.2 and later).
#
# Sourcing it defines functions and runs nothing. `setup_environment [EXTRA]` makes a virtual
# environment in the checkout, installs torch and the project into it (with its EXTRA, such as
# `dev`) and puts it first on PATH. A stamp written last makes the next call take milliseconds;
# a set-up that was cut short has no stamp, and running again completes it.
#
#   PYTHON           interpreter to build the environment with (3.11 or later)
#   ARCHERCHAT_VENV  where the environment goes, instead of .venv in the checkout

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="${ARCHERCHAT_VENV:-$ROOT/.venv}"
TORCH="torch>=2.11" # as in pyproject.toml; tests/test_scripts.py compares the two

say() { printf '== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

setup_environment() {
    local extra="${1:-}"
    check_interpreter
    if ! is_stamped "$extra"; then
        say "setting up $VENV (once; minutes, most of it torch's download)"
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
        has_torch || install_torch
        # The server's half comes from this checkout too, for whoever asks for an extra.
        install_packages -e "$ROOT/endlex" ${extra:+-e "$ROOT/endlex/server"} -e "$ROOT${extra:+[$extra]}"
        "$VENV/bin/python" -c 'import archerchat, endlex, torch' ||
            die "the packages in $VENV do not import; remove that folder and run again"
        warn_of_unused_gpu
        write_stamp "" # any extra includes the plain set-up
        write_stamp "$extra"
    fi
    export PATH="$VENV/bin:$PATH"
}

# Refuse an environment that cannot serve: removing it is left to its owner.
check_interpreter() {
    if [ -e "$VENV/bin/python" ] || [ -L "$VENV/bin/python" ]; then
        is_recent "$VENV/bin/python" ||
            die "$VENV/bin/python does not run or is older than Python 3.11; remove $VENV and run again"
        if [ -n "${PYTHON:-}" ] && [ "$(version_of "$PYTHON")" != "$(version_of "$VENV/bin/python")" ]; then
            die "PYTHON=$PYTHON is not the version that $VENV was made with; remove that folder," \
                "or set ARCHERCHAT_VENV to another one"
        fi
    fi
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# What the installed packages depend on: the checkout, its requirements, the interpreter.
fingerprint() {
    printf '%s\n' "$ROOT"
    cat "$ROOT/pyproject.toml" "$ROOT/endlex/pyproject.toml" "$ROOT/endlex/server/pyproject.toml" | cksum
    version_of "$VENV/bin/python"
}

stamp_path() { printf '%s\n' "$VENV/.archerchat-stamp${1:+-$1}"; }

is_stamped() { [ "$(cat "$(stamp_path "$1")" 2>/dev/null)" = "$(fingerprint)" ]; }

write_stamp() {
    fingerprint >"$(stamp_path "$1").new"
    mv "$(stamp_path "$1").new" "$(stamp_path "$1")"
}

# The interpreter that the user calls python3 comes first: an active pyenv or conda is a choice.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than Python 3.11"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if is_recent "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python bash $0"
}

make_venv() {
    local python
    python="$(find_python)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$VENV"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian's Python has no ensurepip without its package python3-venv, but a pip that is
        # there can put pip into another environment.
        "$python" -m venv --without-pip "$VENV"
        "$python" -m pip --python "$VENV/bin/python" install -q pip
    else
        die "$python has neither ensurepip nor pip; install them" \
            "(Debian, Ubuntu: apt install python3-venv) and run again"
    fi
}

install_packages() { "$VENV/bin/python" -m pip install -q "$@"; }

# pip writes RECORD last, so a torch without one was cut short. Any other torch within the range
# stays, however it came here: that is how to choose a build oneself.
has_torch() {
    "$VENV/bin/python" -c '
import re, sys
from importlib.metadata import distribution
torch = distribution("torch")
complete = torch.read_text("RECORD") is not None
sys.exit(not complete or tuple(map(int, re.findall(r"\d+", torch.version)[:2])) < (2, 11))
' 2>/dev/null
}

# On Linux the registry has only the CUDA build, gigabytes of it. That is right where there is a
# GPU; elsewhere the build for CPUs comes from a file that pip was told of (a wheel house in
# find-links) or from PyTorch's own index, which uv knows by name. Asking pip what the registry's
# build would bring is no way to choose: even `--dry-run` downloads the 0.5 GB wheel to read it.
# On macOS the registry's build is the right one. What torch needs, the project's install adds.
install_torch() {
    local local_build
    if has_nvidia_gpu || [ "$(uname -s)" != Linux ]; then
        install_packages --force-reinstall --no-deps "$TORCH"
        return
    fi
    local_build="$(find_local_cpu_torch)"
    if [ -n "$local_build" ]; then
        install_packages --force-reinstall --no-deps "$local_build"
    else
        install_packages "uv>=0.7.14" # the first with a settled --torch-backend
        "$VENV/bin/python" -m uv pip install -q --python "$VENV/bin/python" \
            --reinstall --no-deps --torch-backend=cpu "$TORCH" ||
            die "no CPU build of torch could be installed; install any build ($TORCH) with" \
                "$VENV/bin/python -m pip install, then run again: it is kept"
    fi
}

has_nvidia_gpu() {
    case "$(nvidia-smi -L 2>/dev/null || true)" in
    *GPU*) return 0 ;;
    *) return 1 ;;
    esac
}

# Print the requirement of the build without CUDA that lies in pip's wheel house, or nothing.
find_local_cpu_torch() {
    local report
    report="$("$VENV/bin/python" -m pip install -q --no-index --no-deps --ignore-installed \
        --dry-run --report - "$TORCH" 2>/dev/null)" || return 0
    printf '%s' "$report" | "$VENV/bin/python" -c '
import json, re, sys
torch = json.load(sys.stdin)["install"][0]["metadata"]
if not any(re.match("nvidia|cuda|triton", name) for name in torch.get("requires_dist", [])):
    print("torch==" + torch["version"])
'
}

warn_of_unused_gpu() {
    if has_nvidia_gpu &&
        ! "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        printf 'warning: %s\n' "torch cannot use this machine's GPU: its driver is older than the CUDA that torch
was built with, or the build is for CPUs. Update the driver, or let uv choose a build for it:
$VENV/bin/python -m pip install uv &&
$VENV/bin/python -m uv pip install --python $VENV/bin/python --reinstall --torch-backend=auto '$TORCH'" >&2
    fi
}
