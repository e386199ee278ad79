#!/usr/bin/env bash
# Set up the project's environment, then run every gate: format, lint, types, tests.
#
#   bash runs/test.sh                 the fast tests
#   bash runs/test.sh --all           the slow ones too, and those for a GPU or a browser that is here
#   bash runs/test.sh -m network      tests that need the Hugging Face hub run only when asked for
#   bash runs/test.sh -k tokenizer    other arguments go to pytest
#
# A gate that fails does not keep the next ones from running; the exit code tells.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

failed=""

gate() {
    local name="$1"
    shift
    say "$name: $*"
    python -m "$@" || failed="$failed $name"
}

# The markers that can run on this machine, as a pytest expression; what is left out is said.
runnable_markers() {
    local markers="not network"
    has_nvidia_gpu || leave_out gpu "no NVIDIA GPU here"
    command -v chromium >/dev/null || command -v google-chrome >/dev/null ||
        leave_out browser "no chromium or google-chrome on PATH"
    printf '%s\n' "$markers"
}

leave_out() {
    markers="$markers and not $1"
    say "left out: tests marked $1 ($2)" >&2
}

if [ "${1:-}" = --all ]; then
    shift
    set -- -m "$(runnable_markers)" "$@"
fi
setup_environment dev
cd "$ROOT"
# The tests' models are tiny: a second thread helps none, and waits many times over on a busy machine.
# Run one process more than there are cores, since many tests wait for other programs. Each takes over
# what another has not begun.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # pytest keeps the tests that it has compiled: 6 s per process
gate format ruff format --check
gate lint ruff check
gate types mypy
workers="$(python -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')"
gate tests pytest -n "$workers" --dist worksteal "$@"
[ -z "$failed" ] || die "failed:$failed"
