"""The plan says what ``run`` then does: steps and their order, optimizer steps, tokens, sizes. Nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from bitdistill.config import TaskConfig
from bitdistill.data.tasks import load_task
from bitdistill.errors import CheckpointError, TrainingError
from bitdistill.pipeline import run
from bitdistill.plan import Machine, plan_run
from bitdistill.plan.tokens import PUBLISHED_ROWS, task_tokens
from bitdistill.recipe import load_recipe

SLOW = Machine(flops=1e9, memory=1e9)


@pytest.fixture(scope="module")
def made(project, llama, tmp_path_factory) -> tuple[dict, dict, Path]:
    """A run planned, made and planned again: both plans, and the run's folder."""
    overrides = [
        f"model.source={llama}", f"output_dir={tmp_path_factory.mktemp('runs')}", "run.learning_rates=[1e-3, 2e-3]",
        "run.methods=['bitdistill', 'fp16_ct_sft', 'bitdistill:no_pretrain+no_relation_kd']",
        "sft.gradient_accumulation_steps=2",
    ]  # fmt: skip
    recipe = load_recipe(project, overrides)
    before = plan_run(recipe, SLOW)
    assert not recipe.run_dir.exists()
    run(recipe)
    return before, plan_run(recipe, SLOW), recipe.run_dir


def records(folder: Path) -> dict[str, dict]:
    """``run.json`` of every step in a run's folder, by the step's path."""
    return {str(p.parent.relative_to(folder)): json.loads(p.read_text()) for p in folder.rglob("run.json")}


def test_the_steps_are_those_that_run_makes_in_its_order(made):
    before, after, folder = made
    found = records(folder)
    planned = [step["folder"] for step in before["steps"]]
    assert sorted(planned) == sorted(found)
    assert planned == sorted(planned, key=lambda name: (folder / name / "run.json").stat().st_mtime_ns)
    assert {step["state"] for step in before["steps"]} == {"to do"}
    assert {step["state"] for step in after["steps"]} == {"done"}
    assert before["seconds_left"] > 0 == after["seconds_left"]


def test_a_step_that_was_stopped_counts_as_started(made, project, llama, tmp_path):
    _, _, folder = made
    shutil.copytree(folder, tmp_path / "small")
    (tmp_path / "small" / "fp16_ct_sft" / "lr-0.001").rename(
        tmp_path / "small" / "fp16_ct_sft" / "lr-0.001.partial"
    )
    recipe = load_recipe(
        project,
        [
            f"model.source={llama}",
            f"output_dir={tmp_path}",
            "run.methods=['fp16_ct_sft']",
            "run.learning_rates=[1e-3, 3e-3]",
        ],
    )
    states = {step["folder"]: step["state"] for step in plan_run(recipe, SLOW)["steps"]}
    assert states == {
        "pretrain-fp16": "done",
        "fp16_ct_sft/lr-0.001": "started",
        "fp16_ct_sft/lr-0.003": "to do",
    }


def test_optimizer_steps_and_learning_rates_are_those_that_were_taken(made):
    before, _, folder = made
    found = records(folder)
    trained = [step for step in before["steps"] if "optimizer_steps" in step]
    assert len(trained) == 2 + 4 * 2
    for step in trained:
        record = found[step["folder"]]
        assert step["optimizer_steps"] == record["metrics"]["steps"]
        assert step["learning_rate"] == record["settings"]["training"]["learning_rate"]
        assert step["precision"] == record["settings"]["training"]["precision"]


def test_sizes_are_those_of_the_checkpoints(made):
    before, _, folder = made
    (student,) = before["models"]
    record = records(folder)["refine-subln"]["metrics"]
    assert student["parameters"] == record["parameters"]
    assert student["linears"] == record["linears_replaced"]
    assert (student["bytes_at_16_bit"], student["bytes_packed"]) == (
        record["bytes_before"],
        record["bytes_after"],
    )
    with safe_open(folder / "refine-subln" / "model.safetensors", framework="np") as file:
        stored = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert student["parameters"] == stored


def test_time_is_operations_over_what_the_devices_reach(made, project, llama):
    before, _, _ = made
    for step in before["steps"]:
        if "flops" in step:
            assert step["seconds"] == pytest.approx(step["flops"] / (1e9 * 0.4))
    recipe = load_recipe(project, [f"model.source={llama}", "run.methods=['fp16_sft']"])
    four = plan_run(recipe, Machine(processes=4, flops=1e9, utilisation=0.5))
    (step,) = four["steps"]
    assert step["seconds"] == pytest.approx(step["flops"] / (4 * 1e9 * 0.5))
    assert step["global_batch"] == 4 * 8


# --- tokens ---


