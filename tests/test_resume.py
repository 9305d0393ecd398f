"""A killed run continues to the same weights, bit for bit, and loses what came after its last checkpoint.

One run goes through undisturbed. Another, of the same recipe, is killed three times with SIGKILL, in other
processes: between checkpoints of the base, while stage 2 writes a checkpoint, in the second epoch of stage 3.
"""

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from bitdistill.train import sft

RECIPE = """
name = "run"

[base]
precision = "fp32"
tokens = 768  # 12 steps
batch_size = 4
vocab_size = 280
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
log_every = 1
save_every = 3

[corpus]
source = "{folder}/prose.jsonl"
sequence_length = 16
pretrain_share = 0.8

[task]
name = "jsonl"
data_dir = "{folder}/task"
template = "{{text}} It was"
labels = [" bad", " good"]
max_length = 64

# Schedules that change with the step: a resumed step must find the same values.
[pretrain]
precision = "fp32"
tokens = 768  # 12 steps
batch_size = 4
schedule = "two_stage"
weight_decay = 0.1
weight_decay_schedule = "half_then_zero"
quant_warmup_ratio = 0.8
log_every = 1
save_every = 3

[sft]
precision = "fp32"
epochs = 1
batch_size = 8
log_every = 1

[distill]
precision = "fp32"
epochs = 3  # of 6 steps
batch_size = 4
gradient_accumulation_steps = 2
log_every = 1
save_every = 4

[run]
methods = ["fp16_sft", "bitdistill"]
"""

# The real command line in a process that kills itself, as no handler can prevent, at an exact moment.
KILLED = """
import os, signal, sys
import transformers
from bitdistill import cli
from bitdistill.train.callbacks import MetricsFile

folder, step, moment = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)

def kill_at(found_folder, found_step):
    if found_folder == f"{folder}.partial" and found_step == step:
        os.kill(os.getpid(), signal.SIGKILL)

log, save = MetricsFile.on_log, transformers.Trainer._save_rng_state

def on_log(self, args, state, control, logs=None, **kwargs):
    log(self, args, state, control, logs=logs, **kwargs)
    if moment == "after logging":
        kill_at(self.path.parent.name, state.global_step)

def save_rng_state(self, output_dir):
    if moment == "while saving":
        kill_at(os.path.basename(os.path.dirname(self.args.output_dir)), self.state.global_step)
    save(self, output_dir)

MetricsFile.on_log = on_log
transformers.Trainer._save_rng_state = save_rng_state
cli.main()
"""

KILLS = (
    ("base", 7, "after logging"),
    ("pretrain-subln", 6, "while saving"),
    ("bitdistill", 11, "after logging"),
)
STEPS = {"base": 12, "pretrain-subln": 12, "fp16_sft": 6, "bitdistill": 18}


def weights(folder: Path) -> dict[str, str]:
    """Digest of every finished model of a run."""
    return {
        str(path.parent.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("model.safetensors"))
    }


