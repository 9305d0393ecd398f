"""Stage 2 beside a teacher: the loss and its gradient written out, what a run records and plans, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bitdistill.checkpoint import checkpoint_digest
from bitdistill.config import PretrainConfig
from bitdistill.model import TernarySpec
from bitdistill.pipeline import run
from bitdistill.plan import Machine, plan_run
from bitdistill.recipe import load_recipe
from bitdistill.train.heldout import heldout_loss
from bitdistill.train.objective import Distillation, LanguageModelling
from bitdistill.train.surgery import refine


@pytest.fixture
def taught(make_model) -> tuple[Distillation, dict]:
    """A ternary student beside a wider and deeper teacher, in float64, and packed sequences: no mask."""
    student = refine(make_model("llama"), TernarySpec())[0].double()
    teacher = make_model("llama", hidden_size=48, num_hidden_layers=3, num_attention_heads=6).double()
    config = PretrainConfig(lambda_logits=3.0, temperature=2.0, teacher="x").distillation
    ids = torch.randint(2, 300, (3, 12))
    return Distillation(student, teacher, config), {"input_ids": ids, "labels": ids}


def test_the_loss_is_cross_entropy_and_the_kl_of_every_token(taught):
    objective, batch = taught
    student, teacher = objective.student, objective.teacher
    totals = objective.counts(batch)
    assert totals.tolist() == [33, 36, 36]  # the first token is not predicted; the last predicts, too
    result = objective(**batch, totals=totals)
    result["loss"].backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    output = student(**batch)
    log_q = (output.logits / 2).log_softmax(-1)
    with torch.no_grad():
        log_p = (teacher(batch["input_ids"]).logits / 2).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (output.loss + 3 * kl).backward()
    assert kl.item() > 0.01
    # The reference takes its cross-entropy in fp32, as Hugging Face does.
    assert result["loss"].item() == pytest.approx((output.loss + 3 * kl).item(), rel=1e-6)
    assert result["loss/ce"].item() == pytest.approx(output.loss.item(), rel=1e-6)
    assert result["loss/logits_kd"].item() == pytest.approx(kl.item(), rel=1e-9)
    assert result["loss/logits_kd_weighted"].item() == pytest.approx(3 * kl.item(), rel=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_held_out_text_is_judged_without_the_teacher(taught):
    objective, batch = taught
    calls = []
    objective.teacher.register_forward_hook(lambda *_: calls.append(1))
    objective.teacher.base_model.register_forward_hook(lambda *_: calls.append(1))
    items = [{key: value[i] for key, value in batch.items()} for i in range(3)]
    found = heldout_loss(objective, items, 12, range(3))
    assert calls == []
    assert found == heldout_loss(LanguageModelling(objective.student), items, 12, range(3))
    assert objective.training


# --- a run, and the verb ---

KD = ("pretrain.lambda_logits=0.5", "pretrain.temperature=2.0")


@pytest.fixture(scope="module")
def made(project, llama, tmp_path_factory) -> tuple[dict[str, dict], Path, dict[str, dict]]:
    """The steps of a run by their folders: as planned, and as recorded; between them the run's folder."""
    recipe = load_recipe(project, [
        f"model.source={llama}", f'output_dir="{tmp_path_factory.mktemp("runs")}"', *KD, "pretrain.eval_every=4",
        'run.methods=["fp16_ct_sft", "bitdistill:no_distill"]',
    ])  # fmt: skip
    plan = {step["folder"]: step for step in plan_run(recipe, Machine(flops=1e9))["steps"]}
    run(recipe)
    found = {p.parent.name: json.loads(p.read_text()) for p in recipe.run_dir.rglob("run.json")}
    return plan, recipe.run_dir, found


