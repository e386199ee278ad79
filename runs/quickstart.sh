#!/usr/bin/env bash
# From nothing to a model that you trained and can talk to: ten minutes on two CPU cores, no GPU, no data.
#
# The text is what every Python installation carries: the standard library's sources and
# documentation; the conversations are generated. A slow machine trains fewer steps, so that the ten
# minutes hold. Everything goes under ARCHERCHAT_HOME (default ~/.cache/archerchat). Run it again
# and what is there stays; stop it, and the next run goes on where this one was.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
. "$(dirname -- "${BASH_SOURCE[0]}")/dashboard.sh"
. "$(dirname -- "${BASH_SOURCE[0]}")/sizing.sh"

TAG=quickstart
VOCAB_SIZE=4096
DEPTH=4
ASPECT_RATIO=64
HEAD_DIM=64
SEQUENCE_LENGTH=256
DEVICE_BATCH_SIZE=16
TOTAL_BATCH_SIZE=4096
FULL_ITERATIONS=750
PRETRAIN_SECONDS=280
EVAL_TOKENS=131072
BASE="${ARCHERCHAT_HOME:-$HOME/.cache/archerchat}"

stage() { printf '\n== [%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

stage "Environment: Python, torch, ArcherChat"
setup_environment dashboard

stage "Data: the standard library's text, as shards"
archerchat data build stdlib

stage "Tokenizer: $VOCAB_SIZE tokens, learned from that text"
archerchat tokenizer train --data stdlib --vocab-size "$VOCAB_SIZE" --name "$TAG"

pretrain() { # ITERATIONS EVAL_EVERY EVAL_TOKENS
    local iterations="$1" eval_every="$2" eval_tokens="$3"
    archerchat pretrain --data stdlib --tokenizer "$TAG" --model-tag "$TAG" --packing concat \
        --depth "$DEPTH" --aspect-ratio "$ASPECT_RATIO" --head-dim "$HEAD_DIM" \
        --max-seq-len "$SEQUENCE_LENGTH" --device-batch-size "$DEVICE_BATCH_SIZE" \
        --total-batch-size "$TOTAL_BATCH_SIZE" --num-iterations "$iterations" \
        --eval-every "$eval_every" --eval-tokens "$eval_tokens" --save-every "$eval_every"
}

stage "Size: what this machine trains within the ten minutes"
SIZE="$BASE/cache/${TAG}_steps" # kept, so that another call goes on with the same run
if [ ! -s "$SIZE" ] && [ -d "$BASE/checkpoints/base/$TAG" ]; then
    mkdir -p "$BASE/cache" && echo "$FULL_ITERATIONS" >"$SIZE" # by a version that did not measure
elif [ ! -s "$SIZE" ]; then
    SPEED="$(measure_speed pretrain 12 12 "$((DEVICE_BATCH_SIZE * SEQUENCE_LENGTH))")"
    echo "measured: it trains $SPEED tokens per second"
    fit_steps "$FULL_ITERATIONS" "$TOTAL_BATCH_SIZE" "$PRETRAIN_SECONDS" "$SPEED" >"$SIZE"
fi
ITERATIONS="$(cat "$SIZE")"
if [ "$ITERATIONS" -lt "$FULL_ITERATIONS" ]; then
    echo "$ITERATIONS steps instead of $FULL_ITERATIONS, and as many fewer conversations: the full run would"
    echo "take longer here. The model will know less; remove $SIZE and the model for another size"
else
    echo "all $FULL_ITERATIONS steps fit"
fi
SHARE=$((100 * ITERATIONS / FULL_ITERATIONS))
CONVERSATIONS="identity*4,SimpleSpelling:$((40 * SHARE)),Arithmetic:$((120 * SHARE))"

stage "Pretraining: depth $DEPTH, $ITERATIONS steps of $TOTAL_BATCH_SIZE tokens"
pretrain "$ITERATIONS" "$((ITERATIONS / 3))" "$EVAL_TOKENS"

stage "Evaluation: bits per byte on what it was trained on and on what it never saw"
archerchat eval base --model-tag "$TAG" --eval bpb --split-tokens "$EVAL_TOKENS"

stage "Samples: what it says"
archerchat sample --model-tag "$TAG"

stage "Evaluation: tasks generated here, in CORE's formats (they are not CORE)"
archerchat eval base --model-tag "$TAG" --eval core --bundle offline

stage "Fine-tuning: generated conversations, one pass"
archerchat sft --model-tag "$TAG" --mixture "$CONVERSATIONS" --eval-every 100 --eval-tokens 32768

stage "Evaluation: arithmetic with the calculator, problems that it never saw"
archerchat eval chat --model-tag "$TAG" --source sft --tasks Arithmetic:100

stage "Chat: it answers"
archerchat chat --model-tag "$TAG" -p "What is 12 + 30?"
archerchat chat --model-tag "$TAG" -p "Who are you?"

stage "Report: what ran, what came of it, what it took"
archerchat report "$TAG"

stage "Dashboard: the runs' curves, samples and settings"
describe_dashboard "$BASE/runs/$TAG" "$BASE/endlex" "$BASE/checkpoints/base/$TAG/dashboard.html"
describe_dashboard "$BASE/runs/$TAG-sft" "$BASE/endlex" "$BASE/checkpoints/sft/$TAG/dashboard.html"

stage "Done"
cat <<END
You have a tokenizer, a base model, a model that answers, their report and dashboard. What to do next,
in this shell or any other:
    export PATH="$VENV/bin:\$PATH"
    archerchat chat --model-tag $TAG         # talk to it; it knows sums, spelling and its name
    archerchat serve                         # or talk to it in a browser
    archerchat sample --model-tag $TAG       # what the base model says; --help tells how to prompt it
    archerchat rl --model-tag $TAG --task Arithmetic    # go on by reinforcement
    archerchat plan --depth 8                # what a larger model would take, and cost
docs/ARCHITECTURE.md shows how the parts fit together.
END
