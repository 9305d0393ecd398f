"""Objectives: the loss of a training step against Hugging Face's own and against parts computed apart."""

import itertools
import json

import pytest
import torch
from hf_reference import projected_states, rotated_states
from tiny_families import families
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.config import DistillConfig, PretrainConfig
from bitdistill.data.corpus import collate_packed
from bitdistill.errors import TrainingError
from bitdistill.model import TernarySpec
from bitdistill.train.losses import relation_kd
from bitdistill.train.objective import Distillation, LanguageModelling
from bitdistill.train.surgery import refine
from bitdistill.train.trainer import fit

IGNORED = -100


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Task examples of four lengths, padded on the right; the last two or three real tokens answer."""
    lengths, answers = (11, 7, 4, 9), (2, 3, 2, 3)
    input_ids = torch.full((4, 11), 1)
    attention_mask = torch.zeros(4, 11, dtype=torch.int64)
    labels = torch.full((4, 11), IGNORED)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        input_ids[row, :length] = torch.randint(2, 300, (length,))
        attention_mask[row, :length] = 1
        labels[row, length - answer : length] = input_ids[row, length - answer : length]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def ternary(model: PreTrainedModel) -> PreTrainedModel:
    return refine(model, TernarySpec())[0]


def distillation(student: PreTrainedModel, teacher: PreTrainedModel, **config: object) -> Distillation:
    """Weights that let every part matter in the sum."""
    values = {"lambda_logits": 10.0, "gamma_relation": 50.0}
    return Distillation(student, teacher, DistillConfig(**values | config))


def trimmed(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows of a batch, with no more padding than they need."""
    length = int(batch["attention_mask"][rows].sum(dim=1).max())
    return {key: value[rows, :length] for key, value in batch.items()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- language modelling ---


@families
@pytest.mark.parametrize("kind", ["dense", "ternary"])
def test_cross_entropy_is_that_of_hugging_face(make_model, family, kind, batch):
    model = make_model(family)
    model = model if kind == "dense" else ternary(model)
    expected = model(**batch).loss
    expected.backward()
    reference = gradients(model)
    model.zero_grad()
    objective = LanguageModelling(model)
    totals = objective.counts(batch)
    assert totals.tolist() == [10]
    result = objective(**batch, totals=totals)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(result["loss/ce"], expected.detach(), rtol=1e-6, atol=0)
    assert not result["loss/ce"].requires_grad
    torch.testing.assert_close(gradients(model), reference, rtol=1e-4, atol=1e-6)


def test_packed_sequences_need_no_mask(make_model):
    model = make_model("llama")
    ids = torch.randint(2, 300, (3, 12))
    objective = LanguageModelling(model)
    totals = objective.counts({"labels": ids})
    assert totals.tolist() == [33]  # the first token of each is not predicted
    loss = objective(input_ids=ids, labels=ids, totals=totals)["loss"]
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=1e-6, atol=0)


# --- distillation: the total is the sum of its parts ---


def logits_reference(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], config: DistillConfig
) -> Tensor:
    """Eq. 8-9 written out: mean over tokens of the KL at temperature tau."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [
            model(**inputs).logits.double()[..., :300] / config.temperature for model in (teacher, student)
        ]
    p, q = (value.softmax(-1) for value in logits)
    kl = (p * (p.log() - q.log())).sum(-1)
    if config.kd_tokens == "all":
        chosen = batch["attention_mask"].bool()
    else:
        chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
        chosen[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return kl[chosen].mean() * (config.temperature**2 if config.tau_squared else 1)


def relation_reference(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    config: DistillConfig,
    pairs: list,
) -> Tensor:
    """The relation loss of Hugging Face's states, one sequence at a time, per real token."""
    make = rotated_states if config.relation_states == "post_rope" else projected_states
    total, rows = 0.0, 0
    for index in range(len(batch["input_ids"])):
        row = {key: batch[key][index : index + 1] for key in ("input_ids", "attention_mask")}
        if config.relation_mask != "none":
            length = int(row["attention_mask"].sum())
            row = {key: value[:, :length] for key, value in row.items()}
        rows += row["input_ids"].numel()
        for layer_s, layer_t in pairs:
            loss = relation_kd(
                make(student, layer_s, **row),
                make(teacher, layer_t, **row),
                heads=config.relation_heads,
                form=config.relation_form,
                temperature=config.relation_temperature,
                causal=config.relation_mask == "causal",
            )
            total += loss.double() / len(pairs)
    return total / rows


