"""Rotations of a trained b1.58 model: the function stays, ternary weights and 4-bit inputs are those of numpy's rotated
matrices, and what cannot be fused is refused.
"""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from tiny_families import families, small_student
from transformers import BitNetConfig, BitNetForCausalLM

from bitdistill.errors import SurgeryError
from bitdistill.model import BitLinear
from bitdistill.train.calibration import quantisers_off
from bitdistill.train.native import make_native
from bitdistill.train.rotation import random_hadamard, rotate

FUSABLE = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]
kinds = pytest.mark.parametrize("kind", ["quarot", "spinquant"])
IDS = torch.arange(2, 20).view(2, 9) * 13 % 298


def orthonormal(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def off(quantisers) -> None:
    quantisers.activation_bits, quantisers.ternary = 16, False


def assert_same_function(model, kind, fused):
    """With its quantisers off and any orthonormal matrices at all."""
    with torch.no_grad():
        quantised = model(IDS).logits
        with quantisers_off(model):
            expected = model(IDS).logits
        rotated, rotations, quantisers = rotate(model, kind=kind, fused=fused)
        off(quantisers)
        found = [rotated(IDS).logits]
        for seed, matrix in enumerate(rotations.parameters()):
            matrix.copy_(orthonormal(len(matrix), seed))
        found.append(rotated(IDS).logits)
    for logits in found:
        # Hugging Face's norms compute in fp32, whatever the model's dtype.
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (quantised - expected).abs().max() > 1e-2
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, quantised)  # the original is left alone


@kinds
@pytest.mark.parametrize("family", FUSABLE)
@pytest.mark.parametrize("norm_sites", ["subln", "none"])
def test_fused_rotations_keep_the_function(family, kind, norm_sites):
    assert_same_function(small_student(family, {"norm_sites": norm_sites}).double(), kind, fused=True)


@kinds
@families
@pytest.mark.parametrize("norm_sites", ["subln", "all"])
def test_rotations_that_are_not_fused_keep_the_function(family, kind, norm_sites):
    assert_same_function(small_student(family, {"norm_sites": norm_sites}).double(), kind, fused=False)


