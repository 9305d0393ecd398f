#!/usr/bin/env bash
# A native BitNet b1.58 and its full-precision twin at three learning rates each,
# the report of the best two, and the native model in the engine. Needs data/ (benchmarks/real_input/prepare.py).
set -euo pipefail
recipe=recipes/native_1.5m.toml
run=runs/native_1.5m
out=benchmarks/native
for rate in 4e-3 8e-3 1.6e-2; do
  bitdistill base "$recipe" --output "$run/native-$rate" --set "base.learning_rate=$rate"
done
for rate in 2e-3 4e-3 8e-3; do
  bitdistill base "$recipe" --output "$run/dense-$rate" --set base.ternary=false --set "base.learning_rate=$rate"
done
bitdistill report "$run"

python "$out/gather.py" "$run" "$out" native-8e-3 dense-4e-3
for name in native-8e-3 dense-4e-3; do
  bitdistill eval "$recipe" "$run/$name" --perplexity --json "$out/records/$name/perplexity.json"
done

packed=$run/packed
bitdistill export "$run/native-8e-3" "$packed" --head f32 --json "$out/records/native-8e-3/packed.json"
bitdistill eval "$recipe" "$packed" --engine --kv-cache fp32 --perplexity \
  --json "$out/records/native-8e-3/engine_perplexity.json"
bitdistill generate "$packed" "Once upon a time there was a little" --max-new-tokens 40
python benchmarks/parity.py "$run/native-8e-3" benchmarks/parity/prompts_stories.txt --tokens 64 --threads 1 \
  --recipe "$recipe" --output "$out/records/native-8e-3/parity.json" > /dev/null
