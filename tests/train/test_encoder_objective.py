"""Objectives of an encoder: Hugging Face's own losses, and the parts of the distillation computed apart in float64."""

import itertools

import pytest
import torch
from tiny_encoders import small_encoder, some_batch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.config import DistillConfig
from bitdistill.errors import TrainingError
from bitdistill.model import TernarySpec
from bitdistill.train.encoder_objective import ClassDistillation, Classification, MaskedLanguageModelling
from bitdistill.train.surgery import refine
from bitdistill.train.taps import attention_layers, capture

CLASSIFIER = "BertForSequenceClassification"


def ternary(model: PreTrainedModel) -> PreTrainedModel:
    return refine(model, TernarySpec())[0]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def masked_batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 80, (3, 12))
    labels = torch.where(torch.rand(3, 12) < 0.4, ids, -100)
    return {"input_ids": torch.where(labels == -100, ids, 4), "labels": labels}


@pytest.mark.parametrize("kind", ["dense", "ternary"])
@pytest.mark.parametrize("task", ["masked", "classes"])
def test_cross_entropy_is_that_of_hugging_face(task, kind):
    model = small_encoder("BertForMaskedLM" if task == "masked" else CLASSIFIER)
    model = model if kind == "dense" else ternary(model)
    batch = masked_batch() if task == "masked" else some_batch()
    expected = model(**batch).loss
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    objective = MaskedLanguageModelling(model) if task == "masked" else Classification(model)
    totals = objective.counts(batch)
    assert totals.tolist() == [int((batch["labels"] != -100).sum())]
    result = objective(**batch, totals=totals)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["loss/ce"], expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(model), reference, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_masked_token_costs_nothing():
    batch = masked_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    objective = MaskedLanguageModelling(small_encoder("BertForMaskedLM"))
    result = objective(**batch, totals=objective.counts(batch).clamp(min=1))
    result["loss"].backward()
    assert result["loss"] == 0


def test_masked_language_modelling_of_a_classifier_is_refused():
    with pytest.raises(TrainingError, match="BertForSequenceClassification has no masked-LM head"):
        MaskedLanguageModelling(small_encoder(CLASSIFIER))


# --- taps ---


