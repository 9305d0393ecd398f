"""``gradient_checkpointing`` changes what is kept for the backward pass, and no result."""

import json

import pytest
import torch
from saved_tensors import saved_elements
from test_processes import distance, untimed
from tiny_families import families

from bitdistill.config import DistillConfig
from bitdistill.train.objective import Distillation


def batch(rows: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(2, 300, (rows, length))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def distillation(make_student, make_model, family: str, **config) -> Distillation:
    teacher = make_model(family, num_hidden_layers=4)
    return Distillation(make_student(family, num_hidden_layers=4), teacher, DistillConfig(**config)).train()


@families
@pytest.mark.parametrize("states", ["post_rope", "pre_rope"])
def test_loss_and_gradients_are_equal_bit_for_bit(make_student, make_model, family, states):
    """With the states of two layers tapped on the way."""
    found = []
    for recompute in (False, True):
        objective = distillation(
            make_student, make_model, family, relation_states=states, relation_layers=(1, -1)
        )
        if recompute:
            objective.recompute_layers()
        loss = objective(**batch(), totals=objective.counts(batch()))["loss"]
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in objective.named_parameters()}))
    (loss, gradients), (loss_again, gradients_again) = found
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_what_is_kept_no_longer_grows_with_all_that_the_layers_make(make_student, make_model):
    """Without it, each of four layers keeps its activations and its ternary weights."""
    kept = []
    for recompute in (False, True):
        objective = distillation(make_student, make_model, "qwen3", gamma_relation=0, lambda_logits=0)
        if recompute:
            objective.recompute_layers()
        inputs = batch(8, 32)
        totals = objective.counts(inputs)
        kept.append(saved_elements(lambda: objective(**inputs, totals=totals)["loss"])[0])  # noqa: B023
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("verb", ["pretrain", "distill"])
def test_a_training_step_ends_with_the_same_weights_bit_for_bit(
    cli, project, student, teacher, tmp_path, verb
):
    source = ["--source", student, *(["--teacher", teacher] if verb == "distill" else [])]
    for name in ("kept", "recomputed"):
        change = ("--set", f"{verb}.gradient_checkpointing={str(name == 'recomputed').lower()}")
        outcome = cli(verb, project, *source, "--output", tmp_path / name, *change)
        assert outcome.status == 0, outcome.err
    assert distance(tmp_path / "kept", tmp_path / "recomputed") == 0
    assert untimed(tmp_path / "kept") == untimed(tmp_path / "recomputed")
    kept, recomputed = (
        json.loads((tmp_path / n / "run.json").read_text())["settings"] for n in ("kept", "recomputed")
    )
    assert kept == recomputed  # so that a step that ran out of memory can go on with it