@pytest.mark.parametrize(
    ("config", "pairs"),
    [
        ({}, [(1, 1)]),
        ({"kd_tokens": "all", "temperature": 2.0, "tau_squared": True}, [(1, 1)]),
        ({"relation_form": "cosine", "relation_heads": 2, "relation_temperature": 0.5}, [(1, 1)]),
        ({"relation_mask": "causal", "relation_layers": (0, -1)}, [(0, 0), (1, 1)]),
        ({"relation_mask": "none", "relation_states": "pre_rope", "relation_heads": 8}, [(1, 1)]),
        ({"relation_layers": (0,), "teacher_layers": (1,)}, [(0, 1)]),
    ],
)
@families
def test_the_total_is_the_weighted_sum_of_independent_parts(make_model, family, config, pairs, batch):
    student = ternary(make_model(family))
    teacher = make_model(family, initializer_range=0.15)
    objective = distillation(student, teacher, **config)
    result = objective(**batch, totals=objective.counts(batch))
    ce = student(**batch).loss.double()
    kd = logits_reference(student, teacher, batch, objective.distill)
    relation = relation_reference(student, teacher, batch, objective.distill, pairs)
    parts = {
        "loss/ce": ce,
        "loss/logits_kd": kd,
        "loss/logits_kd_weighted": 10 * kd,
        "loss/relation_kd": relation,
        "loss/relation_kd_weighted": 50 * relation,
    }
    assert set(result) == {"loss", *parts}
    for name, expected in parts.items():
        assert result[name].item() == pytest.approx(expected.item(), rel=2e-4), name
        assert expected.item() > 1e-3, name
        assert not result[name].requires_grad
    assert result["loss"].item() == pytest.approx((ce + 10 * kd + 50 * relation).item(), rel=2e-4)


@families
def test_a_teacher_may_be_wider_deeper_and_have_more_heads(make_model, family, batch):
    teacher = make_model(
        family,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=310,
    )
    student = ternary(make_model(family))
    objective = distillation(student, teacher, relation_heads=2, relation_layers=(0, 1))
    result = objective(**batch, totals=objective.counts(batch))
    config = objective.distill
    expected = relation_reference(student, teacher, batch, config, [(0, 1), (1, 3)])
    assert result["loss/relation_kd"].item() == pytest.approx(expected.item(), rel=2e-4)
    expected = logits_reference(student, teacher, batch, config)
    assert result["loss/logits_kd"].item() == pytest.approx(expected.item(), rel=2e-4)


def test_other_head_counts_without_relation_heads_are_an_error_with_the_remedy(make_model, batch):
    teacher = make_model("llama", hidden_size=48, num_attention_heads=6)
    objective = distillation(make_model("llama"), teacher)
    with pytest.raises(TrainingError, match=r"4 and 6 heads.*distill\.relation_heads"):
        objective(**batch, totals=objective.counts(batch))