def test_tokens_of_a_task_at_hand_are_counted_with_their_padding(project, llama, tokenizer):
    recipe = load_recipe(project, [f"model.source={llama}"])
    found = task_tokens(recipe)
    task = load_task(recipe.task)
    lengths = [
        len(tokenizer(e.prompt)["input_ids"]) + len(tokenizer(e.answer)["input_ids"]) for e in task.train
    ]
    assert (found.examples, found.longest) == (len(task.train), max(lengths))
    answers = [len(tokenizer(e.answer)["input_ids"]) for e in task.train]
    assert found.labelled == pytest.approx(sum(answers) / len(answers))
    assert found.most_labelled == max(answers)
    # Alone no sequence is padded; all together are as long as the longest.
    alone, together = (recipe.sft.__class__(batch_size=n) for n in (1, 1000))
    assert found.per_epoch(alone, 0, 1) == sum(lengths)
    assert found.per_epoch(together, 0, 1) == len(lengths) * max(lengths)
    assert sum(lengths) <= found.per_epoch(recipe.sft, 0, 1) <= len(lengths) * max(lengths)


def test_a_task_on_the_hub_is_bounded_and_said_to_be(project, llama):
    recipe = load_recipe(project, [f"model.source={llama}"])
    section = TaskConfig(name="qnli", validation_share=0.25, max_length=100)
    found = task_tokens(recipe.__class__(name="x", model=recipe.model, task=section))
    assert found.examples == round(0.75 * PUBLISHED_ROWS["qnli"])
    assert found.per_epoch(recipe.sft, 0, 1) == 100 * found.examples
    assert "upper bound" in found.basis


def test_published_sizes_are_those_of_the_files(shared_data):
    task = load_task(TaskConfig(name="sst2", data_dir=str(shared_data / "sst2")))
    rows = (shared_data / "sst2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    assert PUBLISHED_ROWS["sst2"] == len(rows) - 1
    assert len(task.train) < PUBLISHED_ROWS["sst2"]


# --- what run would refuse, and a base that has yet to be made ---


def test_a_base_from_scratch_is_planned_before_it_exists(project, tmp_path):
    recipe = load_recipe(
        project,
        [f"output_dir={tmp_path}", "base.tokens=1000", "base.vocab_size=300", "run.methods=['bitnet_sft']"],
    )
    plan = plan_run(recipe, SLOW)
    assert [step["folder"] for step in plan["steps"]] == ["base-blank", "base", "refine-none", "bitnet_sft"]
    assert plan["models"][0]["family"] == "qwen3"
    assert "upper bound" in plan["task"]["basis"]  # there is no tokenizer yet
    assert list(tmp_path.iterdir()) == []


def test_a_relation_layer_that_the_model_lacks_is_refused(project, llama):
    recipe = load_recipe(project, [f"model.source={llama}", "distill.relation_layers=[7]"])
    with pytest.raises(TrainingError, match="no layer 7 in a model of 2 layers"):
        plan_run(recipe, SLOW)


def test_a_missing_teacher_is_refused(project, llama, tmp_path):
    recipe = load_recipe(project, [f"model.source={llama}", f"distill.teacher={tmp_path / 'none'}"])
    with pytest.raises(CheckpointError, match="no such folder"):
        plan_run(recipe, SLOW)


# --- the command ---


def test_the_command_prints_the_plan_and_writes_it_as_json(cli, project, llama, tmp_path):
    outcome = cli(
        "run", project, "--dry-run", "--processes", 2, "--flops", "1e12", "--json", tmp_path / "plan.json",
        "--set", f"model.source={llama}", "--set", f"output_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    plan = json.loads((tmp_path / "plan.json").read_text())
    for step in plan["steps"]:
        assert step["folder"] in outcome.out
    for word in ("FSDP2", "FLOPs", "counted in the data", "2 x 1 TFLOP/s", "to do"):
        assert word in outcome.out
    assert "warning" not in outcome.err
    assert not (tmp_path / "runs").exists()


def test_without_a_figure_the_devices_speed_is_measured(cli, project, llama, tmp_path):
    outcome = cli("run", project, "--dry-run", "--set", f"model.source={llama}", "--set", "run.methods=['fp16_sft']",
                  "--json", tmp_path / "plan.json")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "(measured here) at 40%" in outcome.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["flops_measured"]
    assert 1e7 < plan["flops_per_second"]["fp32"] < 1e16


def test_what_does_not_fit_is_warned_of_once_a_method(cli, project, llama):
    outcome = cli(
        "run", project, "--dry-run", "--flops", "1e12", "--device-memory", "1e5", "--set", f"model.source={llama}",
        "--set", "run.methods=['fp16_sft']", "--set", "run.learning_rates=[1e-3, 2e-3]",
    )  # fmt: skip
    assert outcome.status == 0
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("warning: fp16_sft takes ")
    assert "which has 0.10 MB; lower batch_size" in line


def test_an_encoder_is_refused(cli, encoder_project, bert):
    outcome = cli("run", encoder_project, "--dry-run", "--set", f"model.source={bert}")
    assert outcome.status == 1
    assert "a dry run plans decoders, and bert is an encoder" in outcome.err
    assert "Traceback" not in outcome.err
