"""A BitNet v2 from scratch on the command line: what it starts from, what is saved, its twin, and a resume."""

import json
from pathlib import Path

import pytest
import torch
from pair import STOPPED, stopped_at
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bitdistill.train.objective import LanguageModelling

BASE = """
[base]
architecture = "bitnet_v2"
precision = "fp32"
tokens = 512  # 8 steps
batch_size = 4
vocab_size = 280
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
initializer_range = 0.2
learning_rate = 1e-2
schedule = "two_stage"
weight_decay = 0.1
weight_decay_schedule = "half_then_zero"
int4_activations_ratio = 0.3  # the last 3 steps
log_every = 1
save_every = 3
"""


@pytest.fixture(scope="module")
def recipe(project, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("v2")
    lines = project.read_text(encoding="utf-8").replace(f"{project.parent}/runs", f"{folder}/runs")
    path = folder / "recipe.toml"
    path.write_text(lines + BASE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(cli, recipe) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """The checkpoint, and the weights that each step computed with."""
    seen: list[dict[str, torch.Tensor]] = []
    forward = LanguageModelling.forward

    def record(self, totals, **batch):
        seen.append({name: p.detach().clone() for name, p in self.student.named_parameters()})
        return forward(self, totals, **batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelling, "forward", record)
        outcome = cli("base", recipe)
    assert outcome.status == 0, outcome.err
    return recipe.parent / "runs" / "small" / "base", seen


def test_it_is_a_llamas_student_with_blocks_and_4_bits(base):
    config = json.loads((base[0] / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bit_llama", ["BitLlamaForCausalLM"])
    assert config["ternary"]["hadamard"] == {"o_proj": 32, "down_proj": 16}
    assert (config["ternary"]["activation_bits"], config["ternary"]["norm_sites"]) == (4, "subln")
    assert (base[0] / "hadamard.py").is_file()


def test_the_transform_is_not_folded_into_random_weights(base):
    folder, seen = base
    blank = load_file(folder.parent / "base-blank" / "model.safetensors")
    assert len(seen) == 8
    for name, tensor in blank.items():
        assert torch.equal(seen[0][name], tensor), name
    assert {n for n in seen[0] if n not in blank} == {
        f"model.layers.{layer}.{path}.norm.weight"
        for layer in (0, 1)
        for path in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_its_loss_falls(base):
    lines = [json.loads(line) for line in (base[0] / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2


def test_the_twin_is_a_llama_with_the_same_start(cli, recipe, base):
    output = recipe.parent / "dense"
    outcome = cli("base", recipe, "--output", output, "--set", "base.ternary=false")
    assert outcome.status == 0, outcome.err
    assert type(AutoModelForCausalLM.from_pretrained(output)) is LlamaForCausalLM
    sources = [json.loads((f / "run.json").read_text())["settings"]["source"] for f in (base[0], output)]
    assert sources[0] == sources[1]


def test_a_run_that_was_stopped_before_and_behind_the_switch_ends_the_same(cli, recipe, base):
    output = recipe.parent / "stopped"
    for stop in (4, 7):  # the checkpoints are of steps 3 and 6; the switch is before step 6
        with stopped_at(stop):
            assert cli("base", recipe, "--output", output).status == STOPPED
    assert cli("base", recipe, "--output", output).status == 0
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (base[0] / name).read_bytes(), name


def test_a_run_that_converts_refuses_it(cli, recipe):
    outcome = cli("run", recipe, "--dry-run")
    assert outcome.status == 1
    assert 'base.architecture = "bitnet_v2"' in outcome.err