@pytest.mark.parametrize(
    ("off", "parts"),
    [
        ({"lambda_logits": 0.0}, {"loss", "loss/ce", "loss/relation_kd", "loss/relation_kd_weighted"}),
        ({"gamma_relation": 0.0}, {"loss", "loss/ce", "loss/logits_kd", "loss/logits_kd_weighted"}),
        ({"lambda_logits": 0.0, "gamma_relation": 0.0}, {"loss", "loss/ce"}),
    ],
)
def test_a_part_of_weight_zero_is_switched_off(make_model, batch, off, parts):
    objective = distillation(make_model("llama"), make_model("llama", initializer_range=0.1), **off)
    result = objective(**batch, totals=objective.counts(batch))
    assert set(result) == parts


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(make_model, batch):
    objective = distillation(make_model("qwen3"), make_model("qwen3"))
    result = objective(**batch, totals=objective.counts(batch))
    assert result["loss/logits_kd"].item() == pytest.approx(0, abs=1e-6)
    assert result["loss/relation_kd"].item() == pytest.approx(0, abs=1e-6)
    assert result["loss"].item() == pytest.approx(result["loss/ce"].item(), rel=1e-4)


# --- the teacher ---


def test_the_teacher_is_no_part_of_the_objective_and_gets_no_gradient(make_model, batch):
    student, teacher = ternary(make_model("llama")), make_model("llama", initializer_range=0.1).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = distillation(student, teacher)
    assert not teacher.training
    objective.train()
    assert not teacher.training
    objective(**batch, totals=objective.counts(batch))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert set(objective.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    mine = {id(p) for p in objective.parameters()}
    assert mine == {id(p) for p in student.parameters()}
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is not None for p in student.parameters())


# --- batches, micro-batches, padding ---


def objectives(make_model, kind: str) -> LanguageModelling:
    """In float64, with a dense or a ternary student."""
    student = make_model("llama")
    student = (student if kind.endswith("dense") else ternary(student)).double()
    if kind.startswith("lm"):
        return LanguageModelling(student)
    teacher = make_model("llama", initializer_range=0.1).double()
    mask = "causal" if kind.startswith("causal") else "padding"
    return distillation(student, teacher, relation_mask=mask, relation_layers=(0, 1), kd_tokens="all")


@pytest.mark.parametrize("kind", ["lm-dense", "lm-ternary", "kd-dense", "kd-ternary", "causal-dense"])
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 2, 3, 4)])
def test_micro_batches_with_the_totals_of_the_step_give_the_same_loss_and_gradients(
    make_model, batch, kind, cuts
):
    objective = objectives(make_model, kind)
    totals = objective.counts(batch)
    whole = objective(**batch, totals=totals)
    whole["loss"].backward()
    expected = gradients(objective)
    objective.zero_grad()
    pieces = [trimmed(batch, slice(*cut)) for cut in itertools.pairwise(cuts)]
    assert sum(objective.counts(piece) for piece in pieces).tolist() == totals.tolist()
    assert len({piece["input_ids"].shape[1] for piece in pieces}) > 1  # padded otherwise than the whole
    sums = dict.fromkeys(whole, 0.0)
    for piece in pieces:
        result = objective(**piece, totals=totals)
        result["loss"].backward()
        for name, value in result.items():
            sums[name] += value.item()
    # Hugging Face computes norms and rotations in fp32 whatever the model's dtype.
    for name, value in whole.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-6), name
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["lm-ternary", "kd-ternary", "causal-dense"])
def test_what_stands_under_padding_changes_nothing(make_model, batch, kind):
    objective = objectives(make_model, kind)
    totals = objective.counts(batch)
    loss = objective(**batch, totals=totals)["loss"].item()
    padding = batch["attention_mask"] == 0
    other = batch | {
        "input_ids": torch.where(padding, torch.randint(2, 300, padding.shape), batch["input_ids"])
    }
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert objective(**other, totals=totals)["loss"].item() == pytest.approx(loss, rel=1e-6)
    longer = {
        key: torch.nn.functional.pad(value, (0, 5), value=fill)
        for (key, value), fill in zip(batch.items(), (1, 0, IGNORED), strict=True)
    }
    assert objective.counts(longer).tolist() == totals.tolist()
    assert objective(**longer, totals=totals)["loss"].item() == pytest.approx(loss, rel=1e-6)


