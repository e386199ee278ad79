# shellcheck shell=bash
# How much training fits a machine, for the scripts of this folder (bash 3.2 and later).
#
# Sourcing it defines functions and runs nothing.

# Print the tokens per second of a training command. It runs in a home of its own, with the data and
# tokenizers of the home BASE, and nothing of it stays but the compiled code.
measure_speed() (
    home="$(mktemp -d)"
    trap 'rm -rf "$home"' EXIT
    mkdir -p "$BASE/cache"
    ln -s "$BASE/data" "$BASE/tokenizers" "$BASE/cache" "$home"
    unset ENDLEX_URL
    export ARCHERCHAT_HOME="$home" XDG_STATE_HOME="$home"
    "$@" >"$home/log" 2>&1 || { cat "$home/log" >&2 && exit 1; }
    sed -n 's/.*"tokens_per_second": *\([0-9]*\).*/\1/p' "$home"/runs/*/summary.json
)

# Print how many steps of TOKENS fit into SECONDS at SPEED tokens per second: a multiple of 30, at
# least 120 and at most FULL.
fit_steps() {
    local full="$1" tokens="$2" seconds="$3" speed="$4" steps
    steps=$((seconds * speed / tokens / 30 * 30))
    [ "$steps" -ge 120 ] || steps=120
    [ "$steps" -le "$full" ] || steps="$full"
    printf '%s\n' "$steps"
}

# Set ITERATIONS to the steps of TOKENS that a training command, measured with 12 of them, does in
# SECONDS: at most FULL. FILE keeps the number, so that another call resumes the same run.
size_run() { # FILE FULL TOKENS SECONDS COMMAND...
    local file="$1" full="$2" tokens="$3" seconds="$4" speed
    shift 4
    if is_dry; then
        ITERATIONS=8
        return
    fi
    if [ ! -s "$file" ]; then
        speed="$(measure_speed "$@" --num-iterations 12 --eval-every 12 --eval-tokens "$tokens")"
        echo "measured: it trains $speed tokens per second"
        fit_steps "$full" "$tokens" "$seconds" "$speed" >"$file"
    fi
    ITERATIONS="$(cat "$file")"
    if [ "$ITERATIONS" -lt "$full" ]; then
        echo "training $ITERATIONS of $full steps, to stay within the time; the model will know less. To measure"
        echo "again, remove $file and the model"
    else
        echo "all $full steps fit"
    fi
}
