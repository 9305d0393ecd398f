#!/usr/bin/env bash
# Where a student starts (stories260K, calibrated gains): output error and held-out perplexity after stage 1 of absmean,
# GPTQ and AWQ, with scales per tensor and per channel; perplexity after a short stage 2, also with learned scales.
# Results: benchmarks/real_input/initialisation/*.json
set -euo pipefail
out=benchmarks/real_input/initialisation
recipe=recipes/stories260k.toml
run=runs/initialisation
mkdir -p "$out"

start() {  # name, then settings of stage 1
  local name=$1 && shift
  bitdistill refine "$recipe" --source data/stories260K --output "$run/refine-$name" --set refine.gain=rms "${@/#/--set=refine.}"
  bitdistill eval "$recipe" "$run/refine-$name" --perplexity --json "$out/refine_$name.json"
  cp "$run/refine-$name/run.json" "$out/refine_${name}_run.json"
}
train() {
  bitdistill pretrain "$recipe" --source "$run/refine-$1" --output "$run/pretrain-$1" --set pretrain.tokens=400_000
  bitdistill eval "$recipe" "$run/pretrain-$1" --perplexity --json "$out/pretrain_$1.json"
}

for method in absmean gptq awq; do
  start "$method" initialisation="$method"
  start "channel-$method" initialisation="$method" granularity=channel
done
start learned scale=learned
start gptq-learned initialisation=gptq scale=learned
for name in absmean gptq awq learned gptq-learned; do
  train "$name"
done
