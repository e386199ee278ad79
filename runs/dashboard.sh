# shellcheck shell=bash
# A dashboard of a run on this machine, for the scripts of this folder (bash 3.2 and later).
#
# Sourcing it defines functions and runs nothing. `describe_dashboard RUN DATA PAGE` says where the
# run can be looked at. Where ENDLEX_URL names a server, that is there: training has sent it. Else
# the run goes into DATA, the data directory of a server that lives for these seconds, and as one
# file that opens with no server into PAGE; what is there already stays.

describe_dashboard() {
    local run="$1" data="$2" page="$3"
    if [ -n "${ENDLEX_URL:-}" ]; then
        echo "The run is on $ENDLEX_URL"
    elif is_shown "$run" "$data" "$page" || make_dashboard "$run" "$data" "$page"; then
        echo "Open it in a browser, no server needed: $page"
        echo "Or serve it, with later runs beside it: $VENV/bin/endlex serve --data '$data'"
        echo "  on http://127.0.0.1:8817; ENDLEX_URL=http://127.0.0.1:8817 sends a training run there"
    else
        echo "warning: no dashboard could be made; the run itself is complete: $run" >&2
    fi
}

# Whether the page and the server's data are as new as the run's journals.
is_shown() {
    [ -d "$2" ] && [ -f "$3" ] && [ -z "$(find "$1/journal" -name '*.jsonl' -newer "$3")" ]
}

# In a process of its own, so that the server ends with it whatever happens.
make_dashboard() (
    run="$1" data="$2" page="$3"
    unset ENDLEX_TOKEN
    folder="$(mktemp -d)"
    endlex serve --port 0 --data "$data" >"$folder/log" 2>&1 &
    server=$!
    trap 'kill "$server" 2>/dev/null || true; wait "$server" || true; rm -rf "$folder"' EXIT
    url="$(wait_for_address "$folder/log" "$server")" &&
        id="$(sed -n 's/.*"run": *"\([0-9a-z]*\)".*/\1/p' "$run/run.json")" &&
        endlex sync --url "$url" "$run" >"$folder/said" 2>&1 &&
        endlex export --url "$url" --format html -o "$page" "$id" >>"$folder/said" 2>&1 ||
        { cat "$folder"/* >&2 && exit 1; }
)

# Print the address that a server's log names, or fail when the server ends or takes half a minute.
wait_for_address() {
    local url="" tries
    for tries in $(seq 300); do
        url="$(sed -n 's|.* on \(http://127.0.0.1:[0-9]*\)$|\1|p' "$1")"
        [ -z "$url" ] || break
        kill -0 "$2" 2>/dev/null || return 1
        sleep 0.1
    done
    printf '%s\n' "$url"
    [ -n "$url" ]
}
