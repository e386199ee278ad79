#!/usr/bin/env bash
# From nothing to a model that you trained and can talk to: ten minutes on two CPU cores, no GPU, no data.
#
# The text is what every Python installation carries: the standard library's sources and
# documentation; the conversations are generated. A slow machine trains fewer steps, so that the ten
# minutes hold. Results go under ARCHERCHAT_HOME (default ~/.cache/archerchat). Run it again after
# an interruption, and it resumes; what was done before is not repeated.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

TAG=quickstart
DATA=stdlib
TOKENIZER=quickstart
VOCAB_SIZE=4096
NUM_GPUS=1
FULL_ITERATIONS=750
TOKENS_PER_STEP=4096
PRETRAIN_SECONDS=280
EVAL_TOKENS=131072
MODEL=(--depth 4 --aspect-ratio 64 --head-dim 64 --max-seq-len 256 --device-batch-size 16
    --total-batch-size "$TOKENS_PER_STEP" --packing concat)

start_run quickstart
get_data
train_tokenizer

stage "Size: what this machine trains within the ten minutes"
SIZE="$BASE/cache/${TAG}_steps"
mkdir -p "$BASE/cache"
if [ ! -s "$SIZE" ] && [ -d "$BASE/checkpoints/base/$TAG" ]; then
    echo "$FULL_ITERATIONS" >"$SIZE" # by a version that did not measure
fi
size_run "$SIZE" "$FULL_ITERATIONS" "$TOKENS_PER_STEP" "$PRETRAIN_SECONDS" \
    archerchat pretrain --data "$DATA" --tokenizer "$TOKENIZER" --model-tag "$TAG" "${MODEL[@]}"
SHARE=$((100 * ITERATIONS / FULL_ITERATIONS)) # as many fewer conversations

EVERY=$((ITERATIONS / 3))
pretrain "$TAG" "${MODEL[@]}" --num-iterations "$ITERATIONS" \
    --eval-every "$EVERY" --eval-tokens "$EVAL_TOKENS" --save-every "$EVERY"
# Tasks that are generated here, in CORE's formats: they are not CORE.
evaluate_base "$TAG" --bundle offline --split-tokens "$EVAL_TOKENS"
finetune "$TAG" --eval-every 100 --eval-tokens 32768 \
    --mixture "identity*4,SimpleSpelling:$((40 * SHARE)),Arithmetic:$((120 * SHARE))"
evaluate_chat "$TAG" sft --tasks Arithmetic:100

stage "Chat: it answers"
archerchat chat --model-tag "$TAG" -p "What is 12 + 30?"
archerchat chat --model-tag "$TAG" -p "Who are you?"
write_report "$TAG"
finish "$TAG" "$TAG-sft"

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
