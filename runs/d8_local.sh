#!/usr/bin/env bash
# Depth 8 on one consumer card, every stage: five hours on an RTX 5060 Ti.
#
# It ends with the reference's figures beside yours; its 503M tokens, full attention and rows per
# micro-batch are the reference's. Run it again after an interruption, and it resumes.
# ARCHERCHAT_DRY_RUN=1 rehearses it; runs/stages.sh lists the other settings.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

TAG=d8_local
MODEL=(--depth 8 --window-pattern L)
REHEARSED="--gpu RTX_5060_Ti"

require_gpu
start_run d8_local
describe_plan <<<"$TAG ${MODEL[*]}"
get_data
train_tokenizer
pretrain "$TAG" "${MODEL[@]}" --device-batch-size 16
evaluate_base "$TAG"
finetune "$TAG"
evaluate_chat "$TAG" sft
reinforce "$TAG" --task GSM8K
evaluate_chat "$TAG" rl --tasks GSM8K
write_report "$TAG"
show_figures "$TAG" val_bpb=0.938 core=0.0976 sft_val_bpb=0.4185 chatcore=0.2173 ARC-Easy=0.3283 \
    ARC-Challenge=0.2884 MMLU=0.2985 tokens_per_second=106000 mfu=0.39 peak_gib=8.2 minutes=76.7 \
    sft_minutes=78.6
finish "$TAG" "$TAG-sft" "$TAG-rl"
