"""Native BitNet b1.58: transformers alone loads, runs and would train the same model; the twin differs in nothing else.

The oracle is transformers' own BitNet, whose linears (``AutoBitLinear``) and straight-through estimator are not ours.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from bitdistill import Engine
from bitdistill.evaluate import TorchScorer
from bitdistill.export import export
from bitdistill.model import BitLinear
from bitdistill.pipeline import heldout_sequences
from bitdistill.recipe import load_recipe
from bitdistill.train.callbacks import MetricsFile
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.objective import LanguageModelling

BASE = """
[base]
architecture = "bitnet"
precision = "fp32"
tokens = 1024  # 16 steps
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
schedule = "two_stage_cosine"
two_stage_drop = 0.3
weight_decay = 0.1
weight_decay_schedule = "cosine_then_zero"
log_every = 3
eval_every = 4
save_every = 5
"""
LINEARS = 7 * 2


@pytest.fixture(scope="module")
def recipe(project, tmp_path_factory) -> Path:
    """The small project with enough documents to hold some out, and a native base."""
    folder = tmp_path_factory.mktemp("native")
    text = (project.parent / "prose.jsonl").read_text(encoding="utf-8")
    (folder / "prose.jsonl").write_text(text * 6, encoding="utf-8")
    lines = project.read_text(encoding="utf-8").replace(
        f"{project.parent}/prose.jsonl", f"{folder}/prose.jsonl"
    )
    path = folder / "recipe.toml"
    path.write_text(lines.replace(f"{project.parent}/runs", f"{folder}/runs") + BASE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def twins(cli, recipe) -> dict[str, tuple[Path, torch.Tensor]]:
    """The native model and its full-precision twin: checkpoint, and the token ids ``[steps, B, T]`` they were fed."""
    found = {}
    runs = recipe.parent / "runs" / "small"
    forward = LanguageModelling.forward
    for name, more in (("base", ()), ("dense", ("--output", runs / "dense", "--set", "base.ternary=false"))):
        seen: list[torch.Tensor] = []

        def record(self, totals, seen=seen, **batch):
            if self.training:
                seen.append(batch["input_ids"])
            return forward(self, totals, **batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModelling, "forward", record)
            outcome = cli("base", recipe, *more)
        assert outcome.status == 0, outcome.err
        found[name] = (runs / name, torch.stack(seen))
    return found


@pytest.fixture(scope="module")
def native(twins) -> Path:
    return twins["base"][0]


@pytest.fixture(autouse=True)
def _eager():
    """transformers compiles its quantisers; what they compute is the same without a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stock(folder: Path) -> BitNetForCausalLM:
    """The checkpoint as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    modules = {type(m).__module__.partition(".")[0] for m in model.modules()}
    assert "bitdistill" not in modules
    return model


def log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def test_transformers_loads_it_with_equal_logits_to_the_last_bit(native, twins):
    ids = twins["base"][1][0]
    theirs, ours = stock(native).eval(), load_model(native).eval()
    assert sum(isinstance(m, AutoBitLinear) for m in theirs.modules()) == LINEARS
    assert sum(isinstance(m, BitLinear) for m in ours.modules()) == LINEARS
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_gradients_are_those_of_transformers_own_straight_through_estimator(native, twins):
    ids = twins["base"][1][0]
    theirs, ours = stock(native).train(), load_model(native).train()
    theirs(ids, labels=ids).loss.backward()
    totals = torch.tensor([ids[:, 1:].numel()])
    LanguageModelling(ours)(totals=totals, input_ids=ids, labels=ids)["loss"].backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert any(grad.abs().max() > 1e-3 for name, grad in expected.items() if "q_proj" in name)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_config_and_tensors_are_laid_out_as_in_the_published_checkpoint(native):
    config = json.loads((native / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bitnet", ["BitNetForCausalLM"])
    assert config["hidden_act"] == "relu2"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitnet"
    assert quantization["linear_class"] == "autobitlinear"
    assert quantization["quantization_mode"] == "online"
    assert not {"auto_map", "ternary"} & config.keys()
    assert not list(native.glob("*.py"))
    tensors = load_file(native / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors.keys() == stock(native).state_dict().keys() - {"lm_head.weight"}


def test_twins_start_from_the_same_weights_and_read_the_same_tokens(twins, native, tmp_path):
    records = {
        name: json.loads((folder / "run.json").read_text())["settings"] for name, (folder, _) in twins.items()
    }
    assert records["base"]["source"] == records["dense"]["source"]
    assert torch.equal(twins["base"][1], twins["dense"][1])
    differing = {k for k, v in records["base"]["training"].items() if records["dense"]["training"][k] != v}
    assert differing == {"ternary"}
    # The first loss of each is that of transformers on the untrained model, quantised and not.
    ids, blank = twins["base"][1][0], native.with_name("base-blank")
    assert "quantization_config" not in json.loads((blank / "config.json").read_text())
    shutil.copytree(blank, tmp_path / "quantised")
    shutil.copy(native / "config.json", tmp_path / "quantised")
    for name, folder in (("dense", blank), ("base", tmp_path / "quantised")):
        with torch.no_grad():
            expected = float(stock(folder)(ids, labels=ids).loss)
        assert log(twins[name][0])[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert log(twins["base"][0])[0]["loss"] != log(twins["dense"][0])[0]["loss"]
    assert type(load_model(twins["dense"][0]).model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_heldout_losses_come_at_their_steps_and_are_those_of_transformers(twins, recipe):
    for name, (folder, _) in twins.items():
        lines = log(folder)
        assert [line["step"] for line in lines if "heldout/loss" in line] == [4, 8, 12, 16]
        assert [line["step"] for line in lines] == [1, 3, 4, 6, 8, 9, 12, 15, 16]
        tokenizer = load_tokenizer(folder)
        sequences = heldout_sequences(load_recipe(recipe), tokenizer)
        assert 2 < len(sequences) <= 128
        rows = torch.stack([sequences[i]["input_ids"] for i in range(len(sequences))])
        model = stock(folder).eval()
        with torch.no_grad():
            expected = float(model(rows, labels=rows).loss)
        assert lines[-1]["heldout/loss"] == pytest.approx(expected, rel=1e-5), name
        ours = TorchScorer(load_model(folder), tokenizer).perplexity(sequences)
        assert np.log(ours) == pytest.approx(expected, rel=1e-5)


def test_the_verb_prints_the_perplexity_it_recorded(cli, native, recipe):
    outcome = cli("base", recipe)  # done: nothing is trained again
    assert outcome.status == 0, outcome.err
    loss = json.loads((native / "run.json").read_text())["metrics"]["heldout/loss"]
    assert f"held-out perplexity {np.exp(loss):.2f}" in outcome.out


def test_a_killed_run_ends_with_the_same_weights_and_the_same_log(cli, recipe, native, tmp_path, monkeypatch):
    on_log = MetricsFile.on_log

    def stop(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 12:
            raise KeyboardInterrupt

    command = ("base", recipe, "--output", tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_log", stop)
        assert cli(*command).status != 0
    assert (tmp_path / "again.partial" / "trainer" / "checkpoint-10").is_dir()
    assert cli(*command).status == 0
    left, right = (load_file(folder / "model.safetensors") for folder in (native, tmp_path / "again"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    # The step that the kill fell between two lines of is averaged over fewer steps; held-out losses do not care.
    heldout = [[line for line in log(f) if "heldout/loss" in line] for f in (native, tmp_path / "again")]
    assert [h["heldout/loss"] for h in heldout[0]] == [h["heldout/loss"] for h in heldout[1]]


def test_a_native_model_is_fine_tuned_evaluated_and_inspected_as_a_student(cli, recipe, native, tmp_path):
    assert cli("sft", recipe, "--source", native, "--output", tmp_path / "tuned").status == 0
    before, after = (
        load_file(native / "model.safetensors"),
        load_file(tmp_path / "tuned" / "model.safetensors"),
    )
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("q_proj" in name for name in moved)
    assert any("ffn_sub_norm" in name for name in moved)
    assert sum(isinstance(m, AutoBitLinear) for m in stock(tmp_path / "tuned").modules()) == LINEARS
    lines = log(tmp_path / "tuned")
    assert all("quant/flip_rate" in line for line in lines)
    assert cli("eval", recipe, tmp_path / "tuned", "--json", tmp_path / "eval.json").status == 0
    assert json.loads((tmp_path / "eval.json").read_text())["items"] == 18
    assert cli("inspect", native, "--json", tmp_path / "facts.json").status == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["ternary_linears"], facts["sub_norms"]) == (LINEARS, 4)
    weights = [m.weight.numel() for m in stock(native).modules() if isinstance(m, AutoBitLinear)]
    assert facts["ternary_parameters"] == sum(weights)
    weight_stats = json.loads((native / "weights.json").read_text())
    assert weight_stats["flip_rate"] > 0


def test_a_native_model_learns_from_its_twin(cli, recipe, twins, tmp_path):
    teacher, source = twins["dense"][0], twins["base"][0]
    outcome = cli("distill", recipe, "--source", source, "--teacher", teacher, "--output", tmp_path / "new")
    assert outcome.status == 0, outcome.err
    assert sum(isinstance(m, AutoBitLinear) for m in stock(tmp_path / "new").modules()) == LINEARS
    assert all(line["loss/relation_kd"] > 0 for line in log(tmp_path / "new"))


def test_pre_training_goes_on_from_a_native_checkpoint(cli, recipe, native, tmp_path):
    path = tmp_path / "more.toml"
    text = recipe.read_text().replace(BASE, "")
    path.write_text(
        f'{text}\n[base]\ncontinue_from = "{native}"\ntokens = 128\nbatch_size = 4\nlearning_rate = 1e-4\n'
    )
    assert cli("base", path, "--output", tmp_path / "more").status == 0
    model = stock(tmp_path / "more")
    assert sum(isinstance(m, AutoBitLinear) for m in model.modules()) == LINEARS
    first = log(tmp_path / "more")[0]["loss"]
    assert first < log(native)[0]["loss"] - 0.5  # it went on; it did not begin again


def test_a_base_of_another_architecture_is_that_of_transformers(cli, recipe, tmp_path):
    outcome = cli(
        "base", recipe, "--output", tmp_path / "llama", "--set", "base.architecture=llama",
        "--set", "base.tokens=64", "--set", "base.eval_every=0", "--set", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (
        json.loads((tmp_path / "llama" / "run.json").read_text())["settings"]["training"]["ternary"] is False
    )


def test_the_tokenizer_can_be_someone_elses(cli, recipe, native, llama, tmp_path):
    outcome = cli(
        "base", recipe, "--output", tmp_path / "base", "--set", f"base.tokenizer={llama}",
        "--set", "base.tokens=64", "--set", "base.vocab_size=8192", "--set", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    theirs = load_tokenizer(llama)
    assert load_tokenizer(tmp_path / "base").get_vocab() == theirs.get_vocab()
    assert load_model(tmp_path / "base").config.vocab_size == len(theirs)


def test_the_engine_writes_what_transformers_writes(native, tmp_path):
    facts = export(native, tmp_path / "packed", head="f32")
    assert (
        json.loads((tmp_path / "packed" / "config.json").read_text())["packed"]["activation_rounding"]
        == "multiply"
    )
    assert facts["bytes"] < sum(t.numel() * 4 for t in load_file(native / "model.safetensors").values())
    model, tokenizer = stock(native).eval(), load_tokenizer(native)
    engine = Engine(tmp_path / "packed", kv_cache="fp32")
    for prompt in ("the soup was", "the view seemed not", "the host"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, length:].tolist()
        tokens = list(engine.generate(prompt, max_new_tokens=16).tokens)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) >= 3


def test_the_twin_is_not_exported(cli, twins, tmp_path):
    outcome = cli("export", twins["dense"][0], tmp_path / "packed")
    assert outcome.status == 1
    assert "full-precision twin" in outcome.err


def test_a_checkpoint_that_holds_more_than_its_config_says_is_refused(cli, native, tmp_path):
    """Scales beside the weights: trits that online quantisation would take for latents."""
    shutil.copytree(native, tmp_path / "bitnet")
    tensors = load_file(native / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "bitnet" / "model.safetensors", metadata={"format": "pt"})
    outcome = cli("inspect", tmp_path / "bitnet")
    assert outcome.status == 1
    assert "model.layers.0.mlp.up_proj.weight_scale has no place in the model" in outcome.err


def test_a_recipe_without_a_base_is_told_so(cli, project, tmp_path):
    outcome = cli("base", project, "--output", tmp_path / "x")
    assert outcome.status == 1
    assert "no [base] section" in outcome.err


@pytest.mark.parametrize("which", ["base", "dense"])
def test_refine_refuses_it_with_the_remedy(cli, recipe, twins, tmp_path, which):
    outcome = cli("refine", recipe, "--source", twins[which][0], "--output", tmp_path / "x")
    assert outcome.status == 1
    assert "this model is a BitNet" in outcome.err
    assert "bitdistill base" in outcome.err
    assert not (tmp_path / "x").exists()


def test_run_refuses_it_before_anything_is_trained(cli, recipe, tmp_path):
    outcome = cli("run", recipe, "--set", f"output_dir={tmp_path}")
    assert outcome.status == 1
    assert 'base.architecture = "bitnet"' in outcome.err
    assert not list(tmp_path.rglob("run.json"))
