"""Two processes under torchrun (gloo, CPU) do what one does with the same global batch.

The oracle is the run of one process. Its batches are summed in another order than two processes sum theirs, so the
results agree to fp32 rounding and not to the bit: losses to 1e-5, weights to 1e-4 of the way that they moved.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

METHODS = "run.methods=['fp16_sft', 'bitdistill']"
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
"""Of the distance that the step moved the weights."""

PARENTS = {"fp16_sft": None, "pretrain-subln": "refine-subln", "bitdistill": "pretrain-subln"}
STEPS = {"fp16_sft": 6, "pretrain-subln": 8, "bitdistill": 6}

# Rank 1 of the pair stops for good while rank 0 logs the fourth step of stage 2.
STOPPED = """
import os, signal, sys
from bitdistill import cli
from bitdistill.train.callbacks import MetricsFile

log = MetricsFile.on_log

def on_log(self, args, state, control, logs=None, **kwargs):
    log(self, args, state, control, logs=logs, **kwargs)
    if self.path.parent.name == "pretrain-subln.partial" and state.global_step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

MetricsFile.on_log = on_log
cli.main()
"""


def command(project: Path, qwen3: Path, output: Path, *, batch_size: int) -> list[object]:
    """A whole run of 8 sequences a step when ``batch_size`` times the processes is 8."""
    changes = [f'model.source="{qwen3}"', f'output_dir="{output}"', METHODS, "pretrain.save_every=3"]
    changes += [f"{section}.batch_size={batch_size}" for section in ("pretrain", "sft", "distill")]
    changes += ["pretrain.tokens=1024", "pretrain.eval_every=4"]
    return ["run", project, *(word for change in changes for word in ("--set", change))]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(cli, project, qwen3, output) -> Path:
    outcome = cli(*command(project, qwen3, output / "one", batch_size=8))
    assert outcome.status == 0, outcome.err
    return output / "one" / "small"


@pytest.fixture(scope="module")
def two(python, project, qwen3, output):
    """The run folder, and what the launcher left on the screen."""
    done = python("-m", "bitdistill", *command(project, qwen3, output / "two", batch_size=4), processes=2)
    assert done.returncode == 0, done.stderr
    return output / "two" / "small", done


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in log(folder)]


def distance(left: Path, right: Path) -> float:
    """Euclidean distance of all weights of two checkpoints."""
    a, b = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert a.keys() == b.keys()
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


@pytest.mark.parametrize("step", STEPS)
def test_losses_are_those_of_one_process(one, two, step):
    expected, found = log(one / step), log(two[0] / step)
    assert [line["step"] for line in found] == list(range(1, STEPS[step] + 1))
    for left, right in zip(expected, found, strict=True):
        assert left.keys() == right.keys()
        assert ("heldout/loss" in left) == (step == "pretrain-subln" and left["step"] in (4, 8))
        keys = [key for key in left if key.startswith(("loss", "optim/", "heldout/"))]
        assert {key: right[key] for key in keys} == pytest.approx(
            {key: left[key] for key in keys}, rel=LOSS_TOLERANCE, abs=2e-6
        )


@pytest.mark.parametrize("step", STEPS)
def test_weights_are_those_of_one_process(one, two, qwen3, step):
    parent = one / PARENTS[step] if PARENTS[step] else qwen3
    moved = distance(one / step, parent)
    assert moved > 0.1
    assert distance(one / step, two[0] / step) < WEIGHT_TOLERANCE * moved


def test_one_process_speaks_for_both(two):
    folder, done = two
    assert done.stdout.count("FP16-SFT") == 1
    assert done.stderr.count("BitDistill: accuracy") == 1
    assert json.loads((folder / "result.json").read_text()).keys() == {"meta", "fp16_sft", "bitdistill"}
    assert list(folder.rglob("*.partial")) == []


def test_a_pair_that_lost_a_process_continues_to_the_same_weights_bit_for_bit(
    python, project, qwen3, output, two
):
    arguments = command(project, qwen3, output / "stopped", batch_size=4)
    assert python("-c", STOPPED, *arguments, processes=2).returncode != 0
    folder = output / "stopped" / "small"
    assert (folder / "pretrain-subln.partial" / "trainer" / "checkpoint-3" / "trainer_state.json").is_file()
    assert not (folder / "pretrain-subln").exists()
    done = python("-m", "bitdistill", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    for step in ("pretrain-subln", "bitdistill"):
        assert distance(folder / step, two[0] / step) == 0
        assert untimed(folder / step) == untimed(two[0] / step)


def test_a_finished_run_is_that_of_its_recipe_whatever_the_processes(cli, project, qwen3, two):
    """Begun on two, asked for on one: every step is there already, and nothing is made anew."""
    folder, _ = two
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    outcome = cli(*command(project, qwen3, folder.parent, batch_size=4))
    assert outcome.status == 0, outcome.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == before
    assert len(before) == 4


def test_a_new_step_of_a_run_keeps_the_global_batch_of_the_others(cli, project, qwen3, two):
    """Otherwise the methods of one table would be trained with different batches."""
    folder, _ = two
    more = ("--set", "run.methods=['fp16_sft', 'bitnet_sft']")
    outcome = cli(*command(project, qwen3, folder.parent, batch_size=4), *more)
    assert outcome.status == 0, outcome.err
    assert len(log(folder / "bitnet_sft")) == STEPS["fp16_sft"]
    training = json.loads((folder / "bitnet_sft" / "run.json").read_text())["settings"]["training"]
    assert (training["batch_size"], training["processes"]) == (4, 2)


def test_a_resume_cannot_change_the_precision_in_silence(cli, project, qwen3, output, monkeypatch):
    """``auto`` is what the machine has; the next machine may have something else."""
    from bitdistill.train import objective

    arguments = (
        "sft", project, "--source", qwen3, "--output", output / "auto",
        "--set", "sft.precision=auto", "--set", "sft.epochs=0.2",
    )  # fmt: skip
    monkeypatch.setattr(objective, "_device_has_bf16", lambda: False)
    assert cli(*arguments).status == 0
    settings = json.loads((output / "auto" / "run.json").read_text())["settings"]
    assert settings["training"]["precision"] == "fp32"
    monkeypatch.setattr(objective, "_device_has_bf16", lambda: True)
    refused = cli(*arguments)
    assert refused.status == 1
    assert "training.precision: 'fp32' there, 'bf16' now" in refused.err
    assert "Set its precision to the one it was made with" in refused.err
    assert cli(*arguments, "--set", "sft.precision=fp32").status == 0
