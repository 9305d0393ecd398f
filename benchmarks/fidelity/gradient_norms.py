"""What the parts of the stage-3 loss pull with at its start: norms of their gradients, and the weights that even them.

    python benchmarks/fidelity/gradient_norms.py RECIPE STUDENT TEACHER [--set SECTION.KEY=VALUE] [--batches 20]

STUDENT is a checkpoint after stage 1 or 2, TEACHER a fine-tuned full-precision model. Every part's gradient is taken
over the same batches at weight 1, so a part's pull in training is its weight times its norm; ``balanced``
weights give each KD the norm of the cross-entropy. The cosines say whether two parts pull the same way.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistill.config import Recipe
from bitdistill.data.prompts import PaddedBatch
from bitdistill.data.tasks import load_task
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.objective import Distillation
from bitdistill.train.sft import task_sequences

PARTS = ("ce", "logits_kd", "relation_kd")


def gradients(recipe: Recipe, student: str, teacher: str, num_batches: int) -> dict[str, Tensor]:
    """Gradient of each part of the loss, all parameters in one fp32 vector, summed over the batches."""
    config = dataclasses.replace(recipe.distill, lambda_logits=1.0, gamma_relation=1.0)
    tokenizer = load_tokenizer(student)
    model = load_model(student).train()
    sequences = task_sequences(recipe, load_task(recipe.task), tokenizer)
    collate, size = PaddedBatch(tokenizer.pad_token_id), config.batch_size
    batches = [collate([sequences[i] for i in range(n * size, (n + 1) * size)]) for n in range(num_batches)]
    taught = load_model(teacher)
    found = {}
    # The loss is linear in its weights: each part is what switching it on adds to the cross-entropy's gradient.
    for part, off in (("ce", PARTS[1:]), ("logits_kd", PARTS[2:]), ("relation_kd", PARTS[1:2])):
        weights = {"logits_kd": "lambda_logits", "relation_kd": "gamma_relation"}
        own = config
        for name in off:
            own = own.without(weights[name])
        objective = Distillation(model, taught, own)
        model.zero_grad()
        for batch in batches:
            objective(totals=objective.counts(batch).clamp(min=1), **batch)["loss"].backward()
        total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[part] = total if part == "ce" else total - found["ce"]
    return found


def report(found: dict[str, Tensor]) -> dict[str, Any]:
    """Norms, pairwise cosines, and the weights that make the norm of each KD the cross-entropy's."""
    norms = {part: float(vector.norm()) for part, vector in found.items()}
    pairs = [(a, b) for i, a in enumerate(PARTS) for b in PARTS[i + 1 :]]
    return {
        "norms": norms,
        "cosines": {f"{a}, {b}": float(found[a] @ found[b]) / (norms[a] * norms[b]) for a, b in pairs},
        "balanced": {part: norms["ce"] / norms[part] for part in PARTS[1:]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--batches", type=int, default=20)
    arguments = parser.parse_args()
    chosen = load_recipe(arguments.recipe, arguments.settings)
    vectors = gradients(chosen, arguments.student, arguments.teacher, arguments.batches)
    print(json.dumps(report(vectors), indent=1))
