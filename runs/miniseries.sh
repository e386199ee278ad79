#!/usr/bin/env bash
# One recipe at eight sizes: depths 12 to 26 at one ratio of tokens to parameters, with CORE for each.
#
#   RATIO     training tokens per scaling parameter (default 12)
#   DEPTHS    depths to train (default all of them)
#
# A recipe is better when it is better at every depth. Run it again after an interruption, and it
# resumes. ARCHERCHAT_DRY_RUN=1 rehearses it; runs/stages.sh lists the other settings.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

DEPTHS="${DEPTHS:-12 14 16 18 20 22 24 26}"
RATIO="${RATIO:-12}"
REHEARSED="--gpu H100 --num-gpus 8"

require_gpu
start_run miniseries
for depth in $DEPTHS; do
    echo "miniseries-d$depth --depth $depth --target-param-data-ratio $RATIO"
done | describe_plan
get_data
train_tokenizer
runs=()
for depth in $(is_dry && echo 12 18 24 || echo "$DEPTHS"); do
    tag="miniseries-d$depth"
    # A toy model has a sixth of the depth.
    TOY_HORIZON="--depth $((depth / 6)) --num-iterations 8"
    pretrain "$tag" --depth "$depth" --target-param-data-ratio "$RATIO"
    evaluate_base "$tag"
    runs+=("$tag")
done
fit_scaling_law "${runs[@]}"
finish "${runs[@]}"
