#!/usr/bin/env bash
# The GPT-2 speedrun: a depth 24 model that reaches GPT-2's CORE of 0.2565, on eight H100s.
#
# Rent the machine, name your Endlex server (docs/cloud.md), and start this in tmux:
#
#   ENDLEX_URL=https://endlex.example.org ENDLEX_TOKEN=... bash runs/speedrun.sh
#
# The first lines say how long it takes and what it costs. Run it again after an interruption, and it
# resumes. ARCHERCHAT_DRY_RUN=1 rehearses it on two CPU ranks; runs/stages.sh lists the other settings.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

TAG=speedrun
MODEL=(--depth 24 --target-param-data-ratio 8)
REHEARSED="--gpu H100 --num-gpus 8"
DRY_RANKS=2

require_gpu
start_run speedrun
describe_plan <<<"$TAG ${MODEL[*]}"
is_dry || MODEL+=(--fp8) # kept only if the card is faster with it
get_data
train_tokenizer
pretrain "$TAG" "${MODEL[@]}"
evaluate_base "$TAG"
finetune "$TAG"
evaluate_chat "$TAG" sft
write_report "$TAG"
show_figures "$TAG" val_bpb=0.718 core=0.2626 minutes=99
finish "$TAG" "$TAG-sft"
