#!/usr/bin/env bash
# The engine beside torch on students of the three stages: the demo's (make demo-seeds), stories260K's and SST-2's
# (benchmarks/real_input). Results: benchmarks/parity/*.json
set -euo pipefail
out=benchmarks/parity
parity() { # name, student, prompts, more
  local name=$1 student=$2 prompts=$3; shift 3
  python benchmarks/parity.py "$student" "$out/prompts_$prompts.txt" --threads 1 --output "$out/$name.json" "$@" > /dev/null
}

demo=(--recipe src/bitdistill/recipes/demo.toml --set name=demo-seed0)
parity demo_refined runs/demo-seed0/refine-subln grammar
parity demo_pretrained runs/demo-seed0/pretrain-subln grammar "${demo[@]}"
parity demo_distilled runs/demo-seed0/bitdistill/lr-0.001 grammar "${demo[@]}" --task
parity stories260k_gain_one runs/stories260k/pretrain-one stories --recipe recipes/stories260k.toml
parity stories260k_gain_rms runs/stories260k/pretrain-rms stories --recipe recipes/stories260k.toml
parity sst2_distilled runs/sst2-seed0/bitdistill/lr-0.0005 reviews --recipe recipes/sst2_qwen3_5m.toml \
  --set name=sst2-seed0 --task
