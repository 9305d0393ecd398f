"""AWQ: the full-precision function stays, the alpha is the best by brute force, and what cannot be scaled is said."""

import copy

import numpy as np
import pytest
import torch
from tiny_encoders import small_encoder
from tiny_families import families
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitdistill.config import RefineConfig
from bitdistill.errors import SurgeryError
from bitdistill.model import BitLinear, TernarySpec, find_family
from bitdistill.train import awq
from bitdistill.train.calibration import input_statistics, layers_in_turn, quantisers_off
from bitdistill.train.initialisation import check_initialisation, initialise
from bitdistill.train.surgery import refine

AWQ = RefineConfig(initialisation="awq")


def texts(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of which one is padded."""
    torch.manual_seed(5)
    batches = [{"input_ids": torch.randint(2, 80, (2, 12))} for _ in range(count)]
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    batches[0]["attention_mask"] = mask
    return batches


def in_float64(model: PreTrainedModel, offset: float) -> PreTrainedModel:
    """The model in fp64 with norms that compute in it too; theirs and ours are written for fp32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        name = type(module).__name__
        if name == "SubLN" or name.endswith("RMSNorm"):
            eps = getattr(module, "eps", None) or module.variance_epsilon
            shift = 0.0 if name == "SubLN" else offset

            def forward(x, module=module, eps=eps, shift=shift):
                return F.rms_norm(x, x.shape[-1:], module.weight + shift, eps)

            module.forward = forward
    return model


def full_precision(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), quantisers_off(model):
        return model(ids).logits


@pytest.fixture
def half_for_every_group(monkeypatch):
    """Alpha is 0.5 everywhere, so that no group is left alone because that is best."""
    grid = awq.candidates

    def half(magnitude):
        return [(alpha, scales) for alpha, scales in grid(magnitude) if alpha == 0.5]

    monkeypatch.setattr(awq, "candidates", half)


@families
@pytest.mark.parametrize("sites", ["none", "subln", "all"])
def test_the_full_precision_function_stays(make_model, family, sites, half_for_every_group):
    """As many key heads as query heads, so that the output projection can be folded into v's rows."""
    model = make_model(family, num_key_value_heads=4, attention_bias=True)
    fp32, _ = refine(model, TernarySpec(norm_sites=sites))
    row = find_family(family)
    assert row is not None
    student, ids = in_float64(fp32, row.gain_offset), torch.randint(2, 300, (2, 9))
    before, latents = full_precision(student, ids), copy.deepcopy(student.state_dict())
    torch.testing.assert_close(before.float(), full_precision(fp32, ids), rtol=1e-3, atol=1e-3)
    findings = initialise(student, texts(), RefineConfig(initialisation="awq", norm_sites=sites))
    after = full_precision(student, ids)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    for name, module in student.named_modules():
        if isinstance(module, BitLinear):
            assert not torch.allclose(module.weight, latents[f"{name}.weight"], rtol=1e-2), name
    assert len(findings.notes) == 2 * {"none": 4, "subln": 4, "all": 7}[sites]
    with torch.no_grad():  # and another ternary function, or nothing was gained
        assert not torch.allclose(student(ids).logits, after)


def test_an_encoder_with_norms_of_its_own_linears_keeps_its_function_too(half_for_every_group):
    student, _ = refine(small_encoder(), TernarySpec(norm_sites="all"))
    ids = torch.randint(5, 80, (2, 9))
    before = full_precision(student, ids)
    initialise(student, texts(), RefineConfig(initialisation="awq", norm_sites="all"))
    torch.testing.assert_close(full_precision(student, ids), before, rtol=1e-4, atol=1e-4)


def test_linears_in_full_precision_that_read_the_same_norm_are_scaled_with_it(
    make_model, half_for_every_group
):
    spec = TernarySpec(skip=("*.k_proj", "*.layers.1.mlp.gate_proj", "*.layers.1.mlp.up_proj"))
    student, _ = refine(make_model("qwen3"), spec)
    ids, gate = torch.randint(2, 300, (2, 9)), student.model.layers[1].mlp.gate_proj.weight.clone()
    key = student.model.layers[0].self_attn.k_proj.weight.clone()
    before = full_precision(student, ids)
    initialise(student, texts(), AWQ)
    torch.testing.assert_close(full_precision(student, ids), before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(student.model.layers[0].self_attn.k_proj.weight, key)
    assert torch.equal(student.model.layers[1].mlp.gate_proj.weight, gate)  # nobody ternary reads that norm


# --- the search ---


def ternary_reference(weight: np.ndarray) -> np.ndarray:
    scale = np.float32(np.abs(weight).mean())
    return np.clip(np.rint(weight.astype(np.float32) / scale), -1, 1) * np.float64(scale)


def first_layer(student: PreTrainedModel) -> tuple:
    path, layer, calls = next(layers_in_turn(student, texts(), quantised=False))
    assert path == "model.layers.0"
    return layer, calls, input_statistics(layer, calls)


def inputs_of(model: PreTrainedModel, name: str) -> np.ndarray:
    """Real tokens that a linear of the full-precision model receives, ``[n, K]`` fp64."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        for batch in texts():
            model(**batch)
    handle.remove()
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in texts()]
    return torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)]).double().numpy()


def grid(x: np.ndarray) -> list[np.ndarray]:
    """Scales of the published search, from its formulas."""
    magnitude = np.abs(x).mean(axis=0)
    found = [np.maximum(magnitude ** (i / 20), 1e-4) for i in range(20)]
    return [s / np.sqrt(s.max() * s.min()) for s in found]


def louder(model: nn.Module) -> nn.Module:
    """A few channels behind each norm far larger than the rest, as in trained models: what AWQ is for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[:3] = 6.0
    return model


def test_alpha_of_an_output_projection_is_the_best_of_the_grid(make_model):
    model = louder(make_model("llama"))
    student, _ = refine(model, TernarySpec())
    layer, calls, statistics = first_layer(student)
    (group,) = (g for g in awq.layer_groups(layer, find_family("llama"))[0] if g.name == "mlp.down_proj")
    with quantisers_off(student):  # o_proj has a norm too, which the model has not
        raw = inputs_of(student, "model.layers.0.mlp.down_proj")
    eps = model.config.rms_norm_eps
    x = raw / np.sqrt((raw**2).mean(axis=1, keepdims=True) + eps)  # SubLN with gain 1
    weight = model.model.layers[0].mlp.down_proj.weight.detach().double().numpy()
    expected = [((x @ (ternary_reference(weight * s) / s - weight).T) ** 2).sum() for s in grid(x)]
    alpha, scales, errors = awq.search(group, layer, calls, statistics["mlp.down_proj"])
    np.testing.assert_allclose(errors, expected, rtol=1e-3)
    best = int(np.argmin(expected))
    assert alpha == best / 20
    np.testing.assert_allclose(scales.numpy(), grid(x)[best], rtol=1e-4)
    assert len(set(expected)) == 20


def test_alpha_of_gate_and_up_is_the_best_for_the_whole_feed_forward_module(make_model):
    model = louder(make_model("llama"))
    student, _ = refine(model, TernarySpec(norm_sites="none"))
    layer, calls, statistics = first_layer(student)
    groups, _ = awq.layer_groups(layer, find_family("llama"))
    (group,) = (g for g in groups if g.name == "mlp.gate_proj, mlp.up_proj")
    x = inputs_of(model, "model.layers.0.mlp.gate_proj")
    gate, up, down = (
        getattr(model.model.layers[0].mlp, f"{name}_proj").weight.detach().double().numpy()
        for name in ("gate", "up", "down")
    )

    def output(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        opened = x @ gate.T
        return (opened / (1 + np.exp(-opened)) * (x @ up.T)) @ down.T

    expected = [
        (
            (output(ternary_reference(gate * s) / s, ternary_reference(up * s) / s) - output(gate, up)) ** 2
        ).sum()
        for s in grid(x)
    ]
    alpha, _, errors = awq.search(group, layer, calls, statistics["mlp.gate_proj"])
    np.testing.assert_allclose(errors, expected, rtol=1e-3)
    assert alpha == int(np.argmin(expected)) / 20


def test_alpha_of_q_k_v_is_the_best_for_the_attention_of_huggingface(make_model):
    model = louder(make_model("qwen3"))
    student, _ = refine(model, TernarySpec(norm_sites="none"))
    layer, calls, statistics = first_layer(student)
    groups, _ = awq.layer_groups(layer, find_family("qwen3"))
    names = tuple(f"self_attn.{name}_proj" for name in "qkv")
    (group,) = (g for g in groups if g.ternary == names)
    x = inputs_of(model, "model.layers.0.self_attn.q_proj")
    attention = model.model.layers[0].self_attn
    weights = {name: getattr(attention, f"{name}_proj").weight.detach().double().numpy() for name in "qkv"}

    def output() -> np.ndarray:
        found: list[torch.Tensor] = []
        handle = attention.register_forward_hook(lambda _, __, out: found.append(out[0]))
        with torch.no_grad():
            for batch in texts():
                model(**batch)
        handle.remove()
        masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in texts()]
        return torch.cat([y[mask] for y, mask in zip(found, masks, strict=True)]).double().numpy()

    original = output()
    expected = []
    for s in grid(x):
        for name, weight in weights.items():
            quantised = torch.from_numpy(ternary_reference(weight * s) / s).float()
            getattr(attention, f"{name}_proj").weight.data = quantised
        expected.append(((output() - original) ** 2).sum())
    alpha, _, errors = awq.search(group, layer, calls, statistics[names[0]])
    np.testing.assert_allclose(errors, expected, rtol=1e-3)
    assert alpha == int(np.argmin(expected)) / 20


def test_linears_that_are_searched_by_themselves_lose_nothing(make_model):
    """Alpha 0 is in the grid, and the error that is searched is the one that is reported."""
    spec = TernarySpec(norm_sites="all", granularity="channel", scale="learned")
    student, _ = refine(louder(make_model("llama")), spec)
    findings = initialise(student, texts(), RefineConfig(initialisation="awq", norm_sites="all"))
    assert all(after <= before * (1 + 1e-6) for before, after in findings.errors.values())
    before, after = findings.means
    assert after < before
    for module in student.modules():
        if isinstance(module, BitLinear):  # the scale follows the weights
            torch.testing.assert_close(module.weight_scale, module.weight.abs().mean(dim=1, keepdim=True))


# --- what cannot be ---


def test_an_output_projection_behind_shared_value_heads_is_left_alone_and_named(make_model):
    model = make_model("llama")
    student, _ = refine(model, TernarySpec(norm_sites="none"))
    findings = initialise(student, texts(), AWQ)
    told = [note for note in findings.notes if "not scaled" in note]
    assert told == [
        f"model.layers.{i}.self_attn.o_proj: not scaled, v_proj has 16 outputs for its 32 inputs (grouped-query "
        "attention)"
        for i in range(2)
    ]
    o_proj = model.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(student.model.layers[0].self_attn.o_proj.weight, o_proj)


def test_an_encoder_whose_norms_feed_the_residual_sum_is_refused():
    with pytest.raises(SurgeryError, match=r"refine\.initialisation = 'awq'.*bert.*norm_sites = \"all\""):
        check_initialisation("bert", AWQ)
    check_initialisation("bert", RefineConfig(initialisation="awq", norm_sites="all"))
    check_initialisation("bert", RefineConfig(initialisation="gptq"))
