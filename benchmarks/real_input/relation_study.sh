#!/usr/bin/env bash
# What gamma and the form of the relation loss do on SST-2: stage 3 of the seed-0 run again, one setting
# changed at a time, learning rate 5e-4, compared on held-out training data. Needs runs/sst2-seed0 (README.md).
# Results: benchmarks/real_input/relation/*.json
set -euo pipefail
out=benchmarks/real_input/relation
recipe=recipes/sst2_qwen3_5m.toml
run=${RUN:-runs/sst2-seed0}
mkdir -p "$out"
teacher=$run/fp16_sft/lr-0.0005

stage3() { # name, source, overrides
  local name=$1 source=$2; shift 2
  bitdistill distill "$recipe" --set name="$(basename "$run")" --source "$source" --teacher "$teacher" \
    --output "$run/study/$name" --set distill.learning_rate=5e-4 "$@"
  bitdistill eval "$recipe" --set name="$(basename "$run")" --split validation "$run/study/$name" --json "$out/$name.json"
}

stage3 gamma_0 "$run/pretrain-subln" --set distill.gamma_relation=0
stage3 gamma_1 "$run/pretrain-subln"
stage3 gamma_10 "$run/pretrain-subln" --set distill.gamma_relation=10
stage3 cosine "$run/pretrain-subln" --set distill.relation_form=cosine