def test_counts_are_labels_kd_tokens_and_relation_rows(make_model, batch):
    student, teacher = make_model("llama"), make_model("llama")
    real = int(batch["attention_mask"].sum())
    expected = {
        ("response", "padding"): [10, 10, real],
        ("all", "causal"): [10, real, real],
        ("all", "none"): [10, real, 44],
    }
    for (tokens, mask), counts in expected.items():
        objective = distillation(student, teacher, kd_tokens=tokens, relation_mask=mask)
        assert objective.counts(batch).tolist() == counts


# --- through the training loop ---


def metrics(make_model, tokenizer, folder, **changes) -> list[dict]:
    """Logged lines of a short training of the same model on the same samples."""
    ids = torch.randint(2, 300, (32, 12), generator=torch.Generator().manual_seed(5))
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    config = PretrainConfig(precision="fp32", log_every=1, **changes)
    folder.mkdir()
    fit(
        LanguageModelling(make_model("llama")),
        dataset,
        collate_packed,
        config,
        steps=6,
        seed=3,
        work_dir=folder,
        tokenizer=tokenizer,
        title="test",
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_accumulation_trains_like_the_batch_it_stands_for(make_model, tokenizer, tmp_path):
    whole = metrics(make_model, tokenizer, tmp_path / "whole", batch_size=8)
    parts = metrics(make_model, tokenizer, tmp_path / "parts", batch_size=2, gradient_accumulation_steps=4)
    assert [line["step"] for line in whole] == [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "loss/ce", "optim/grad_norm"):
        values = [[line[key] for line in lines] for lines in (whole, parts)]
        assert values[0] == pytest.approx(values[1], rel=1e-3), key
    assert whole[0]["loss"] == pytest.approx(whole[0]["loss/ce"], rel=1e-5)


# --- what a step does to the codes ---


def independent_codes(weights: dict[str, Tensor]) -> Tensor:
    """Absmean codes (b1.58, eq. 1-3) of the linears of the blocks, in float64."""
    names = [name for name in weights if "_proj.weight" in name]
    assert len(names) == 14
    latents = [weights[name].double() for name in names]
    return torch.cat([(w / w.abs().mean()).round().clamp(-1, 1).flatten() for w in latents])


@pytest.mark.parametrize("logged", [1, 3])
def test_flip_rate_and_zero_share_are_those_of_the_logged_step(make_model, tokenizer, tmp_path, logged):
    """Oracle: the weights of runs that end one step before it and at it."""
    ids = torch.randint(2, 300, (32, 12), generator=torch.Generator().manual_seed(5))
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    config = PretrainConfig(
        precision="fp32", log_every=3, batch_size=4, schedule="constant", warmup_ratio=0, learning_rate=2e-2
    )
    codes, lines = [], []
    for steps in (logged - 1, logged):
        student = ternary(make_model("llama"))
        if steps:
            work = {"work_dir": tmp_path / str(steps), "tokenizer": tokenizer, "title": "test"}
            objective = LanguageModelling(student)
            fit(objective, dataset, collate_packed, config, steps=steps, seed=3, **work)
            lines = [json.loads(line) for line in (tmp_path / str(steps) / "metrics.jsonl").open()]
        codes.append(independent_codes(student.state_dict()))
    assert [line["step"] for line in lines] == sorted({1, logged})
    flips = float((codes[0] != codes[1]).double().mean())
    assert 0.001 < flips < 0.5
    assert lines[-1]["quant/flip_rate"] == pytest.approx(flips, abs=1e-4)
    assert lines[-1]["quant/zero_frac"] == pytest.approx(float((codes[1] == 0).double().mean()), abs=1e-4)


def test_a_full_precision_model_has_no_codes_to_log(make_model, tokenizer, tmp_path):
    lines = metrics(make_model, tokenizer, tmp_path / "dense", batch_size=8)
    assert not [key for line in lines for key in line if key.startswith("quant/")]
