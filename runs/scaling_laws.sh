#!/usr/bin/env bash
# Scaling laws: four budgets of FLOPs, each spent on depths 10 to 20, and a law fitted to the outcome.
#
#   BUDGETS   FLOPs of one run (default 1e18 2.15e18 4.64e18 1e19)
#   DEPTHS    depths to train with each budget (default 10 12 14 16 18 20)
#
# The depth with the least bits per byte at each budget tells how many tokens a parameter deserves.
# Run it again after an interruption, and it resumes. ARCHERCHAT_DRY_RUN=1 rehearses it;
# runs/stages.sh lists the other settings.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/stages.sh"

BUDGETS="${BUDGETS:-1e18 2.15e18 4.64e18 1e19}"
DEPTHS="${DEPTHS:-10 12 14 16 18 20}"
REHEARSED="--gpu H100 --num-gpus 8"

require_gpu
start_run scaling_laws
for budget in $BUDGETS; do
    for depth in $DEPTHS; do
        echo "scaling-$budget-d$depth --depth $depth --target-flops $budget"
    done
done | describe_plan
get_data
train_tokenizer
if is_dry; then BUDGETS="1e18 1e19" DEPTHS="10 20"; fi
runs=()
for budget in $BUDGETS; do
    for depth in $DEPTHS; do
        # A toy model has a tenth of the depth and a billionth of the budget.
        TOY_HORIZON="--depth $((depth / 10)) --target-flops ${budget%e*}e$((${budget#*e} - 9))"
        pretrain "scaling-$budget-d$depth" --depth "$depth" --target-flops "$budget" --keep-last 1
        runs+=("scaling-$budget-d$depth")
    done
done
fit_scaling_law "${runs[@]}"
finish "${runs[@]}"
