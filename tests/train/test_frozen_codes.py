"""The tail of a training in which ternary weights keep their codes: what moves, how far, and after a resume."""

import pytest
import torch
from pair import STOPPED, stopped_at
from safetensors.torch import load_file
from training import train, weights_of

from bitdistill.config import TrainingConfig
from bitdistill.model import TernarySpec
from bitdistill.train.schedule import codes_are_frozen
from bitdistill.train.surgery import refine
from bitdistill.train.trainer import training_settings


def ternary(make_model, scale="absmean"):
    """A student with biases, which are free, beside norms and the tied embedding."""
    return refine(make_model("qwen2"), TernarySpec(scale=scale))[0]


def is_latent(name: str) -> bool:
    return name.endswith(("_proj.weight", ".weight_scale"))


def codes(weights: dict) -> dict:
    """By their definition, with the learned scale where there is one."""
    found = {}
    for name in (n for n in weights if n.endswith("_proj.weight")):
        scale = weights.get(name.replace(".weight", ".weight_scale"), weights[name].abs().mean())
        found[name] = (weights[name] / scale).round().clamp(-1, 1)
    return found


@pytest.mark.parametrize(("ratio", "frozen"), [(0.0, 0), (0.25, 2), (0.3, 3), (0.01, 1), (0.99, 8)])
def test_the_tail_is_that_share_of_the_steps_rounded_up(ratio, frozen):
    config = TrainingConfig(freeze_codes_ratio=ratio)
    assert [codes_are_frozen(config, step, 8) for step in range(8)] == [False] * (8 - frozen) + [
        True
    ] * frozen


def test_a_record_names_the_tail_only_where_there_is_one():
    """A step that was made before there was such a key is the same step."""
    keys = {"freeze_codes_ratio", "freeze_codes_lr"}
    assert not keys & set(training_settings(TrainingConfig()))
    found = training_settings(TrainingConfig(freeze_codes_ratio=0.25, freeze_codes_lr=0.5))
    assert {key: found[key] for key in keys} == {"freeze_codes_ratio": 0.25, "freeze_codes_lr": 0.5}


@pytest.mark.parametrize("scale", ["absmean", "learned"])
def test_in_the_tail_codes_stay_to_the_bit_and_everything_else_moves(make_model, tokenizer, tmp_path, scale):
    """A weight decay that would show, and a checkpoint where the tail begins."""
    model = ternary(make_model, scale)
    start = weights_of(model)
    settings = {"freeze_codes_ratio": 0.5, "weight_decay": 0.5, "save_every": 4}
    end = train(model, tokenizer, tmp_path, steps=8, **settings)
    middle = load_file(tmp_path / "trainer" / "checkpoint-4" / "model.safetensors")
    names = {name for name in end if is_latent(name)}
    assert len(names) == (14 if scale == "absmean" else 28)
    assert any(name.endswith("bias") for name in end)
    for name, weight in end.items():
        assert not torch.equal(middle[name], start[name]), name
        assert torch.equal(weight, middle[name]) == (name in names), name
    before, held, after = codes(start), codes(middle), codes(end)
    assert sum(int((before[name] != held[name]).sum()) for name in held) > 20
    assert all(torch.equal(held[name], after[name]) for name in held)


def test_the_rest_learns_at_the_lower_rate(make_model, tokenizer, tmp_path):
    """One step of AdamW is linear in the learning rate: that of the tail, here the last, is a quarter as long."""
    before = train(ternary(make_model), tokenizer, tmp_path / "before", steps=2)
    moves = {}
    for rate in (1.0, 0.25):
        settings = {"freeze_codes_ratio": 0.01, "freeze_codes_lr": rate}
        after = train(ternary(make_model), tokenizer, tmp_path / str(rate), steps=3, **settings)
        moves[rate] = {name: after[name] - before[name] for name in after if not is_latent(name)}
    for name, move in moves[1.0].items():
        assert move.abs().max() > 1e-4, name
        torch.testing.assert_close(moves[0.25][name], move / 4, rtol=1e-3, atol=1e-6, msg=name)


def test_a_full_precision_model_has_no_tail(make_model, tokenizer, tmp_path):
    tail = {"freeze_codes_ratio": 0.5, "freeze_codes_lr": 0.1}
    with_tail = train(make_model("qwen2"), tokenizer, tmp_path / "with", steps=4, **tail)
    without = train(make_model("qwen2"), tokenizer, tmp_path / "without", steps=4)
    assert all(torch.equal(with_tail[name], without[name]) for name in without)


def test_a_step_that_was_stopped_ends_with_the_same_weights(cli, project, student, tmp_path):
    """Eight steps, the last four of them frozen; stopped before the tail and again in it."""
    settings = ("freeze_codes_ratio=0.5", "freeze_codes_lr=0.5", "save_every=3")
    changes = [word for setting in settings for word in ("--set", f"pretrain.{setting}")]

    def pretrain(name):
        return cli("pretrain", project, "--source", student, "--output", tmp_path / name, *changes)

    assert pretrain("whole").status == 0
    for stop in (5, 7):  # the checkpoints are of steps 3 and 6
        with stopped_at(stop):
            assert pretrain("stopped").status == STOPPED
    assert pretrain("stopped").status == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
