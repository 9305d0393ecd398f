"""Who teaches in a run: one of its own full-precision rows, or a model of another size."""

import json
from pathlib import Path

import pytest

from bitdistill.checkpoint import checkpoint_digest
from bitdistill.pipeline import ordered_methods, run
from bitdistill.plan import Machine, plan_run
from bitdistill.recipe import build_recipe, load_recipe

WIDER = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3}


def order(*methods: str, **distill: object) -> list[str]:
    recipe = build_recipe({"name": "x", "run": {"methods": list(methods)}, "distill": distill})
    return [method.key for method in ordered_methods(recipe)]


def test_the_row_that_teaches_is_made_first_and_once():
    names = ("bitdistill", "fp16_sft", "fp16_ct_sft")
    assert order(*names) == ["fp16_sft", "bitdistill", "fp16_ct_sft"]
    assert order(*names, teacher_method="fp16_ct_sft") == ["fp16_ct_sft", "bitdistill", "fp16_sft"]
    assert order("bitdistill", teacher_method="fp16_ct_sft") == ["fp16_ct_sft", "bitdistill"]
    assert order("bitdistill:no_distill", teacher_method="fp16_ct_sft") == ["bitdistill:no_distill"]
    assert order("bitdistill", teacher="folder") == ["bitdistill"]


def test_a_run_distills_the_row_that_it_was_told_to(project, llama, tmp_path):
    settings = [f"model.source={llama}", f'output_dir="{tmp_path}"', 'run.methods=["bitdistill"]']
    recipe = load_recipe(project, [*settings, "distill.teacher_method=fp16_ct_sft"])
    planned = [step["folder"] for step in plan_run(recipe, Machine(flops=1e9))["steps"]]
    assert planned == ["pretrain-fp16", "fp16_ct_sft", "refine-subln", "pretrain-subln", "bitdistill"]
    result = run(recipe)
    assert [key for key in result if key != "meta"] == ["fp16_ct_sft", "bitdistill"]
    made = {path.parent.name: json.loads(path.read_text()) for path in recipe.run_dir.rglob("run.json")}
    assert sorted(made) == sorted(planned)
    used = made["bitdistill"]["settings"]["training"]["teacher"]
    assert used == checkpoint_digest(recipe.run_dir / "fp16_ct_sft") != checkpoint_digest(llama)


@pytest.fixture
def larger(make_model, tokenizer, tmp_path):
    """``larger(num_attention_heads=4)`` -> a teacher of another width and depth."""

    def make(**changes: int) -> Path:
        folder = tmp_path / "larger"
        make_model("llama", **WIDER | changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_run_takes_a_larger_teacher(cli, project, llama, larger, tmp_path):
    outcome = cli(
        "run", project, "--set", f"model.source={llama}", "--set", f'output_dir="{tmp_path}"',
        "--set", f'distill.teacher="{larger()}"', "--set", "distill.relation_heads=2",
        "--set", 'run.methods=["bitdistill:no_pretrain"]', "--set", "distill.epochs=0.1",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    (folder,) = (tmp_path / "small").glob("bitdistill*")
    losses = json.loads((folder / "run.json").read_text())["metrics"]
    assert losses["loss/logits_kd"] > 0 < losses["loss/relation_kd"]


def test_as_many_heads_pair_as_they_are_however_wide(cli, project, student, larger, tmp_path):
    teacher = larger(num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    outcome = cli(
        "distill", project, "--source", student, "--teacher", teacher, "--output", tmp_path / "new",
        "--set", "distill.relation_heads=0", "--set", "distill.epochs=0.1",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "new" / "run.json").read_text())["metrics"]["loss/relation_kd"] > 0


@pytest.mark.parametrize(
    ("heads", "message"),
    [(0, "student and teacher have 4 and 6 heads here"), (5, "do not split into 5 relation heads")],
)
def test_heads_that_do_not_pair_are_refused_before_anything_is_made(
    cli, project, llama, larger, tmp_path, heads, message
):
    outcome = cli(
        "run", project, "--set", f"model.source={llama}", "--set", f'output_dir="{tmp_path}"',
        "--set", f'distill.teacher="{larger()}"', "--set", f"distill.relation_heads={heads}",
    )  # fmt: skip
    assert outcome.status == 1
    assert message in outcome.err
    assert "set distill.relation_heads to a" in outcome.err
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [("relation_heads=5", "do not split into 5 relation heads"), ("relation_layers=[7]", "layer 7")],
)
def test_what_a_teacher_still_to_be_made_cannot_have_is_refused_before_it_is_made(
    cli, project, llama, tmp_path, setting, message
):
    outcome = cli(
        "run", project, "--set", f"model.source={llama}", "--set", f'output_dir="{tmp_path}"',
        "--set", f"distill.{setting}",
    )  # fmt: skip
    assert outcome.status == 1
    assert message in outcome.err
    assert not (tmp_path / "small").exists()


def test_heads_do_not_matter_to_a_method_without_relations(project, llama, larger, tmp_path):
    recipe = load_recipe(project, [
        f"model.source={llama}", f'output_dir="{tmp_path}"', f'distill.teacher="{larger()}"', "distill.epochs=0.1",
        "distill.relation_heads=0", 'run.methods=["bitdistill:no_pretrain+no_relation_kd"]',
    ])  # fmt: skip
    (row,) = (row for key, row in run(recipe).items() if key != "meta")
    assert row["label"] == "BitDistill (no pretrain, no relation kd)"
