"""The moving average of the weights: the closed form, what is judged and saved, a resume."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from pair import STOPPED, stopped_at
from safetensors.torch import load_file
from training import train

from bitdistill.config import TrainingConfig
from bitdistill.model import TernarySpec
from bitdistill.pipeline import heldout_sequences
from bitdistill.plan.memory import TrainingStep, step_memory
from bitdistill.plan.models import Blueprint, config_text
from bitdistill.recipe import load_recipe
from bitdistill.train import stage2_pretrain
from bitdistill.train.heldout import heldout_loss
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.objective import LanguageModelling
from bitdistill.train.surgery import refine
from bitdistill.train.trainer import training_settings


def ternary(make_model):
    return refine(make_model("llama"), TernarySpec())[0]


def test_the_end_is_the_weighted_mean_of_every_steps_weights(make_model, tokenizer, tmp_path):
    """Checkpoints hold the weights that training passes; the last two are kept, the first is trained anew."""
    first = train(ternary(make_model), tokenizer, tmp_path / "first", steps=1)
    folder = tmp_path / "average"
    found = train(ternary(make_model), tokenizer, folder, steps=3, ema_decay=0.75, save_every=1)
    files = [folder / "trainer" / f"checkpoint-{n}" / "model.safetensors" for n in (2, 3)]
    passed = [first, *map(load_file, files)]
    for name, average in found.items():
        expected = sum(0.75 ** (2 - i) * w[name].double() for i, w in enumerate(passed)) / (0.5625 + 0.75 + 1)
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
        assert not torch.allclose(average, passed[-1][name], atol=1e-4), name


# --- stage 2 of eight steps ---


@pytest.fixture(scope="module")
def pretrain(cli, project, student, tmp_path_factory):
    """``pretrain("name", "ema_decay=0.5")`` -> outcome, folder."""
    folder = tmp_path_factory.mktemp("average")

    def run(name: str, *settings: str) -> tuple:
        settings = ("save_every=3", "eval_every=2", *settings)
        changes = [word for setting in settings for word in ("--set", f"pretrain.{setting}")]
        return cli(
            "pretrain", project, "--source", student, "--output", folder / name, *changes
        ), folder / name

    return run


@pytest.fixture(scope="module")
def averaged(pretrain) -> Path:
    outcome, folder = pretrain("averaged", "ema_decay=0.6")
    assert outcome.status == 0, outcome.err
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_training_goes_on_as_without_it(pretrain, averaged):
    """Though held-out text is judged with the average in the student's place."""
    _, plain = pretrain("plain")
    assert weights(plain) != weights(averaged)
    before, after = log(plain), log(averaged)
    assert [line["loss"] for line in before] == [line["loss"] for line in after]
    assert [line["quant/flip_rate"] for line in before] == [line["quant/flip_rate"] for line in after]
    heldout = [
        [line["heldout/loss"] for line in lines if "heldout/loss" in line] for lines in (before, after)
    ]
    assert len(heldout[0]) == len(heldout[1]) == 4
    assert all(a != b for a, b in zip(*heldout, strict=True))


def test_what_is_judged_last_is_what_is_saved(averaged, project):
    recipe = load_recipe(project)
    sequences = heldout_sequences(recipe, load_tokenizer(averaged))
    found = heldout_loss(LanguageModelling(load_model(averaged)), sequences, 16, range(len(sequences)))
    assert len(sequences) <= recipe.pretrain.eval_sequences
    assert json.loads((averaged / "run.json").read_text())["metrics"]["heldout/loss"] == pytest.approx(
        found, rel=1e-6
    )


def test_a_step_that_was_stopped_ends_with_the_same_average(pretrain, averaged):
    with stopped_at(5):
        assert pretrain("stopped", "ema_decay=0.6")[0].status == STOPPED
    outcome, folder = pretrain("stopped", "ema_decay=0.6")
    assert outcome.status == 0, outcome.err
    assert weights(folder) == weights(averaged)
    assert not list(folder.rglob("average.pt"))


def test_a_step_that_was_stopped_after_its_last_checkpoint_ends_with_the_same_average(
    pretrain, averaged, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(stage2_pretrain, "save_model", full)
        outcome, folder = pretrain("full", "ema_decay=0.6")
        assert outcome.status == 1
        assert (folder.with_name("full.partial") / "trainer" / "checkpoint-8" / "average.pt").is_file()
    assert pretrain("full", "ema_decay=0.6")[0].status == 0
    assert weights(folder) == weights(averaged)


# --- what is recorded and planned ---


def test_a_record_names_the_decay_only_where_there_is_one():
    assert "ema_decay" not in training_settings(TrainingConfig())
    assert training_settings(TrainingConfig(ema_decay=0.9))["ema_decay"] == 0.9


def test_the_plan_counts_the_average(make_model):
    values = {
        "batch_size": 2,
        "length": 16,
        "labelled": 15,
        "padded": False,
        "bf16": False,
        "accumulation": 1,
    }
    student = Blueprint(config_text(make_model("llama").config))
    plain, averaged = (
        step_memory(TrainingStep(student=student, averaged=a, **values)) for a in (False, True)
    )
    assert averaged.optimizer - plain.optimizer == averaged.peak - plain.peak == plain.weights
