#!/usr/bin/env bash
# Depth 12 on one consumer card, every stage: twelve and a half hours on an RTX 5060 Ti.
#
# It ends with the reference's figures beside yours; its 1.32B tokens, full attention, rows per
# micro-batch and limits of the evaluations are the reference's. Run it again after an interruption,
# and it resumes. ARCHERCHAT_DRY_RUN=1 rehearses it; runs/stages.sh lists the other settings.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

TAG=d12_local
MODEL=(--depth 12 --window-pattern L)
REHEARSED="--gpu RTX_5060_Ti"

require_gpu
start_run d12_local
describe_plan <<<"$TAG ${MODEL[*]}"
get_data
train_tokenizer
pretrain "$TAG" "${MODEL[@]}" --device-batch-size 8
evaluate_base "$TAG" --max-per-task 200
finetune "$TAG"
evaluate_chat "$TAG" sft --tasks ARC-Easy,ARC-Challenge,MMLU,GSM8K:200,HumanEval,SpellingBee:200
reinforce "$TAG" --task GSM8K
evaluate_chat "$TAG" rl --tasks GSM8K:200
write_report "$TAG"
show_figures "$TAG" val_bpb=0.842 core=0.1542 sft_val_bpb=0.356 chatcore=0.2578 ARC-Easy=0.3800 \
    ARC-Challenge=0.2900 MMLU=0.3250 GSM8K=0.05 HumanEval=0.0976 SpellingBee=0.995 \
    tokens_per_second=45000 mfu=0.42 peak_gib=9.4 minutes=481 sft_minutes=182
finish "$TAG" "$TAG-sft" "$TAG-rl"