def self_attention_states(model: PreTrainedModel, layer: int, batch: dict[str, Tensor]) -> list[Tensor]:
    """Q, K, V of one layer, ``[B, heads, T, E]``, by calling the projections on what the layer is given."""
    seen: list[Tensor] = []
    attention = model.bert.encoder.layer[layer].attention.self
    handle = attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(**inputs(batch))
        handle.remove()
        return [
            linear(seen[0]).unflatten(-1, (4, 8)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        ]


@pytest.mark.parametrize("kind", ["dense", "ternary"])
@pytest.mark.parametrize("layer", [0, 1])
def test_taps_are_the_outputs_of_the_projections_and_change_no_logit(kind, layer):
    model = small_encoder(CLASSIFIER)
    model = model if kind == "dense" else ternary(model)
    batch = some_batch()
    assert [m.layer_idx for m in attention_layers(model)] == [0, 1]
    plain = model(**inputs(batch)).logits
    expected = self_attention_states(model, layer, batch)
    with capture(model, (layer,), "post_rope") as states:
        logits = model(**inputs(batch)).logits
    assert list(states) == [layer]
    torch.testing.assert_close(list(states[layer]), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)


# --- distillation ---


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A ternary student and a teacher of other weights and of another depth."""
    teacher = small_encoder(CLASSIFIER, num_hidden_layers=3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.2)
    return ternary(small_encoder(CLASSIFIER)), teacher


def relation_reference(
    student: list[Tensor], teacher: list[Tensor], batch: dict[str, Tensor], form: str
) -> float:
    """Eq. 10-12 (or Algorithm 1) row by row in float64, over real tokens alone: sum over rows, mean over heads."""
    total = 0.0
    for state_s, state_t in zip(student, teacher, strict=True):
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            for head in range(4):
                logs = []
                for state in (state_s, state_t):
                    x = state[row, head, :length].double()
                    x = x / x.norm(dim=-1, keepdim=True) if form == "cosine" else x / 8**0.25
                    logs.append(torch.log_softmax(x @ x.T, dim=-1))
                total += float((logs[1].exp() * (logs[1] - logs[0])).sum()) / 4
    return total


@pytest.mark.parametrize("form", ["scaled_dot", "cosine"])
@pytest.mark.parametrize("tau_squared", [False, True])
def test_the_loss_is_the_sum_of_its_parts(form, tau_squared):
    student, teacher = pair()
    batch = some_batch()
    config = DistillConfig(
        lambda_logits=10.0, gamma_relation=50.0, temperature=3.0, tau_squared=tau_squared, relation_form=form
    )
    objective = ClassDistillation(student, teacher, config)
    totals = objective.counts(batch)
    assert totals.tolist() == [4, 11 + 7 + 4 + 9]
    result = objective(**batch, totals=totals)

    with torch.no_grad():
        logits_s, logits_t = (model(**inputs(batch)).logits.double() for model in (student, teacher))
    ce = float(-torch.log_softmax(logits_s, -1)[torch.arange(4), batch["labels"]].mean())
    log_s, log_t = (torch.log_softmax(logits / 3.0, -1) for logits in (logits_s, logits_t))
    kd = float((log_t.exp() * (log_t - log_s)).sum()) / 4 * (9 if tau_squared else 1)
    states = [self_attention_states(student, 1, batch), self_attention_states(teacher, 2, batch)]
    relation = relation_reference(*states, batch, form) / 31
    expected = {
        "loss/ce": ce,
        "loss/logits_kd": kd,
        "loss/logits_kd_weighted": 10 * kd,
        "loss/relation_kd": relation,
        "loss/relation_kd_weighted": 50 * relation,
        "loss": ce + 10 * kd + 50 * relation,
    }
    assert {key: float(value.detach()) for key, value in result.items()} == pytest.approx(expected, rel=1e-4)
    assert min(ce, kd, relation) > 1e-3


def test_a_step_does_not_depend_on_how_its_batch_is_split():
    """Into two micro-batches, each with no more padding than it needs."""
    student, teacher = pair()
    objective = ClassDistillation(student, teacher, DistillConfig(lambda_logits=10.0, gamma_relation=50.0))
    batch = some_batch()
    totals = objective.counts(batch)
    whole = objective(**batch, totals=totals)["loss"]
    whole.backward()
    expected = gradients(student)
    student.zero_grad()
    loss = torch.zeros(())
    for rows, length in ((slice(0, 1), 11), (slice(1, 4), 9)):
        part = {k: v[rows] if v.dim() == 1 else v[rows, :length] for k, v in batch.items()}
        loss = loss + objective(**part, totals=totals)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(student), expected, rtol=1e-3, atol=1e-5)


def test_padding_changes_nothing_unless_the_relations_let_it_in():
    student, teacher = pair()
    batch = some_batch()
    wider = {k: v if v.dim() == 1 else torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    found = {}
    for mask, data in itertools.product(("padding", "none"), (batch, wider)):
        objective = ClassDistillation(student, teacher, DistillConfig(relation_mask=mask))
        parts = objective(**data, totals=objective.counts(data))
        found[mask, data is wider] = [float(parts[f"loss/{p}"]) for p in ("ce", "logits_kd", "relation_kd")]
    assert found["padding", True] == pytest.approx(found["padding", False], rel=1e-4)
    assert found["none", True][2] != pytest.approx(found["none", False][2], rel=1e-2)


@pytest.mark.parametrize("weight", ["lambda_logits", "gamma_relation"])
def test_a_loss_that_is_switched_off_is_not_there(weight):
    student, teacher = pair()
    batch = some_batch()
    objective = ClassDistillation(student, teacher, DistillConfig().without(weight))
    parts = objective(**batch, totals=objective.counts(batch))
    left = {"lambda_logits": "relation_kd", "gamma_relation": "logits_kd"}[weight]
    assert set(parts) == {"loss", "loss/ce", f"loss/{left}", f"loss/{left}_weighted"}
    total = float(parts["loss/ce"] + parts[f"loss/{left}_weighted"])
    assert float(parts["loss"].detach()) == pytest.approx(total, rel=1e-6)


def test_the_teacher_learns_nothing_and_everything_of_the_student_does():
    student, teacher = pair()
    objective = ClassDistillation(student, teacher, DistillConfig())
    batch = some_batch()
    objective(**batch, totals=objective.counts(batch))["loss"].backward()
    assert gradients(teacher) == {}
    assert gradients(student).keys() == dict(student.named_parameters()).keys()
