# shellcheck shell=bash
# The stages of a run, from text to a report, for the scripts of this folder (bash 3.2 and later).
#
# Sourcing it defines functions and runs nothing. `start_run NAME` comes first; after it each function
# runs one stage of a model, or says that the stage was done before. A script that was stopped is run
# again: an interrupted stage resumes from its last checkpoint.
#
#   ARCHERCHAT_HOME         where everything goes (default ~/.cache/archerchat)
#   ARCHERCHAT_DRY_RUN=1    walk through the script at toy size on the CPU, without a network
#   NUM_GPUS                GPUs to use, one rank each (default: all of this machine)
#   DATA, TOKENIZER         names of the text and the tokenizer (default climbmix, default)
#   ENDLEX_URL              server that gets the runs; the script then ends with `endlex verify`

RUNS="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
. "$RUNS/environment.sh"
. "$RUNS/dashboard.sh"
. "$RUNS/sizing.sh"

TOY_MODEL="--depth 2 --aspect-ratio 32 --head-dim 32 --max-seq-len 128 --device-batch-size 2
    --total-batch-size 1024 --warmup-steps 2 --eval-every 4 --eval-tokens 2048 --sample-every none
    --packing concat --device cpu --no-compile"
TOY_HORIZON="--num-iterations 8"
TOY_SFT="--mixture identity,Arithmetic:40 --num-iterations 4 --eval-tokens 1024 --device cpu --no-compile"
TOY_CORE="--bundle offline --max-per-task 4 --split-tokens 4096 --device cpu"
TOY_CHAT="--tasks Arithmetic:4,SimpleSpelling:4 --max-new-tokens 8 --device cpu"
TOY_RL="--task Arithmetic --examples-per-step 2 --num-samples 2 --max-new-tokens 8 --num-iterations 2
    --eval-examples 4 --eval-samples 2 --device cpu --no-compile"

stage() { printf '\n== [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

# Anything but nothing and 0 asks for a dry run: a misspelt wish must not start an expensive run.
is_dry() { case "${ARCHERCHAT_DRY_RUN:-0}" in 0 | "") return 1 ;; esac; }

# Print the first argument in a dry run, where flags given last count; else nothing.
toy() { is_dry && printf '%s\n' "$1" || true; }

# Set where everything goes and on how many GPUs, and make the environment. DRY_RANKS is the number
# of ranks in a dry run.
start_run() { # NAME
    NAME="$1"
    BASE="${ARCHERCHAT_HOME:-$HOME/.cache/archerchat}"
    DATA="${DATA:-climbmix}" TOKENIZER="${TOKENIZER:-default}" VOCAB_SIZE="${VOCAB_SIZE:-32768}"
    TOKENIZER_FLAGS=""
    if is_dry; then
        BASE="$BASE/dry-run" DATA=stdlib TOKENIZER=toy VOCAB_SIZE=512 TOKENIZER_FLAGS="--max-chars 500000"
        NUM_GPUS="${DRY_RANKS:-1}"
        say "dry run of $NAME: toy models on the CPU, in $BASE"
    fi
    NUM_GPUS="${NUM_GPUS:-$(count_gpus)}"
    export ARCHERCHAT_HOME="$BASE"
    stage "Environment: Python, torch, ArcherChat"
    if [ -n "${ENDLEX_URL:-}" ]; then setup_environment; else setup_environment dashboard,serve; fi
}

count_gpus() {
    local count
    count="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')" || true
    [ "${count:-0}" -ge 1 ] || count=1
    printf '%s\n' "$count"
}

require_gpu() {
    is_dry || [ -n "${NUM_GPUS:-}" ] || has_nvidia_gpu ||
        die "$0 is for an NVIDIA GPU, and nvidia-smi finds none. On a CPU: bash runs/cpu.sh. To see" \
            "what it would take: ARCHERCHAT_DRY_RUN=1 bash $0. With another accelerator: NUM_GPUS=1"
}

# Run an archerchat command on all GPUs, one rank each.
launch() {
    if [ "$NUM_GPUS" -gt 1 ]; then
        python -m torch.distributed.run --standalone "--nproc-per-node=$NUM_GPUS" -m archerchat.cli "$@"
    else
        command archerchat "$@"
    fi
}

# Run a command unless it was done: this very command, its output is there, and no JSON file below
# INPUT (a checkpoint's, a tokenizer's, an evaluation's) is newer. ONLY is a pattern of such files.
once() { # NAME INPUT OUTPUT COMMAND...
    local stamp="$BASE/cache/stages/$1" input="$2" output="$3"
    shift 3
    if [ "$(cat "$stamp" 2>/dev/null)" = "$*" ] && [ -e "$output" ] &&
        [ -z "$(find "$input" -name '*.json' -path "${ONLY:-*}" -newer "$stamp" 2>/dev/null)" ]; then
        echo "done before; to repeat it, remove $stamp"
        return
    fi
    mkdir -p "$(dirname "$stamp")"
    "$@"
    printf '%s\n' "$*" >"$stamp"
}

plan_file() { printf '%s\n' "$BASE/cache/stages/$NAME/plan.json"; }

