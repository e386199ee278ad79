#!/usr/bin/env bash
# Depth 6 on a laptop's CPU: web text, a chat model and its report, sized to 30 minutes, without a GPU.
#
# It measures the machine first and trains as many steps as the half hour holds. The text is two shards
# of ClimbMix from the network, or with DATA=stdlib what every Python installation carries. Run it again
# after an interruption, and it resumes. ARCHERCHAT_DRY_RUN=1 rehearses it; runs/stages.sh lists the
# other settings. runs/quickstart.sh is smaller still: ten minutes, no network.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

TAG=cpu
FULL_ITERATIONS=4000
TOKENS_PER_STEP=8192
PRETRAIN_SECONDS=1100
EVAL_TOKENS=131072
TOKENIZER="${TOKENIZER:-cpu}"
VOCAB_SIZE="${VOCAB_SIZE:-8192}"
NUM_GPUS=1 # one process, which uses all cores
MODEL=(--depth 6 --head-dim 64 --window-pattern L --max-seq-len 512
    --total-batch-size "$TOKENS_PER_STEP")

start_run cpu
describe_plan <<<"$TAG ${MODEL[*]} --num-iterations $FULL_ITERATIONS --vocab-size $VOCAB_SIZE --eval-tokens $EVAL_TOKENS"
echo "It trains fewer steps than these where $((PRETRAIN_SECONDS / 60)) minutes do not hold them; it measures that below."
get_data
train_tokenizer
stage "Size: what this machine trains in $((PRETRAIN_SECONDS / 60)) minutes"
size_run "$BASE/cache/${TAG}_steps" "$FULL_ITERATIONS" "$TOKENS_PER_STEP" "$PRETRAIN_SECONDS" \
    archerchat pretrain --device cpu --data "$DATA" --tokenizer "$TOKENIZER" \
    --device-batch-size 16 "${MODEL[@]}"
pretrain "$TAG" --device cpu --device-batch-size 16 "${MODEL[@]}" --num-iterations "$ITERATIONS" \
    --eval-every 250 --eval-tokens "$EVAL_TOKENS"
evaluate_base "$TAG" --device cpu --bundle offline --split-tokens "$EVAL_TOKENS"
finetune "$TAG" --device cpu --mixture "identity*4,SimpleSpelling:4000,Arithmetic:12000" \
    --eval-every 200 --eval-tokens 65536
evaluate_chat "$TAG" sft --device cpu --tasks Arithmetic:100,SimpleSpelling:100
stage "Chat: it answers"
archerchat chat --model-tag "$TAG" -p "What is 12 + 30?"
write_report "$TAG"
finish "$TAG" "$TAG-sft"
