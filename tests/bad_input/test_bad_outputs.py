"""Training and disks that cannot go on: one message, and nothing finished is lost."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from refusals import (
    contents,
    no_space,
    refused,
    refused_full,
    weights_digest,
)
from safetensors import SafetensorError

from bitdistill.data import corpus
from bitdistill.data.npyfile import GrowingArray
from bitdistill.train import sft, stage2_pretrain
from bitdistill.train.trainer import StudentTrainer

# --- training that cannot go on ---


def test_a_loss_that_is_not_finite_names_step_and_learning_rate_and_keeps_checkpoints(
    cli, project, llama, tmp_path
):
    outcome = cli(
        "sft", project, "--source", llama, "--output", tmp_path / "new", "--set", "sft.learning_rate=1e30",
        "--set", "sft.warmup_ratio=0", "--set", "sft.max_grad_norm=0", "--set", "sft.save_every=1",
    )  # fmt: skip
    message = refused(outcome, " became ", "Lower the learning rate (now 1e+30)")
    step = int(re.search(r"at step (\d+)", message).group(1))
    assert step > 1
    assert f"the checkpoint of step {step - 1} is kept" in message
    trainer = tmp_path / "new.partial" / "trainer"
    assert (trainer / f"checkpoint-{step - 1}" / "trainer_state.json").is_file()


def test_other_settings_name_the_key_and_both_values_and_touch_nothing(cli, project, teacher, llama):
    before = contents(teacher)
    outcome = cli("sft", project, "--source", llama, "--output", teacher, "--set", "sft.learning_rate=0.5")
    refused(outcome, teacher, "training.learning_rate: 0.001 there, 0.5 now", "another name")
    assert contents(teacher) == before


def test_another_source_names_the_digests_and_touches_nothing(cli, project, teacher, student):
    before = contents(teacher)
    refused(cli("sft", project, "--source", student, "--output", teacher), "source: '", "there, '")
    assert contents(teacher) == before


def test_an_unfinished_step_is_not_continued_with_other_settings(cli, project, llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("sft", project, "--source", llama, "--output", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_model", full)
        assert cli(*command).status == 1
    before = contents(tmp_path / "new.partial")
    refused(cli(*command, "--set", "seed=7"), "seed: 0 there, 7 now")
    assert contents(tmp_path / "new.partial") == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_is_something_else_is_refused_before_any_work(cli, project, llama, tmp_path, kind):
    output = tmp_path / "taken"
    if kind == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    else:
        output.write_text("years of work")
    before = contents(tmp_path)
    refused(cli("sft", project, "--source", llama, "--output", output), output, "another name")
    assert contents(tmp_path) == before


# --- the machine ---


def test_an_output_that_cannot_be_made_is_named(cli, project, llama, tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "new"
    refused(cli("refine", project, "--source", llama, "--output", output), output, "not a directory")


def test_a_json_path_that_is_a_folder_is_named(cli, llama, tmp_path):
    refused(cli("inspect", llama, "--json", tmp_path), tmp_path, "is a directory")


@pytest.fixture(scope="module")
def pretrained(cli, project, llama, tmp_path_factory) -> str:
    """Digest of what stage 2 makes of the small Llama when nothing goes wrong."""
    output = tmp_path_factory.mktemp("pretrained") / "new"
    assert cli("pretrain", project, "--source", llama, "--output", output).status == 0
    return weights_digest(output)


def test_a_full_disk_at_the_last_save_loses_nothing(cli, project, llama, pretrained, tmp_path, monkeypatch):
    command = ("pretrain", project, "--source", llama, "--output", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(stage2_pretrain, "save_model", no_space)
        refused_full(cli(*command))
    assert not (tmp_path / "new").exists()
    assert cli(*command).status == 0
    assert weights_digest(tmp_path / "new") == pretrained
    steps = [json.loads(line)["step"] for line in (tmp_path / "new" / "metrics.jsonl").open()]
    assert steps == list(range(1, 9))


def test_a_full_disk_at_a_checkpoint_loses_what_came_after_the_one_before(
    cli, project, llama, pretrained, tmp_path, monkeypatch
):
    # save_every decides where checkpoints are, not what comes out, but it is one of the settings.
    command = (
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", "pretrain.save_every=3",
    )  # fmt: skip
    save = StudentTrainer._save

    def fail_at_six(self, output_dir=None, state_dict=None):
        if self.state.global_step == 6:
            no_space()
        save(self, output_dir, state_dict)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "_save", fail_at_six)
        refused_full(cli(*command))
    assert (tmp_path / "new.partial" / "trainer" / "checkpoint-3" / "trainer_state.json").is_file()
    assert cli(*command).status == 0
    assert weights_digest(tmp_path / "new") == pretrained


@pytest.fixture
def full_disk(tmp_path) -> Path:
    """A path that cannot be written for lack of space.

    A link, because some writers rename a file of their own over the path: that must not hit the device.
    """
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    return path


def test_a_disk_that_fills_while_torch_saves_is_recognised(
    cli, project, llama, full_disk, tmp_path, monkeypatch
):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, path, *rest, **more: save(value, full_disk))
    refused_full(cli("pretrain", project, "--source", llama, "--output", tmp_path / "new"))


def test_a_disk_that_fills_while_weights_are_written_is_recognised(
    cli, project, llama, tmp_path, monkeypatch
):
    def save(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save)
    refused_full(cli("refine", project, "--source", llama, "--output", tmp_path / "new"))


def test_a_disk_that_fills_while_the_corpus_is_written_is_recognised(
    cli, project, llama, full_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "GrowingArray", lambda path, dtype: GrowingArray(full_disk, dtype))
    refused_full(
        cli(
            "pretrain", project, "--source", llama, "--output", tmp_path / "new",
            "--set", f"output_dir={tmp_path}",
        )
    )  # fmt: skip


def test_a_result_that_does_not_fit_on_the_disk_is_an_error(cli, llama, full_disk):
    refused_full(cli("inspect", llama, "--json", full_disk))