# Print what the models on standard input, each a line of its tag and its flags, take in all and from
# here on. A dry run plans the real run, on the cards of REHEARSED (flags of `archerchat plan`).
describe_plan() {
    stage "Plan: size, time and cost of the pretraining, before it starts"
    if is_dry; then
        # shellcheck disable=SC2086
        python "$RUNS/figures.py" plan "$(plan_file)" --rehearsal ${REHEARSED:-}
    else
        python "$RUNS/figures.py" plan "$(plan_file)" --num-gpus "$NUM_GPUS"
    fi
}

get_data() {
    local shards
    stage "Data: $DATA"
    case "$DATA" in
    stdlib) once data-stdlib - "$BASE/data/stdlib" archerchat data build stdlib ;;
    climbmix | fineweb-edu)
        shards="$(sed -n 's/.*"train_shards": \([0-9]*\).*/\1/p' "$(plan_file)" | sort -n | tail -n 1)"
        once "data-$DATA" - "$BASE/data/$DATA" \
            archerchat data download --source "$DATA" --num-shards "${shards:-8}"
        ;;
    *) [ -e "$BASE/data/$DATA" ] || die "DATA=$DATA is not on this machine: see archerchat data --help" ;;
    esac
}

train_tokenizer() {
    stage "Tokenizer: $VOCAB_SIZE tokens"
    # shellcheck disable=SC2086
    once "tokenizer-$TOKENIZER" - "$BASE/tokenizers/$TOKENIZER" archerchat tokenizer train \
        --data "$DATA" --vocab-size "$VOCAB_SIZE" --name "$TOKENIZER" $TOKENIZER_FLAGS
}

pretrain() { # TAG FLAGS...
    local tag="$1"
    shift
    stage "Pretraining: $tag"
    # shellcheck disable=SC2046
    once "$tag/pretrain" "$BASE/tokenizers/$TOKENIZER" "$BASE/checkpoints/base/$tag" launch pretrain \
        --data "$DATA" --tokenizer "$TOKENIZER" --model-tag "$tag" --tags "$NAME" "$@" \
        $(toy "$TOY_MODEL $TOY_HORIZON")
}

evaluate_base() { # TAG FLAGS...
    local tag="$1"
    shift
    stage "Evaluation of $tag: CORE, bits per byte, samples"
    # shellcheck disable=SC2046
    once "$tag/core" "$BASE/checkpoints/base/$tag" "$BASE/evals/base/$tag" launch eval base \
        --model-tag "$tag" --eval core,bpb,sample "$@" $(toy "$TOY_CORE")
}

finetune() { # TAG FLAGS...
    local tag="$1"
    shift
    stage "Fine-tuning: $tag learns to answer"
    # shellcheck disable=SC2046
    once "$tag/sft" "$BASE/checkpoints/base/$tag" "$BASE/checkpoints/sft/$tag" launch sft \
        --model-tag "$tag" --tags "$NAME" "$@" $(toy "$TOY_SFT")
}

reinforce() { # TAG FLAGS...
    local tag="$1"
    shift
    stage "Reinforcement: $tag practises what can be judged"
    # shellcheck disable=SC2046
    once "$tag/rl" "$BASE/checkpoints/sft/$tag" "$BASE/checkpoints/rl/$tag" launch rl \
        --model-tag "$tag" --tags "$NAME" "$@" $(toy "$TOY_RL")
}

evaluate_chat() { # TAG STAGE FLAGS...
    local tag="$1" source="$2"
    shift 2
    stage "Evaluation of $tag's answers, after $source"
    # shellcheck disable=SC2046
    once "$tag/chat-$source" "$BASE/checkpoints/$source/$tag" "$BASE/evals/$source/$tag" launch eval chat \
        --model-tag "$tag" --source "$source" "$@" $(toy "$TOY_CHAT")
}

write_report() { # TAG
    stage "Report: what ran, what came of it, what it took"
    ONLY="*/$1/*" once "$1/report" "$BASE/evals" "$BASE/reports/$1" archerchat report "$1"
}

fit_scaling_law() { # RUN...
    stage "Scaling law: bits per byte against parameters and tokens"
    ONLY="*/${1%%-*}-*" once "$NAME/scaling" "$BASE/checkpoints/base" "$BASE/reports/$NAME" \
        archerchat report scaling "$@" --out "$BASE/reports/$NAME"
}

# Print a model's figures beside those of another run, given as name=value.
show_figures() { # TAG NAME=VALUE...
    stage "Figures"
    python "$RUNS/figures.py" compare "$BASE" "$@"
}

# Check that the server has all of the runs, so that the machine may go; without a server, show them.
finish() { # RUN...
    local run directories=()
    for run in "$@"; do
        directories+=("$BASE/runs/$run")
    done
    if [ -n "${ENDLEX_URL:-}" ]; then
        stage "Endlex: is everything on $ENDLEX_URL?"
        endlex sync "${directories[@]}"
        endlex verify "${directories[@]}"
    elif [ "$#" -gt 3 ]; then
        stage "Done: the runs are in $BASE/runs; endlex sync sends them to a server that ENDLEX_URL names"
    else
        stage "Dashboard: the runs' curves, samples and settings"
        for run in "$@"; do
            describe_dashboard "$BASE/runs/$run" "$BASE/endlex" "$BASE/runs/$run/dashboard.html"
        done
    fi
}
