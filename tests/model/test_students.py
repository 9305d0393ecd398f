"""Student classes: which modules change, that the maths is the dense model's with quantised linears, and
that a checkpoint gives the same logits with the package, and without it through ``trust_remote_code``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import FAMILY_NAMES, PECULIARITIES, dense_classes, families
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

import bitdistill.model
from bitdistill.model import STUDENT_CLASSES, BitLinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
IN_FEATURES = {
    "q_proj": 48,
    "k_proj": 48,
    "v_proj": 48,
    "o_proj": 64,
    "gate_proj": 48,
    "up_proj": 48,
    "down_proj": 80,
}
SITES = {"none": (), "subln": ("o_proj", "down_proj"), "all": ATTENTION + FEED_FORWARD}
# Attention linears with a bias where the config says attention_bias; the other families have no such switch.
BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj"), "mistral": ()}


def geometry(family: str, **changes: object) -> dict[str, object]:
    """Grouped-query attention whose heads are wider than the residual stream: 4 x 16 = 64, not 48."""
    return {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        # Wide enough that logits differ by more than rounding noise.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": family != "llama",
        **PECULIARITIES.get(family, {}),
        **changes,
    }


def make_student(family: str, ternary: dict[str, object] | None = None, **changes: object) -> PreTrainedModel:
    """A random student in evaluation mode whose norm gains and biases are not at their neutral start."""
    config_class, model_class = STUDENT_CLASSES[family]
    torch.manual_seed(1)
    student = model_class(config_class(ternary=ternary, **geometry(family, **changes))).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("weight_scale"):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return student


def make_dense(student: PreTrainedModel, family: str, **changes: object) -> PreTrainedModel:
    """The family's own full-precision model with the student's latent weights, embeddings and norms."""
    config_class, model_class = dense_classes(family)
    dense = model_class(config_class(**geometry(family, **changes))).eval()
    state = {
        name: value for name, value in student.state_dict().items() if not name.endswith("proj.norm.weight")
    }
    dense.load_state_dict(state, strict=True)
    return dense


def some_ids(batch: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 101, (batch, tokens), generator=torch.Generator().manual_seed(2))


# --- which modules change ---


@families
def test_all_seven_linears_of_every_layer_turn_ternary_and_nothing_else(family):
    student = make_student(family)
    ternary = {name for name, module in student.named_modules() if isinstance(module, BitLinear)}
    assert ternary == {
        f"model.layers.{layer}.{block}.{name}"
        for layer in range(2)
        for block, names in (("self_attn", ATTENTION), ("mlp", FEED_FORWARD))
        for name in names
    }
    assert type(student.lm_head) is nn.Linear
    assert type(student.model.embed_tokens) is type(make_dense(student, family).model.embed_tokens)


@families
@pytest.mark.parametrize("norm_sites", ["none", "subln", "all"])
def test_norms_are_children_of_the_linears_that_the_layout_names(family, norm_sites):
    student = make_student(family, {"norm_sites": norm_sites})
    dense = make_dense(student, family)
    added = {
        name: tuple(value.shape)
        for name, value in student.state_dict().items()
        if name not in dense.state_dict()
    }
    assert added == {
        f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}.norm.weight": (
            IN_FEATURES[name],
        )
        for layer in range(2)
        for name in SITES[norm_sites]
    }
    # Nothing was renamed or dropped, so a dense checkpoint's tensors all have a place in the student.
    assert set(dense.state_dict()) <= set(student.state_dict())


@families
def test_norm_epsilon_is_the_familys(family):
    student = make_student(family, rms_norm_eps=3e-4)
    assert student.model.layers[1].mlp.down_proj.norm.eps == 3e-4


def test_skip_patterns_keep_linears_in_full_precision():
    student = make_student("qwen3", {"skip": ["model.layers.0.*", "*.v_proj"]})
    ternary = {name for name, module in student.named_modules() if isinstance(module, BitLinear)}
    assert {name.split(".")[2] for name in ternary} == {"1"}
    assert {name.rpartition(".")[2] for name in ternary} == set(IN_FEATURES) - {"v_proj"}
    assert type(student.model.layers[0].mlp.up_proj) is nn.Linear


def test_skipping_every_linear_is_an_error_that_names_the_patterns():
    with pytest.raises(ValueError, match=r"no linear named .*q_proj.* nothing would change.*\['\*'\]"):
        make_student("llama", {"skip": ["*"]})


def test_impossible_ternary_settings_in_a_config_are_refused():
    config_class, _ = STUDENT_CLASSES["llama"]
    with pytest.raises(ValueError, match=r"ternary\.activation_bits = 3"):
        config_class(ternary={"activation_bits": 3})


@families
def test_biases_of_the_family_stay_in_the_ternary_linears(family):
    attention = make_student(family, attention_bias=True).model.layers[0].self_attn
    rows = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 48}
    biased = BIASED.get(family, ATTENTION)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters() if name.endswith("bias")}
    assert shapes == {f"{name}.bias": (rows[name],) for name in biased}
    assert make_student(family).model.layers[0].self_attn.o_proj.bias is None


@families
def test_fresh_student_is_drawn_like_its_family(family):
    config_class, model_class = STUDENT_CLASSES[family]
    changes = {"hidden_size": 256, "initializer_range": 0.05, "attention_bias": True}
    student = model_class(config_class(**geometry(family, **changes)))
    layer = student.model.layers[0]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert layer.mlp.down_proj.norm.weight.tolist() == [1.0] * 80
    biases = [value for name, value in layer.self_attn.named_parameters() if name.endswith("bias")]
    assert len(biases) == len(BIASED.get(family, ATTENTION))
    assert not any(bias.any() for bias in biases)


@families
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_where_the_config_says_so(family, tied, tmp_path):
    student = make_student(family, tie_word_embeddings=tied)
    student.save_pretrained(tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


# --- forward pass ---


def ternary_reference(latent: np.ndarray) -> np.ndarray:
    """``code * scale`` per tensor, the mean taken in float64."""
    scale = np.float32(np.abs(latent.astype(np.float64)).mean())
    return np.clip(np.rint(latent / scale), -1, 1).astype(np.float32) * scale


def input_reference(x: torch.Tensor, gain: torch.Tensor | None, eps: float, bits: int) -> torch.Tensor:
    """What a ternary linear multiplies with: normed where it has a gain, then quantised per token.

    In fp32 like the student, for beside a rounding boundary a last bit that differs becomes a whole step
    of the code. The float64 references of each part are in test_quant and test_layers.
    """
    if gain is not None:
        x = nn.functional.rms_norm(x, gain.shape, gain, eps)
    if bits == 8:
        step = x.abs().max(dim=-1, keepdim=True).values / 127
        return torch.clip(torch.round(x / step), -128, 127) * step
    if bits == 4:
        step = x.abs().mean(dim=-1, keepdim=True) / 7**0.5
        return torch.clip(torch.round(x / step), -8, 7) * step
    return x


@families
@pytest.mark.parametrize("activation_bits", [8, 4, 16])
@pytest.mark.parametrize("norm_sites", ["none", "subln", "all"])
def test_student_is_the_dense_model_with_quantised_linears(family, norm_sites, activation_bits):
    ternary = {"norm_sites": norm_sites, "activation_bits": activation_bits}
    student = make_student(family, ternary, attention_bias=True)
    with torch.no_grad():
        for name in student.state_dict():
            if name.endswith("proj.weight"):
                # On a grid of 1/1024 every sum of magnitudes is exact, whatever its order.
                latent = student.get_parameter(name)
                latent.copy_((latent * 1024).round() / 1024)
    dense = make_dense(student, family, attention_bias=True)
    latent_logits = dense(some_ids()).logits

    state, eps = student.state_dict(), student.config.rms_norm_eps
    for name, module in dense.named_modules():
        if name.rpartition(".")[2] not in IN_FEATURES:
            continue
        module.weight.data = torch.from_numpy(ternary_reference(state[f"{name}.weight"].numpy()))
        gain = state.get(f"{name}.norm.weight")
        module.register_forward_pre_hook(
            lambda _, arguments, gain=gain: input_reference(arguments[0], gain, eps, activation_bits)
        )

    logits = student(some_ids()).logits
    torch.testing.assert_close(logits, dense(some_ids()).logits, rtol=1e-5, atol=1e-5)
    # The latent model is another function: the comparison above is not of two untouched models.
    assert (logits - latent_logits).abs().max() > 0.1


@families
def test_weights_that_are_ternary_without_zeros_are_their_own_quantisation(family):
    # |w| = 2^-3 everywhere: the absmean is exact, so codes and scale say exactly what the latents say.
    student = make_student(family, {"norm_sites": "none", "activation_bits": 16})
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, BitLinear):
                module.weight.copy_(torch.randn_like(module.weight).sign() * 0.125)
    dense = make_dense(student, family)
    assert torch.equal(student(some_ids()).logits, dense(some_ids()).logits)


@families
def test_skipped_linears_compute_as_in_the_dense_model(family):
    skip = ["*.[kvo]_proj", "*.mlp.*", "model.layers.1.*"]
    student = make_student(family, {"skip": skip, "activation_bits": 16})
    dense = make_dense(student, family)
    name = "model.layers.0.self_attn.q_proj"
    weight = dense.get_submodule(name).weight
    weight.data = torch.from_numpy(ternary_reference(weight.detach().numpy()))
    torch.testing.assert_close(student(some_ids()).logits, dense(some_ids()).logits)


@families
def test_attention_reaches_as_far_back_as_the_family_looks(family):
    """Two Mistral layers with a window of 4 see 2 x 3 tokens back; elsewhere at least one layer sees everything."""
    student = make_student(family)
    other = some_ids()
    other[:, 0] = (other[:, 0] + 1) % 101
    differs = (student(other).logits != student(some_ids()).logits).any(dim=-1).any(dim=0)
    assert differs.tolist() == [True] * 7 + [family != "mistral"] * 2


def test_evaluation_ignores_the_warm_up_coefficient_and_training_obeys_it():
    student = make_student("qwen3", {"norm_sites": "none"})
    dense = make_dense(student, "qwen3")
    quantized = student(some_ids()).logits
    for module in student.modules():
        if isinstance(module, BitLinear):
            module.quant_lambda = 0.0
    assert torch.equal(student(some_ids()).logits, quantized)
    assert torch.equal(student.train()(some_ids()).logits, dense(some_ids()).logits)
    assert not torch.allclose(quantized, dense(some_ids()).logits)


@families
def test_every_parameter_gets_a_finite_gradient(family):
    student = make_student(family, {"norm_sites": "all"}, attention_bias=True).train()
    student(some_ids(), labels=some_ids()).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@families
@pytest.mark.parametrize("norm_sites", ["none", "subln", "all"])
def test_greedy_generation_with_cache_equals_the_argmax_of_whole_sequences(family, norm_sites):
    # Activations in 16 bits: INT8 codes beside a rounding boundary are the next test's matter.
    ternary = {"norm_sites": norm_sites, "activation_bits": 16}
    student = make_student(family, ternary, tie_word_embeddings=False)
    prompt = some_ids(batch=1, tokens=5)
    generated = student.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    ids = prompt
    for _ in range(12):
        logits = student(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert generated.tolist() == ids.tolist()
    assert len(set(generated[0, 5:].tolist())) > 1


@families
def test_cached_decoding_of_int8_activations_stays_within_a_step_of_the_whole_sequence(family):
    student = make_student(family, tie_word_embeddings=False)
    ids = some_ids(batch=1, tokens=16)
    whole = student(ids, use_cache=False).logits
    steps, cache = [], None
    for position in range(16):
        output = student(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    # A code on the other side of a rounding boundary moves logits of deviation 1.3 by a few hundredths.
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=0.2)
    assert whole.std() > 1


# --- checkpoints ---

CHECKPOINTS = {
    **{family: (family, {}, {}) for family in FAMILY_NAMES},
    "qwen3_subln_tied": ("qwen3", {"norm_sites": "subln"}, {"tie_word_embeddings": True}),
    "qwen3_int4_skip": (
        "qwen3",
        {"activation_bits": 4, "skip": ["model.layers.0.*"]},
        {"tie_word_embeddings": False},
    ),
    "qwen3_learned_block": ("qwen3", {"scale": "learned", "granularity": "block", "block_size": 20}, {}),
    "llama_all_bias": ("llama", {"norm_sites": "all"}, {"attention_bias": True, "mlp_bias": True}),
    "llama_hadamard": ("llama", {"hadamard": {"o_proj": 0, "down_proj": 4}, "activation_bits": 4}, {}),
    "gemma3_hadamard_all": ("gemma3_text", {"hadamard": {"down_proj": 0}, "norm_sites": "all"}, {}),
    "llama_dead_zone": ("llama", {"dead_zone_bias": 0.5}, {"attention_bias": True}),
    "llama_none_block": (
        "llama",
        {"norm_sites": "none", "granularity": "block", "block_size": 20},
        {"tie_word_embeddings": True},
    ),
}
checkpoints = pytest.mark.parametrize("name", sorted(CHECKPOINTS))


def make_checkpoint_student(name: str) -> PreTrainedModel:
    family, ternary, changes = CHECKPOINTS[name]
    return make_student(family, ternary, **changes)


@checkpoints
def test_reloaded_student_gives_the_same_logits_to_the_last_bit(name, tmp_path):
    student = make_checkpoint_student(name)
    student.save_pretrained(tmp_path)
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(reloaded) is STUDENT_CLASSES[CHECKPOINTS[name][0]][1]
    assert reloaded.config.ternary == student.config.ternary
    assert torch.equal(reloaded(some_ids()).logits, student(some_ids()).logits)


@families
def test_auto_classes_build_a_student_from_its_config(family, tmp_path):
    make_student(family).config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == f"bit_{family}"
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == f"Bit{dense_classes(family)[1].__name__}"
    assert isinstance(model.model.layers[0].self_attn.q_proj, BitLinear)


def test_the_code_beside_a_checkpoint_is_the_packages_own(tmp_path):
    make_student("qwen3").save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "students.BitQwen3Config",
        "AutoModelForCausalLM": "students.BitQwen3ForCausalLM",
    }
    source = Path(bitdistill.model.__file__).parent
    for name in ("students.py", "layers.py", "quant.py", "families.py", "hadamard.py"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()


def test_the_students_file_imports_every_file_that_must_travel_with_it():
    """transformers 5.0 to 5.9 copy the files that this one imports, and not what those import in turn."""
    folder = Path(bitdistill.model.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "students"}
    assert set(get_relative_imports(folder / "students.py")) == names


LOAD_WITHOUT_PACKAGE = """
import importlib.abc, json, sys


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitdistill":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
try:
    import bitdistill