def native() -> BitNetForCausalLM:
    torch.manual_seed(1)
    config = BitNetConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = make_native(BitNetForCausalLM(config)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@kinds
@pytest.mark.parametrize("fused", [True, False])
def test_rotations_keep_the_function_of_a_native_bitnet(kind, fused):
    assert_same_function(native(), kind, fused)


def test_a_random_hadamard_matrix_is_signs_times_hadamard_in_blocks():
    found = random_hadamard(24, torch.Generator().manual_seed(0), torch.float64).numpy()
    blocks = np.kron(np.eye(3), hadamard(8) / np.sqrt(8))
    signs = np.diag(found @ blocks.T)
    assert set(np.round(signs, 12)) == {-1.0, 1.0}
    np.testing.assert_allclose(found, np.diag(signs) @ blocks, atol=1e-12)


# --- quantised ---


def ternary(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).mean()
    return np.clip(np.rint(weight / scale), -1, 1) * scale


def int4(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).mean(axis=-1, keepdims=True) / np.sqrt(7)
    return np.clip(np.rint(x / scale), -8, 7) * scale


def normed(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gain


def values(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def heads_matrix(matrix: np.ndarray, heads: int, across: bool) -> np.ndarray:
    """What turns o_proj's input, as one matrix: every head, then Hadamard across heads."""
    mix = hadamard(heads) / np.sqrt(heads) if across else np.eye(heads)
    return np.kron(np.eye(heads), matrix) @ np.kron(mix, np.eye(len(matrix)))


@kinds
@pytest.mark.parametrize("fused", [True, False])
def test_quantised_outputs_are_those_of_whole_matrices(kind, fused):
    model = small_student("llama")
    rotated, rotations, _ = rotate(model, kind=kind, fused=fused)
    layer, turned = model.model.layers[0], rotated.model.layers[0]
    residual, heads = values(rotations.residual), values(rotations.heads[0])
    gain = values(layer.input_layernorm.weight)
    x = np.random.default_rng(0).normal(size=(5, 32))

    # q_proj: fused, its input comes turned and without the gain.
    weight = values(layer.self_attn.q_proj.weight)
    if fused:
        given, expected = x @ residual, int4(x @ residual) @ ternary(weight * gain @ residual).T
    else:
        given, expected = x, int4(x @ residual) @ residual.T @ ternary(weight).T
    check(turned.self_attn.q_proj, given, expected)

    # o_proj: SubLN, the heads, and what it writes.
    o_proj, whole = layer.self_attn.o_proj, heads_matrix(heads, 4, across=kind == "quarot")
    gain, eps = values(o_proj.norm.weight), o_proj.norm.eps
    weight = values(o_proj.weight)
    if fused:
        each = heads_matrix(heads, 4, across=False)
        inputs = int4(normed(x @ each, 1.0, eps) @ each.T @ whole)
        check(turned.self_attn.o_proj, x @ each, inputs @ ternary(residual.T @ (weight * gain) @ whole).T)
    else:
        inputs = int4(normed(x, gain, eps) @ whole)
        check(turned.self_attn.o_proj, x, inputs @ ternary(weight @ whole).T)

    # down_proj: Hadamard in blocks of 16 behind SubLN with its gain.
    down_proj, blocks = layer.mlp.down_proj, np.kron(np.eye(3), hadamard(16) / 4)
    x = np.random.default_rng(1).normal(size=(5, 48))
    weight = values(down_proj.weight) @ blocks
    if fused:
        weight = residual.T @ weight
    inputs = int4(normed(x, values(down_proj.norm.weight), down_proj.norm.eps) @ blocks)
    check(turned.mlp.down_proj, x, inputs @ ternary(weight).T)


def check(linear, x: np.ndarray, expected: np.ndarray) -> None:
    with torch.no_grad():
        found = linear(torch.from_numpy(x).float())
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_not_fused_the_trained_codes_stay():
    model = small_student("qwen3")
    rotated, _, _ = rotate(model, kind="quarot", fused=False)
    fused, _, _ = rotate(model, kind="quarot", fused=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        trained = getattr(model.model.layers[1].self_attn, name).weight
        assert torch.equal(getattr(rotated.model.layers[1].self_attn, name).effective_weight(), trained)
        turned = getattr(fused.model.layers[1].self_attn, name).effective_weight()
        assert (turned - trained).abs().max() > 1e-2


# --- refusals ---


@pytest.mark.parametrize(
    ("family", "ternary", "fused", "words"),
    [
        (
            "gemma3_text",
            {},
            True,
            "pre_feedforward_layernorm|post_feedforward_layernorm|post_attention_layernorm",
        ),
        ("llama", {"norm_sites": "all"}, True, "q_proj stands between"),
        ("llama", {"hadamard": {"o_proj": 0}}, False, "plain BitNet b1.58"),
        ("llama", {"scale": "learned"}, False, "plain BitNet b1.58"),
        ("llama", {"activation_bits": 4}, False, "8-bit activations throughout"),
        ("llama", {"activation_bits": 16}, True, "8-bit activations throughout"),
        ("llama", {"int4_sites": "inputs"}, False, "8-bit activations throughout"),
    ],
)
def test_what_a_rotation_would_not_preserve_is_refused(family, ternary, fused, words):
    with pytest.raises(SurgeryError, match=words):
        rotate(small_student(family, ternary), kind="quarot", fused=fused)


def test_a_transform_of_blocks_of_one_feature_is_none():
    """The study's b1.58 is a BitNet v2 with H_1 = [1]."""
    plain, ones = (small_student("llama", t) for t in ({}, {"hadamard": {"o_proj": 1, "down_proj": 1}}))
    ones.load_state_dict(plain.state_dict())
    ids = torch.arange(20).reshape(2, 10) + 20
    rotated = [rotate(model, kind="quarot", fused=False)[0](input_ids=ids).logits for model in (plain, ones)]
    assert torch.equal(*rotated)


def test_a_full_precision_model_is_refused(make_model):
    with pytest.raises(SurgeryError, match="no ternary decoder"):
        rotate(make_model("llama"), kind="quarot", fused=True)


def test_every_linear_is_replaced():
    rotated, _, _ = rotate(small_student("llama"), kind="spinquant", fused=True)
    assert not any(isinstance(module, BitLinear) for module in rotated.modules())
