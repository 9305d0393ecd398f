#!/usr/bin/env bash
# stories260K through stages 1 and 2, with both starts of the norm gain, norms before all seven
# linears (all), and the full-precision control:
# held-out perplexity before, after refinement, after stage 2. Results: benchmarks/real_input/stories260k/*.json
set -euo pipefail
out=benchmarks/real_input/stories260k
recipe=recipes/stories260k.toml
run=runs/stories260k
mkdir -p "$out"
perplexity() { bitdistill eval "$recipe" "$1" --perplexity --json "$out/$2.json"; }

perplexity data/stories260K before
bitdistill refine "$recipe" --source data/stories260K --output "$run/refine-one"
bitdistill refine "$recipe" --source data/stories260K --output "$run/refine-rms" --set refine.gain=rms
bitdistill pretrain "$recipe" --source data/stories260K --output "$run/pretrain-fp16"
perplexity "$run/pretrain-fp16" after_pretrain_fp16
bitdistill refine "$recipe" --source data/stories260K --output "$run/refine-all" --set refine.norm_sites=all
for start in one rms all; do
  perplexity "$run/refine-$start" "after_refine_$start"
  bitdistill pretrain "$recipe" --source "$run/refine-$start" --output "$run/pretrain-$start"
  perplexity "$run/pretrain-$start" "after_pretrain_$start"
done