except ModuleNotFoundError:
    pass
else:
    sys.exit("bitdistill can be imported: this process proves nothing")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
answers = {}
for folder in sys.argv[1:]:
    ids = load_file(f"{folder}/ids.safetensors")["ids"]
    refusals = []
    for trust in ({}, {"trust_remote_code": False}):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **trust)
            refusals.append(f"loaded as {type(model).__name__}")
        except ValueError as error:
            refusals.append(f"ValueError: {error}")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    save_file({"logits": model(ids).logits.detach()}, f"{folder}/logits.safetensors")
    generated = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    answers[folder] = {
        "refusals": refusals,
        "class": type(model).__name__,
        "generated": generated.tolist(),
    }
answers["imported"] = [name for name in sys.modules if name.partition(".")[0] == "bitdistill"]
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def without_package(tmp_path_factory) -> dict[str, dict]:
    """What a Python that cannot import bitdistill makes of every checkpoint; one process for all."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("without_package")
    script = root / "load.py"
    script.write_text(LOAD_WITHOUT_PACKAGE)
    folders = {}
    for name in CHECKPOINTS:
        folders[name] = root / name
        make_checkpoint_student(name).save_pretrained(folders[name])
        save_file({"ids": some_ids()}, folders[name] / "ids.safetensors")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules")}
    process = subprocess.run(
        [sys.executable, "-I", str(script), *map(str, folders.values())],
        cwd=root,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout.rpartition("ANSWERS")[2])
    assert answers["imported"] == []
    return {
        name: answers[str(folder)] | load_file(folder / "logits.safetensors")
        for name, folder in folders.items()
    }


@checkpoints
def test_without_the_package_trusted_code_gives_the_same_logits_to_the_last_bit(name, without_package):
    student = make_checkpoint_student(name)
    assert without_package[name]["class"] == type(student).__name__
    assert torch.equal(without_package[name]["logits"], student(some_ids()).logits)


@checkpoints
def test_without_the_package_generation_gives_the_same_tokens(name, without_package):
    student = make_checkpoint_student(name)
    expected = student.generate(some_ids()[:1], max_new_tokens=8, do_sample=False)
    assert without_package[name]["generated"] == expected.tolist()


@checkpoints
def test_without_the_package_untrusted_code_is_refused_and_never_loads_as_a_dense_model(
    name, without_package
):
    unspecified, refused = without_package[name]["refusals"]
    assert unspecified.startswith("ValueError")
    assert refused.startswith("ValueError")
    assert "trust_remote_code=True" in refused


# --- PEFT ---


@families
def test_lora_attaches_to_ternary_linears_and_trains_a_step(family):
    peft = pytest.importorskip("peft")
    student = make_student(family)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    untouched = student(some_ids()).logits
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(student, config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 2  # layers x linears x (A, B)
    assert all("lora_" in name for name in trainable)
    # B starts at zero: the adapted student is the student.
    assert torch.equal(model(some_ids()).logits, untouched)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model.train()(some_ids(), labels=some_ids()).loss
    loss.backward()
    optimizer.step()
    assert model(some_ids(), labels=some_ids()).loss < loss
    o_proj = student.model.layers[0].self_attn.o_proj
    assert isinstance(o_proj.base_layer, BitLinear)
    assert o_proj.lora_B["default"].weight.any()
    after = model.state_dict()
    for name, value in before.items():
        path, _, leaf = name.rpartition(".")
        wrapped = f"base_model.model.{path}.base_layer.{leaf}"
        wrapped = wrapped.replace("o_proj.norm.base_layer", "o_proj.base_layer.norm")
        actual = after.get(wrapped, after.get(f"base_model.model.{name}"))
        assert torch.equal(actual, value), name
