#!/usr/bin/env bash
# Every run of docs/fidelity.md, resumable: a run that has its record here is not made again. Start it once more on
# another core (or machine that shares the folders) and the two share the runs. Needs data/ (benchmarks/real_input).
#
#   bash benchmarks/fidelity/study.sh [SECTION ...]
#
# Sections: main stages presets spread relation logits sites activations schedules quantisers ideas teacher candidates
# pairs.
set -euo pipefail
cd "$(dirname "$0")/../.."
records=benchmarks/fidelity
small=benchmarks/bases/qwen3_1.5m
large=benchmarks/bases/qwen3_5m

study() { # RECIPE NAME TITLE OPTIONS...
  local recipe=$1 name=$2 title=$3
  shift 3
  bitdistill sweep "recipes/fidelity/$recipe.toml" --name "$name" --title "$title" --records "$records" "$@"
}

# A screen: SST-2, the task with most room above its commonest class, on the smaller base: one seed, one epoch, a third of
# stage 2, one learning rate, judged on the held-out part of the training data. The first point is the reference.
screen() { # NAME TITLE OPTIONS...
  screen_of sst2 "$@"
}

screen_of() { # TASK NAME TITLE OPTIONS...
  study "$1" "$2" "$3" --set run.judged_on=validation --set run.learning_rates=[] \
    --set sft.learning_rate=6e-4 --set distill.learning_rate=6e-4 --set sft.epochs=1 --set distill.epochs=1 \
    --set pretrain.tokens=1_000_000 --set 'run.methods=["bitdistill"]' "${@:4}"
}

main() { # the larger base wants lower rates: six of its eight first rows chose the lower edge of the recipe's grid
  local seeds
  for task in mnli qnli sst2; do
    study "$task" main "The four methods" --seeds 3 --tune-once --set model.source="$small"
    seeds=3
    if [ "$task" = qnli ]; then seeds=5; fi # why: LOG.md, 30 November
    study "$task" main "The four methods" --seeds "$seeds" --tune-once --set model.source="$large" \
      --set run.learning_rates=[6e-5,2e-4,6e-4,2e-3]
  done
}

stages() {
  screen stages "Stages and losses: what each adds (the paper's tables 5 and 6)" --seeds 3 --set \
    'run.methods=["bitnet_sft", "bitdistill:no_pretrain+no_distill", "bitdistill:no_distill", "bitdistill:no_pretrain", "bitdistill:no_relation_kd", "bitdistill:no_logits_kd", "bitdistill"]'
}

presets() {
  screen presets "The paper's losses and those of its authors' code" \
    --point "" \
    --point "distill.preset=paper" \
    --point "distill.preset=authors"
}

spread() { # all other rows share one stage 2
  screen spread "Other stages 2: what their order of the text changes" --grid pretrain.seed=0,1,2
}

relation() { # at 13 its gradient has the norm of the cross-entropy's (gradient_norms.json)
  screen relation "The relation loss: form, weight, states, mask, heads, layer" \
    --point "" \
    --point "distill.gamma_relation=10" \
    --point "distill.gamma_relation=100" \
    --point "distill.gamma_relation=100000" \
    --point "distill.relation_form=cosine" \
    --point "distill.relation_form=cosine distill.gamma_relation=3125 distill.relation_heads=32" \
    --point "distill.relation_states=pre_rope" \
    --point "distill.relation_mask=causal" \
    --point "distill.relation_mask=none" \
    --point "distill.relation_heads=8" \
    --point "distill.relation_heads=32" \
    --point "distill.relation_layers=[0]" \
    --point "distill.relation_layers=[1]" \
    --point "distill.relation_layers=[2]" \
    --point "distill.relation_layers=[0,1,2,3]"
}

logits() { # at 125 its gradient has the norm of the cross-entropy's (gradient_norms.json)
  screen logits "The logits KD: weight, temperature, tau squared, tokens, teacher" \
    --point "" \
    --point "distill.temperature=1" \
    --point "distill.temperature=2" \
    --point "distill.lambda_logits=10" \
    --point "distill.lambda_logits=10 distill.temperature=1" \
    --point "distill.lambda_logits=125" \
    --point "distill.tau_squared=true" \
    --point "distill.kd_tokens=all" \
    --point "distill.kd_tokens=all distill.temperature=1" \
    --point "distill.teacher_method=fp16_ct_sft"
}

