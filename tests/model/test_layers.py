"""BitLinear and SubLN alone: values, gradients in closed form, and what a spec refuses."""

import numpy as np
import pytest
import torch

from bitdistill.model import BitLinear, SubLN, TernarySpec
from bitdistill.model.quant import fake_quantize_activation, fake_quantize_weight


def bit_linear(norm_eps: float | None = None, bias: bool = False, **spec: object) -> BitLinear:
    return BitLinear(12, 7, bias=bias, spec=TernarySpec(**spec), norm_eps=norm_eps)


def test_subln_is_rms_norm_with_gain():
    norm = SubLN(12, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
    x = torch.randn(3, 5, 12)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-3)
    expected = expected * norm.weight.detach().double().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_subln_starts_with_gain_one_and_takes_a_silent_token():
    norm = SubLN(12, 1e-6)
    assert norm.weight.tolist() == [1.0] * 12
    assert torch.equal(norm(torch.zeros(2, 12)), torch.zeros(2, 12))


def test_subln_of_bf16_is_computed_in_fp32_and_returned_in_bf16():
    norm, x = SubLN(512, 1e-6), torch.randn(4, 512).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)  # gains that bf16 would round
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_linear_with_norm_is_the_linear_without_it_on_normed_inputs():
    with_norm, without = bit_linear(norm_eps=1e-6, bias=True), bit_linear(bias=True)
    without.load_state_dict(with_norm.state_dict(), strict=False)
    with torch.no_grad():
        with_norm.norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, 12)
    assert torch.equal(with_norm(x), without(with_norm.norm(x)))
    assert not torch.allclose(with_norm(x), without(x))


@pytest.mark.parametrize(("bits", "granularity"), [(8, "tensor"), (4, "channel"), (16, "block")])
def test_gradients_are_those_of_the_quantised_matrices(bits, granularity):
    linear = bit_linear(bias=True, activation_bits=bits, granularity=granularity, block_size=5)
    x = torch.randn(6, 12, requires_grad=True)
    upstream = torch.randn(6, 7)
    linear(x).backward(upstream)
    quantized_x = x.detach() if bits == 16 else fake_quantize_activation(x.detach(), bits)
    quantized_weight = fake_quantize_weight(linear.weight.detach(), granularity, 5)
    torch.testing.assert_close(x.grad, upstream @ quantized_weight)
    torch.testing.assert_close(linear.weight.grad, upstream.T @ quantized_x)
    torch.testing.assert_close(linear.bias.grad, upstream.sum(dim=0))


def test_warm_up_coefficient_acts_in_training_and_never_in_evaluation():
    linear, x = bit_linear(bias=True), torch.randn(4, 12)
    dense = torch.nn.functional.linear(x, linear.weight, linear.bias)
    quantized = linear(x)
    linear.quant_lambda = 0.0
    assert torch.equal(linear(x), dense)
    linear.eval()
    assert torch.equal(linear(x), quantized)
    assert not torch.allclose(quantized, dense)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_sites", "both"),
        ("granularity", "row"),
        ("activation_bits", 2),
        ("block_size", 0),
        ("dead_zone_bias", -0.1),
        ("hadamard", "outputs"),
        ("hadamard", 3),
    ],
)
def test_spec_names_the_field_and_value_it_refuses(field, value):
    with pytest.raises(ValueError, match=rf"ternary\.{field} = {value!r}: use "):
        TernarySpec(**{field: value})


def test_spec_survives_the_form_that_json_stores():
    spec = TernarySpec(norm_sites="all", granularity="block", block_size=64, skip=("lm_*",))
    stored = spec.to_dict()
    assert stored["skip"] == ["lm_*"]
    assert TernarySpec(**stored) == spec
