"""The closed form of the operation count is what torch's own counter finds in the traced step."""

import pytest
import torch
from tiny_families import families
from torch.autograd.graph import get_gradient_edge
from torch.utils.flop_counter import FlopCounterMode

from bitdistill.config import DistillConfig
from bitdistill.model import TernarySpec
from bitdistill.plan.models import Blueprint, config_text, geometry, make
from bitdistill.plan.operations import distillation_flops, measured_throughput, student_flops
from bitdistill.plan.tracing import META, MetaStep
from bitdistill.train.objective import Distillation, LanguageModelling

BATCH, LENGTH = 3, 40


def counted(objective: LanguageModelling, selected: int) -> int:
    """Operations of a forward and a backward pass, as torch counts its products."""
    counter = FlopCounterMode(display=False)
    with torch.device(META), MetaStep(selected), counter:
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": ids}
        with torch.autocast(
            "cpu", torch.bfloat16
        ):  # in fp32 the head's dW is an addmm_, which the counter passes over
            losses = objective(torch.ones(3), **batch)
        torch.autograd.backward(get_gradient_edge(losses["loss"]), torch.ones(()))
    return counter.get_total_flops()


def eager(blueprint: Blueprint):
    """With attention as plain products, which the counter knows."""
    model = make(blueprint)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("spec", [None, TernarySpec()], ids=["full precision", "ternary"])
@families
def test_a_training_step_counts_as_the_formula_says(make_model, family, spec):
    blueprint = Blueprint(config_text(make_model(family).config), spec)
    labelled = 5
    expected = BATCH * student_flops(geometry(blueprint), LENGTH, labelled)
    # Rotary tables are products too, of one number each.
    found = counted(LanguageModelling(eager(blueprint).train()), BATCH * labelled)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found >= expected


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma_relation": 0.0},
        {"lambda_logits": 0.0},
        {"relation_layers": (0, -1)},
        {"kd_tokens": "all", "relation_heads": 2},
    ],
    ids=str,
)
def test_the_teacher_and_the_losses_of_stage_3_count_as_the_formula_says(make_model, changes):
    # Relations before RoPE, where there are any: to tap others the models would change their attention function.
    states = {} if "gamma_relation" in changes else {"relation_states": "pre_rope"}
    config = DistillConfig(**states | changes)
    teacher = Blueprint(config_text(make_model("qwen3", num_hidden_layers=3).config))
    student = Blueprint(config_text(make_model("qwen3").config), TernarySpec())
    everything = config.kd_tokens == "all"
    labelled = LENGTH if everything else 5
    objective = Distillation(eager(student).train(), eager(teacher), config)
    shapes = geometry(student), geometry(teacher)
    expected = student_flops(shapes[0], LENGTH, labelled) + distillation_flops(
        *shapes, config, LENGTH, labelled
    )
    assert counted(objective, BATCH * labelled) == pytest.approx(BATCH * expected, rel=2e-3)


def test_tokens_without_a_label_take_part_in_the_logits_kd_of_all_tokens(make_model):
    shapes = geometry(Blueprint(config_text(make_model("qwen3").config)))
    response, everything = (
        distillation_flops(shapes, shapes, DistillConfig(kd_tokens=tokens), LENGTH, 5)
        for tokens in ("response", "all")
    )
    # The teacher's head forward, the student's forward and backward, for 35 tokens more.
    assert everything - response == 35 * (2 + 6) * shapes.head


def test_geometry_counts_the_decoders_linears_and_the_head_apart(make_model):
    model = make_model("qwen3")
    shapes = geometry(Blueprint(config_text(model.config)))
    weights = {n: p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight")}
    assert shapes.linear == sum(weights.values())
    assert shapes.attention == 2 * 4 * 8
    assert shapes.head == 300 * 32
    assert shapes.states == (4 * 8 + 2 * 2 * 8,) * 2


def test_the_probe_finds_a_speed():
    assert 1e7 < measured_throughput("fp32", seconds=0.02) < 1e16