sites() { # each has a stage 2 of its own
  screen sites "Norm sites, gains, and quantisation phased in" \
    --point "" \
    --point "refine.norm_sites=none" \
    --point "refine.norm_sites=all" \
    --point "refine.gain=rms" \
    --point "refine.norm_sites=all refine.gain=rms" \
    --point "pretrain.quant_warmup_ratio=0.3" \
    --point "pretrain.quant_warmup_ratio=0.8"
}

activations() { # BitNet v2 in a task's student; each has a stage 2 of its own
  screen activations "4-bit activations and the Hadamard transform, in stages 1 to 3" \
    --point "" \
    --point "refine.hadamard=outputs" \
    --point "refine.hadamard=outputs pretrain.int4_activations_ratio=0.05" \
    --point "pretrain.int4_activations_ratio=0.05"
}

schedules() {
  screen schedules "Learning rates and weight decay of stages 2 and 3" \
    --point "" \
    --point "pretrain.learning_rate=3e-3" \
    --point "pretrain.schedule=two_stage pretrain.weight_decay=0.1 pretrain.weight_decay_schedule=half_then_zero" \
    --point "pretrain.learning_rate=3e-3 pretrain.schedule=two_stage pretrain.weight_decay=0.1 pretrain.weight_decay_schedule=half_then_zero" \
    --point "distill.schedule=linear" \
    --point "distill.weight_decay=0.1" \
    --point "distill.weight_decay=0" \
    --point "distill.learning_rate=2e-3" \
    --point "distill.learning_rate=2e-4"
}

quantisers() { # the paper's table 4, by the published algorithms; each has a stage 2 of its own
  screen quantisers "Weight quantisers: initialisation, granularity and scale rule" \
    --point "" \
    --point "refine.granularity=channel" \
    --point "refine.granularity=block refine.block_size=64" \
    --point "refine.scale=learned" \
    --point "refine.scale=learned refine.granularity=channel" \
    --point "refine.initialisation=gptq" \
    --point "refine.initialisation=gptq refine.scale=learned" \
    --point "refine.initialisation=awq" \
    --point "refine.initialisation=awq refine.scale=learned"
}

ideas() { # beyond the papers; those that change stage 2 have one of their own
  screen ideas "Ideas beyond the papers, at equal steps" \
    --point "" \
    --point "pretrain.lambda_logits=1" \
    --point "pretrain.lambda_logits=1 pretrain.temperature=2" \
    --point "pretrain.quant_warmup_ratio=0.5 pretrain.quant_warmup_form=soft" \
    --point "refine.dead_zone_bias=1e-3" \
    --point "pretrain.ema_decay=0.99" \
    --point "distill.ema_decay=0.99" \
    --point "pretrain.freeze_codes_ratio=0.3" \
    --point "distill.freeze_codes_ratio=0.3" \
    --point "distill.freeze_codes_ratio=0.3 distill.freeze_codes_lr=0.1" \
    --point "distill.quant_warmup_ratio=0.3"
}

teacher() { # one that is better because it is larger (at its rate of the main table), one because it was trained for longer
  taught larger "A larger teacher" "$large" 2e-4
  taught longer "A teacher of two epochs" "$small" 6e-4
}

taught() { # NAME TITLE BASE RATE
  study sst2 "$1-teacher" "$2" --set model.source="$3" --set run.judged_on=validation --set run.learning_rates=[] \
    --set sft.learning_rate="$4" --set 'run.methods=["fp16_sft"]'
  local teacher="runs/fidelity/$1-teacher/sst2_$(basename "$3")_as-it-is_s0/fp16_sft"
  screen "taught-by-$1" "$2, and its students" --seeds 3 \
    --point "" \
    --point "distill.relation_heads=8" \
    --point "distill.relation_heads=8 distill.teacher=$teacher" \
    --point "distill.relation_heads=8 distill.temperature=1 distill.teacher=$teacher"
}

candidates() { # what looked best at one seed
  screen candidates "What the screens found best, with three seeds" --seeds 3 \
    --point "" \
    --point "distill.relation_mask=causal" \
    --point "refine.granularity=channel" \
    --point "distill.relation_mask=causal refine.granularity=channel"
}

pairs() { # where BitDistill is above full precision in the main table
  screen_of mnli pairs "Stages and losses on pairs of sentences" --seeds 3 --set \
    'run.methods=["bitnet_sft", "bitdistill:no_distill", "bitdistill:no_pretrain", "bitdistill"]'
}

for section in "${@:-main}"; do
  "$section"
done