def test_the_full_precision_source_teaches_the_ternary_student_and_nobody_else(made, llama):
    _, folder, found = made
    settings = found["pretrain-subln"]["settings"]["training"]
    assert settings["teacher"] == checkpoint_digest(llama)
    assert (settings["lambda_logits"], settings["temperature"]) == (0.5, 2.0)
    losses = found["pretrain-subln"]["metrics"]
    assert losses["loss/logits_kd"] > 0
    assert losses["loss/logits_kd_weighted"] == pytest.approx(losses["loss/logits_kd"] / 2, abs=1e-6)
    assert 0 < losses["heldout/loss"] < 10
    control = found["pretrain-fp16"]
    assert not {"teacher", "lambda_logits", "temperature"} & set(control["settings"]["training"])
    assert "loss/logits_kd" not in control["metrics"]
    assert (folder / "pretrain-subln" / "model.safetensors").is_file()


def test_the_plan_counts_the_teacher_where_there_is_one(made, llama):
    plan, _, found = made
    assert set(plan) == set(found)
    memory = {name: plan[name]["memory"] for name in ("pretrain-fp16", "pretrain-subln")}
    assert memory["pretrain-fp16"]["teacher"] == 0
    assert memory["pretrain-subln"]["teacher"] == memory["pretrain-fp16"]["weights"]
    # The teacher's forward pass: two operations a weight and token, and its attention. KD reads one token more.
    (tokens, length), layers, hidden = (512, 16), 2, 32
    linear = layers * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    head = 300 * hidden
    expected = tokens * (2 * linear + 4 * layers * 32 * length + 2 * head) + 6 * head * (tokens // length)
    assert plan["pretrain-subln"]["flops"] - plan["pretrain-fp16"]["flops"] == pytest.approx(
        expected, rel=1e-9
    )


def pretrain(cli, project, source, output, *more):
    return cli("pretrain", project, "--source", source, "--output", output, *more)


def with_kd(*more: object) -> list[object]:
    return [*(word for value in KD for word in ("--set", value)), *more]


def test_the_verb_takes_another_teacher(cli, project, student, teacher, tmp_path):
    outcome = pretrain(cli, project, student, tmp_path / "new", *with_kd("--teacher", teacher))
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "new" / "run.json").read_text())
    assert record["settings"]["training"]["teacher"] == checkpoint_digest(teacher)
    assert record["metrics"]["loss/logits_kd"] > 0


def test_a_missing_teacher_is_asked_for(cli, project, student, tmp_path):
    outcome = pretrain(cli, project, student, tmp_path / "new", *with_kd())
    assert outcome.status == 1
    assert "pretrain.teacher is empty: name the teacher" in outcome.err


def test_a_teacher_without_a_weight_is_refused(cli, project, student, llama, tmp_path):
    outcome = pretrain(cli, project, student, tmp_path / "new", "--teacher", llama)
    assert outcome.status == 1
    assert f"pretrain.teacher = '{llama}': it is not used here" in outcome.err


def test_a_full_precision_model_is_refused(cli, project, llama, teacher, tmp_path):
    outcome = pretrain(cli, project, llama, tmp_path / "new", *with_kd("--teacher", teacher))
    assert outcome.status == 1
    assert (
        "is in full precision, which learns from the text alone; set pretrain.lambda_logits = 0"
        in outcome.err
    )


def test_a_teacher_of_other_tokens_is_refused_before_a_run_trains(cli, project, llama, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|stop|>"
    tokenizer["model"]["vocab"]["<|stop|>"] = tokenizer["model"]["vocab"].pop("<|end|>")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = cli(
        "run", project, "--set", f"model.source={llama}", "--set", f'output_dir="{tmp_path}"',
        *with_kd("--set", f'pretrain.teacher="{other}"'),
    )  # fmt: skip
    assert outcome.status == 1
    assert "teacher and student have different tokenizers" in outcome.err
    assert not (tmp_path / "small").exists()


def test_an_encoder_is_refused_before_a_run_trains(cli, encoder_project, bert, tmp_path):
    outcome = cli(
        "run",
        encoder_project,
        "--set",
        f"model.source={bert}",
        "--set",
        f'output_dir="{tmp_path}"',
        *with_kd(),
    )
    assert outcome.status == 1
    assert "pretrain.lambda_logits = 0.5: it is not used here: bert is an encoder" in outcome.err
    assert not (tmp_path / "small").exists()
