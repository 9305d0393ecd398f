"""Activations of 8 bits, then of 4 in the same training: when, with what optimizer state, and what is saved."""

import json
from fractions import Fraction

import pytest
import torch
from pair import STOPPED, stopped_at
from safetensors.torch import load_file
from training import train

from bitdistill.config import TrainingConfig
from bitdistill.errors import TrainingError
from bitdistill.model import BitLinear, TernarySpec
from bitdistill.pipeline import Method
from bitdistill.recipe import build_recipe
from bitdistill.train.native import make_native
from bitdistill.train.objective import LanguageModelling
from bitdistill.train.schedule import activations_are_int4
from bitdistill.train.surgery import refine
from bitdistill.train.trainer import training_settings

SPEC = TernarySpec(hadamard={"o_proj": 0, "down_proj": 0})


def bits_of(model: torch.nn.Module) -> set[int]:
    return {m.spec.activation_bits for m in model.modules() if isinstance(m, BitLinear)}


@pytest.mark.parametrize(("ratio", "last"), [(0.0, 0), (0.05, 1), (0.25, 2), (0.3, 3), (1.0, 8)])
def test_the_tail_is_that_share_of_the_steps_rounded_up(ratio, last):
    config = TrainingConfig(int4_activations_ratio=ratio)
    assert [activations_are_int4(config, step, 8) for step in range(8)] == [False] * (8 - last) + [
        True
    ] * last


@pytest.mark.parametrize(("ratio", "steps"), [(0.07, 100), (0.07, 300), (0.55, 100)])
def test_a_whole_number_of_steps_is_not_rounded_up(ratio, steps):
    config = TrainingConfig(int4_activations_ratio=ratio)
    int4 = [activations_are_int4(config, step, steps) for step in range(steps)]
    assert sum(int4) == Fraction(str(ratio)) * steps


def test_a_record_names_it_only_where_there_is_one():
    """A step that was made before there was such a key is the same step."""
    assert "int4_activations_ratio" not in training_settings(TrainingConfig())
    assert training_settings(TrainingConfig(int4_activations_ratio=0.05))["int4_activations_ratio"] == 0.05


@pytest.fixture(scope="module")
def switched(make_model, tokenizer, tmp_path_factory):
    """Five steps, the last with 4 bits: the folder, the student, bits and batch of every step, and its weights."""
    folder = tmp_path_factory.mktemp("int4")
    student, seen = refine(make_model("llama"), SPEC)[0], []
    forward = LanguageModelling.forward

    def record(self, totals, **batch):
        seen.append((bits_of(self.student), totals, batch))
        return forward(self, totals, **batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelling, "forward", record)
        settings = {"weight_decay": 0.1, "max_grad_norm": 0.0, "save_every": 4, "learning_rate": 1e-3}
        weights = train(student, tokenizer, folder, steps=5, int4_activations_ratio=0.2, **settings)
    return folder, student, seen, weights


def test_the_last_share_computes_with_4_bits_and_is_saved_so(switched):
    folder, student, seen, _ = switched
    assert [bits for bits, _, _ in seen] == [{8}, {8}, {8}, {8}, {4}]
    assert (bits_of(student), student.config.ternary["activation_bits"]) == ({4}, 4)
    before, after = (
        json.loads((folder / "trainer" / f"checkpoint-{n}" / "config.json").read_text())["ternary"]
        for n in (4, 5)
    )
    assert (before["activation_bits"], after["activation_bits"]) == (8, 4)
    assert before | {"activation_bits": 4} == after
    assert after["hadamard"] == {"o_proj": 32, "down_proj": 16}


def test_the_step_behind_the_switch_is_adamw_with_the_state_from_before_it(switched, make_model):
    """AdamW by its formula, on the gradient of a 4-bit student at the weights of the 8-bit checkpoint."""
    folder, _, seen, weights = switched
    checkpoint = folder / "trainer" / "checkpoint-4"
    four_bit = refine(make_model("llama"), TernarySpec(activation_bits=4, hadamard=SPEC.hadamard))[0].train()
    four_bit.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    four_bit.tie_weights()
    _, totals, batch = seen[4]
    LanguageModelling(four_bit)(totals, **batch)["loss"].backward()
    state = torch.load(checkpoint / "optimizer.pt")["state"]
    named = dict(four_bit.named_parameters())
    order = [n for n in named if named[n].ndim == 2] + [n for n in named if named[n].ndim == 1]
    for index, name in enumerate(order):
        old, gradient = named[name].detach(), named[name].grad
        first = 0.9 * state[index]["exp_avg"] + 0.1 * gradient
        second = 0.95 * state[index]["exp_avg_sq"] + 0.05 * gradient**2
        step = (first / (1 - 0.9**5)) / ((second / (1 - 0.95**5)).sqrt() + 1e-8)
        decay = 0.1 if named[name].ndim == 2 else 0.0
        torch.testing.assert_close(
            weights[name], old - 1e-3 * (step + decay * old), rtol=1e-4, atol=2e-6, msg=name
        )


def test_a_full_precision_model_has_no_activation_bits(make_model, tokenizer, tmp_path):
    with_tail = train(make_model("llama"), tokenizer, tmp_path / "with", steps=2, int4_activations_ratio=0.5)
    without = train(make_model("llama"), tokenizer, tmp_path / "without", steps=2)
    assert all(torch.equal(with_tail[name], without[name]) for name in without)


def test_what_has_no_use_for_it_is_refused(make_model, tokenizer, tmp_path):
    from transformers import BitNetConfig, BitNetForCausalLM

    four_bit = refine(make_model("llama"), TernarySpec(activation_bits=4))[0]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    native = make_native(BitNetForCausalLM(BitNetConfig(vocab_size=300, num_key_value_heads=2, **shape)))
    for model, message in ((four_bit, "4-bit activations in all steps already"), (native, '"bitnet_v2"')):
        with pytest.raises(TrainingError, match=message):
            train(model, tokenizer, tmp_path, steps=2, int4_activations_ratio=0.5)


def test_a_step_that_was_stopped_ends_with_the_same_weights(cli, project, student, tmp_path):
    """Eight steps, the last four with 4 bits; stopped before the switch and again behind it."""
    settings = ("int4_activations_ratio=0.5", "save_every=3")
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
    configs = [(tmp_path / name / "config.json").read_text() for name in ("whole", "stopped")]
    assert configs[0] == configs[1]
    assert json.loads(configs[0])["ternary"]["activation_bits"] == 4


def test_a_fine_tune_behind_a_stage_2_that_switched_has_nothing_to_switch():
    """BitNet-SFT has no stage 2 and switches by itself; so does a BitDistill without one."""
    ratios = {"pretrain": {"int4_activations_ratio": 0.05}, "sft": {"int4_activations_ratio": 1.0}}
    methods = ["bitnet_sft", "bitdistill", "bitdistill:no_distill", "bitdistill:no_pretrain"]
    recipe = build_recipe(
        {"name": "x", **ratios, "distill": {"int4_activations_ratio": 0.5}, "run": {"methods": methods}}
    )

    def of(method: str) -> tuple[float, float]:
        _, tuned = Method(method).fine_tune(recipe, None, "teacher")
        return tuned.sft.int4_activations_ratio, tuned.distill.int4_activations_ratio

    assert [of(m) for m in methods] == [(1.0, 0.5), (0.0, 0.0), (0.0, 0.0), (1.0, 0.5)]