def metrics(folder: Path) -> list[dict]:
    """Logged lines without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def command(recipe: Path, output: Path) -> tuple:
    return ("run", recipe, "--set", f'output_dir="{output}"')


@pytest.fixture(scope="module")
def recipe(project, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "recipe.toml"
    path.write_text(RECIPE.format(folder=project.parent))
    return path


@pytest.fixture(scope="module")
def undisturbed(cli, recipe) -> Path:
    outcome = cli(*command(recipe, recipe.parent / "undisturbed"))
    assert outcome.status == 0, outcome.err
    return recipe.parent / "undisturbed" / "run"


@pytest.fixture(scope="module")
def killed(cli, python, recipe) -> tuple[Path, list[list[str]]]:
    """The run folder, and the checkpoints that each kill left."""
    output, left = recipe.parent / "killed", []
    for kill in KILLS:
        done = python("-c", KILLED, *kill, *command(recipe, output))
        assert done.returncode == -signal.SIGKILL, done.stderr
        trainer = output / "run" / f"{kill[0]}.partial" / "trainer"
        assert not (output / "run" / kill[0]).exists()
        left.append(sorted(path.parent.name for path in trainer.glob("checkpoint-*/trainer_state.json")))
    outcome = cli(*command(recipe, output))
    assert outcome.status == 0, outcome.err
    return output / "run", left


def test_kills_came_after_whole_checkpoints_and_in_the_middle_of_one(killed):
    _, left = killed
    assert left == [["checkpoint-3", "checkpoint-6"], ["checkpoint-3"], ["checkpoint-4", "checkpoint-8"]]


@pytest.mark.parametrize(
    "step", ["base-blank", "fp16_sft", "refine-subln", *dict.fromkeys(k[0] for k in KILLS)]
)
def test_weights_are_those_of_an_undisturbed_run_bit_for_bit(undisturbed, killed, step):
    assert weights(killed[0])[step] == weights(undisturbed)[step]


def test_both_runs_hold_the_same_steps_and_all_weights_differ(undisturbed, killed):
    """So that equal digests above mean something."""
    digests = weights(undisturbed)
    assert set(weights(killed[0])) == set(digests)
    assert set(digests) == {"base-blank", "base", "fp16_sft", "refine-subln", "pretrain-subln", "bitdistill"}
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize("step", STEPS)
def test_metrics_hold_every_step_once_with_the_same_values(undisturbed, killed, step):
    lines = metrics(killed[0] / step)
    assert [line["step"] for line in lines] == list(range(1, STEPS[step] + 1))
    assert lines == metrics(undisturbed / step)


@pytest.mark.parametrize("step", STEPS)
def test_time_counts_what_was_trained_before_the_kill(killed, step):
    times = [json.loads(line)["perf/time_s"] for line in (killed[0] / step / "metrics.jsonl").open()]
    assert times == sorted(times)


def test_results_are_equal(undisturbed, killed):
    tables = []
    for folder in (undisturbed, killed[0]):
        rows = json.loads((folder / "result.json").read_text())
        del rows["meta"]
        tables.append({key: {k: v for k, v in row.items() if k != "time_s"} for key, row in rows.items()})
    assert tables[0] == tables[1]


def test_nothing_unfinished_is_left_behind(killed):
    assert list(killed[0].rglob("*.partial")) == []
    assert list(killed[0].rglob("checkpoint-*")) == []


# --- checkpoints whose writing was cut, in this process ---


@pytest.fixture
def stopped(cli, project, llama, tmp_path, monkeypatch) -> tuple:
    """An sft of 6 steps, stopped by a full disk after the last, with checkpoints of steps 4 and 6 left."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ("sft", project, "--source", llama, "--output", tmp_path / "new", "--set", "sft.save_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_model", full)
        assert cli(*arguments).status == 1
    trainer = tmp_path / "new.partial" / "trainer"
    assert {path.name for path in trainer.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    return arguments, trainer, tmp_path / "new"


@pytest.mark.parametrize("damaged", [(), (6,), (4, 6)], ids=str)
@pytest.mark.parametrize("how", ["missing", "half"])
def test_a_checkpoint_whose_writing_was_cut_is_passed_over(cli, stopped, teacher, damaged, how):
    arguments, trainer, output = stopped
    for step in damaged:
        state = trainer / f"checkpoint-{step}" / "trainer_state.json"
        if how == "missing":
            state.unlink()
        else:
            state.write_text(state.read_text()[: state.stat().st_size // 2])
    outcome = cli(*arguments)
    assert outcome.status == 0, outcome.err
    # The teacher was made by the same step with fewer checkpoints.
    assert weights(output) == weights(teacher)
    assert metrics(output) == metrics(teacher)
    assert json.loads((output / "run.json").read_text())["metrics"]["steps"] == 6


def test_a_metrics_line_that_was_cut_is_dropped(cli, stopped, teacher):
    arguments, trainer, output = stopped
    path = trainer.parent / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    (trainer / "checkpoint-6" / "trainer_state.json").unlink()
    assert cli(*arguments).status == 0
    assert metrics(output) == metrics(teacher)


def test_resume_files_of_a_finished_step_are_removed_if_a_kill_left_them(cli, stopped):
    arguments, _, output = stopped
    assert cli(*arguments).status == 0
    (output / "trainer" / "checkpoint-6").mkdir(parents=True)
    assert cli(*arguments).status == 0
    assert not (output / "trainer").exists()
