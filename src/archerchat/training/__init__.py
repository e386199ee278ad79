"""Training: read recipe, stage, run and loop, then a file per stage: pretrain, sft, rl."""
