"""Quantisers against float64 references, closed forms of Gaussian weights, and ties placed by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdistill.model.quant import (
    EPS,
    expand_scale,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_int4,
    quantize_int8,
    straight_through,
    ternarize,
    weight_scale,
)

# An fp32 and a float64 quotient may fall on two sides of a rounding boundary; elsewhere codes are equal.
BOUNDARY = 1e-4

values = st.floats(-1000, 1000, width=32, allow_subnormal=False)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=values)
activations = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=12), elements=values)
granularities = st.sampled_from(["tensor", "channel", "block"])


def reference_scale(latent: np.ndarray, granularity: str, block_size: int) -> np.ndarray:
    """Absmean of every weight's group, already ``[N, K]``, one weight at a time in float64."""
    latent = latent.astype(np.float64)
    rows, columns = latent.shape
    scale = np.empty((rows, columns))
    for n in range(rows):
        for k in range(columns):
            start = k // block_size * block_size
            group = {
                "tensor": latent,
                "channel": latent[n],
                "block": latent[n, start : start + block_size],
            }[granularity]
            scale[n, k] = max(float(np.sum(np.abs(group))) / group.size, 1e-5)
    return scale


def assert_codes(actual: torch.Tensor, quotient: np.ndarray, low: int, high: int) -> None:
    """``actual`` is ``clip(round(quotient), low, high)``; off by at most one beside a boundary."""
    expected = np.clip(np.rint(quotient), low, high)
    code = actual.numpy().astype(np.float64)
    near = np.abs(quotient - np.floor(quotient) - 0.5) <= BOUNDARY
    np.testing.assert_array_equal(code[~near], expected[~near])
    assert np.abs(code - expected)[near].max(initial=0) <= 1


# --- weights ---


@given(latent=matrices, granularity=granularities, block_size=st.integers(1, 30))
def test_ternary_codes_and_scales_follow_the_float64_reference(latent, granularity, block_size):
    code, scale = ternarize(torch.from_numpy(latent), granularity, block_size)
    expected = reference_scale(latent, granularity, block_size)
    actual = expand_scale(scale, latent.shape[1], block_size).expand(latent.shape)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)
    assert_codes(code, latent.astype(np.float64) / expected, -1, 1)


@pytest.mark.parametrize(
    ("granularity", "columns", "block_size", "shape"),
    [
        ("tensor", 10, 4, (1, 1)),
        ("channel", 10, 4, (3, 1)),
        ("block", 12, 4, (3, 3)),
        ("block", 10, 4, (3, 3)),
        ("block", 3, 4, (3, 1)),
        ("block", 4, 1, (3, 4)),
    ],
)
def test_scale_has_one_entry_per_group(granularity, columns, block_size, shape):
    assert weight_scale(torch.ones(3, columns), granularity, block_size).shape == shape


def test_short_last_block_is_averaged_over_what_it_holds():
    latent = torch.tensor([[1.0, -3.0, 2.0, 2.0, 5.0]])
    assert weight_scale(latent, "block", 2).tolist() == [[2.0, 2.0, 5.0]]
    # One block longer than the row: its mean, not its sum over 128.
    assert weight_scale(latent, "block", 128).tolist() == [[pytest.approx(13 / 5)]]


def test_channel_scale_of_one_row_ignores_the_others():
    latent = torch.randn(4, 32)
    louder = latent.clone()
    louder[1:] *= 100
    assert torch.equal(weight_scale(latent, "channel")[0], weight_scale(louder, "channel")[0])
    assert not torch.equal(weight_scale(latent, "tensor"), weight_scale(louder, "tensor"))


def test_unknown_granularity_is_named():
    with pytest.raises(ValueError, match=r"granularity 'row' is not one of tensor, channel, block"):
        weight_scale(torch.ones(2, 2), "row")


def test_gaussian_weights_have_the_closed_form_share_of_zeros():
    count = 400 * 1000
    code, scale = ternarize(torch.randn(400, 1000) * 0.02)
    # mean|z| = sqrt(2 / pi), so |z| < sqrt(2 / pi) / 2 becomes 0; P(|z| < a) = erf(a / sqrt(2)).
    expected = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
    deviation = math.sqrt(expected * (1 - expected) / count)
    assert expected == pytest.approx(0.3101, abs=1e-4)
    assert (code == 0).double().mean().item() == pytest.approx(expected, abs=4 * deviation)
    assert scale.item() == pytest.approx(0.02 * math.sqrt(2 / math.pi), rel=0.005)


@given(latent=matrices)
def test_ternarising_again_keeps_codes_and_shrinks_the_scale_by_the_nonzero_share(latent):
    code, scale = ternarize(torch.from_numpy(latent))
    code_again, scale_again = ternarize(code * scale)
    nonzero = (code != 0).double().mean().item()
    assume(nonzero * scale.item() > 2 * EPS)  # below, the floor of the scale takes over
    assert torch.equal(code_again, code)
    assert scale_again.item() == pytest.approx(scale.item() * nonzero, rel=1e-6)


def test_a_weight_of_exactly_half_the_scale_becomes_zero():
    latent = torch.tensor([[0.5, -0.5, 1.5, -1.5]])  # mean|W| = 1
    code, scale = ternarize(latent)
    assert scale.item() == 1.0
    assert code.tolist() == [[0.0, 0.0, 1.0, -1.0]]
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert ternarize(torch.tensor([[above, -above, 1.5, -1.5]]))[0].tolist() == [[1, -1, 1, -1]]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_zero_weights_give_zero_codes_and_a_finite_scale(granularity):
    code, scale = ternarize(torch.zeros(3, 10), granularity, 4)
    assert torch.equal(code, torch.zeros(3, 10))
    assert torch.equal(scale, torch.full_like(scale, 1e-5))


def test_a_zero_row_and_a_zero_block_give_zero_codes_among_others():
    latent = torch.randn(3, 8)
    latent[1] = 0
    latent[2, 4:] = 0
    for granularity in ("channel", "block"):
        code, scale = ternarize(latent, granularity, 4)
        assert torch.isfinite(scale).all()
        assert not code[1].any()
        assert not code[2, 4:].any()
        assert code[0].any()
        assert code[2, :4].any()


@given(latent=matrices, exponent=st.integers(-6, 6), granularity=granularities)
def test_codes_do_not_depend_on_a_power_of_two_and_the_scale_carries_it(latent, exponent, granularity):
    factor = 2.0**exponent
    code, scale = ternarize(torch.from_numpy(latent), granularity, 5)
    assume((scale > EPS).all() and (scale * factor > EPS).all())  # above the floor of the scale
    code_scaled, scale_scaled = ternarize(torch.from_numpy(latent) * factor, granularity, 5)
    assert torch.equal(code_scaled, code)
    assert torch.equal(scale_scaled, scale * factor)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_bf16_weights_have_their_mean_taken_in_fp32(granularity):
    # Both values are bf16 numbers, their mean 1 + 1/256 is not: a bf16 mean would say 1.0.
    latent = torch.tensor([[1.0, -1.0078125] * 64]).bfloat16()
    assert latent.float().abs().unique().tolist() == [1.0, 1.0078125]
    code, scale = ternarize(latent, granularity, 32)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, torch.full_like(scale, 1.00390625))
    assert code.dtype == torch.float32


# --- activations ---


@given(x=activations)
def test_int8_codes_and_scales_follow_the_float64_reference(x):
    code, scale = quantize_int8(torch.from_numpy(x))
    wide = x.astype(np.float64)
    expected = np.maximum(np.abs(wide).max(axis=-1, keepdims=True), 1e-5) / 127
    assert scale.shape == (*x.shape[:-1], 1)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    assert_codes(code, wide / expected, -128, 127)


@given(x=activations)
def test_int4_codes_and_scales_follow_the_float64_reference(x):
    code, scale = quantize_int4(torch.from_numpy(x))
    wide = x.astype(np.float64)
    expected = np.maximum(np.abs(wide).mean(axis=-1, keepdims=True), 1e-5) / 7**0.5
    assert scale.shape == (*x.shape[:-1], 1)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    assert_codes(code, wide / expected, -8, 7)


@given(x=activations)
def test_int8_reaches_127_in_every_row_and_never_minus_128(x):
    code, _ = quantize_int8(torch.from_numpy(x))
    assert code.min() >= -127
    loud = torch.from_numpy(x).abs().amax(dim=-1) >= EPS
    assert (code.abs().amax(dim=-1)[loud] == 127).all()


def test_int8_maps_the_extremes_of_a_row_to_plus_and_minus_127():
    code, scale = quantize_int8(torch.tensor([[-3.0, 0.0, 3.0], [-2.0, 1.0, 0.0]]))
    assert code[0].tolist() == [-127, 0, 127]
    assert code[1, 0] == -127
    np.testing.assert_allclose(scale[:, 0].numpy(), [3 / 127, 2 / 127], rtol=1e-6)


def test_int8_rounds_halves_to_the_even_code():
    code, scale = quantize_int8(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -3.5]))
    assert scale.item() == 1.0
    assert code.tolist() == [127, 0, 2, 2, 0, -2, -2, -4]


def test_int4_clips_outliers_at_minus_8_and_plus_7():
    x = torch.zeros(2, 64)
    x[0, 0], x[1, 0] = 100.0, -100.0  # quotient 64 * sqrt(7) = 169
    code, _ = quantize_int4(x)
    assert code[:, 0].tolist() == [7, -8]
    assert not code[:, 1:].any()


def test_int4_of_gaussian_activations_uses_the_whole_range_and_clips_the_closed_form_share():
    code, _ = quantize_int4(torch.randn(64, 4096))
    assert code.unique().tolist() == list(range(-8, 8))
    # x / scale = z * sqrt(7) / sqrt(2 / pi): code 7 starts at quotient 6.5.
    share = 0.5 * math.erfc(6.5 / math.sqrt(7) * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert (code == 7).double().mean().item() == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_silent_tokens_give_zero_codes_and_leave_other_tokens_alone(quantize):
    x = torch.randn(2, 3, 16)
    x[0, 1] = 0
    code, scale = quantize(x)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert not code[0, 1].any()
    alone, _ = quantize(x[1, 2])
    assert torch.equal(code[1, 2], alone)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_bf16_activations_have_fp32_scales(quantize):
    x = torch.tensor([1.0, -1.0078125] * 32).bfloat16()
    code, scale = quantize(x)
    code_wide, scale_wide = quantize(x.float())
    assert scale.dtype == code.dtype == torch.float32
    assert torch.equal(scale, scale_wide)
    assert torch.equal(code, code_wide)
    expected = 1.0078125 / 127 if quantize is quantize_int8 else 1.00390625 / math.sqrt(7)
    assert scale.item() == pytest.approx(expected, rel=1e-6)


# --- straight-through estimator and warm-up ---


@given(latent=matrices, granularity=granularities, block_size=st.integers(1, 30))
def test_fake_quantised_weight_is_code_times_scale_to_the_last_bit(latent, granularity, block_size):
    latent = torch.from_numpy(latent)
    code, scale = ternarize(latent, granularity, block_size)
    expected = np.empty(latent.shape, dtype=np.float32)
    for n in range(latent.shape[0]):
        for k in range(latent.shape[1]):
            row = 0 if granularity == "tensor" else n
            column = k // block_size if granularity == "block" else 0
            expected[n, k] = code[n, k].item() * scale[row, column].item()
    actual = fake_quantize_weight(latent, granularity, block_size)
    np.testing.assert_array_equal(actual.numpy(), expected)


@given(x=activations)
def test_fake_quantised_activation_is_code_times_scale_to_the_last_bit(x):
    x = torch.from_numpy(x)
    for bits, quantize in ((8, quantize_int8), (4, quantize_int4)):
        code, scale = quantize(x)
        assert torch.equal(fake_quantize_activation(x, bits), code * scale)


def test_int8_reconstruction_error_is_at_most_half_a_step():
    x = torch.randn(8, 64)
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    assert ((fake_quantize_activation(x, 8) - x).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("quant_lambda", [0.0, 0.5, 1.0])
def test_gradient_passes_round_and_clip_unchanged(quant_lambda):
    latent = (torch.randn(5, 40) * torch.logspace(-3, 3, 40)).requires_grad_()
    x = (torch.randn(5, 40) * torch.logspace(-3, 3, 40)).requires_grad_()
    upstream = torch.randn(5, 40)
    for quantized, leaf in (
        (fake_quantize_weight(latent, "block", 7, quant_lambda), latent),
        (fake_quantize_activation(x, 8, quant_lambda), x),
        (fake_quantize_activation(x, 4, quant_lambda), x),
    ):
        (gradient,) = torch.autograd.grad(quantized, leaf, upstream)
        assert torch.equal(gradient, upstream)


def test_straight_through_keeps_bits_that_the_usual_detour_rounds_away():
    x, quantized = torch.tensor([1e8], requires_grad=True), torch.tensor([1.0])
    assert straight_through(x, quantized).item() == 1.0
    assert (x + (quantized - x).detach()).item() != 1.0


def test_no_gradient_reaches_the_quantised_argument():
    x, quantized = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    straight_through(x, quantized).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
    assert quantized.grad is None


def test_lambda_zero_leaves_values_alone_and_one_quantises_them_fully():
    latent, x = torch.randn(4, 20), torch.randn(4, 20)
    assert torch.equal(fake_quantize_weight(latent, quant_lambda=0.0), latent)
    code, scale = ternarize(latent)
    assert torch.equal(fake_quantize_weight(latent, quant_lambda=1.0), code * scale)
    for bits, quantize in ((8, quantize_int8), (4, quantize_int4)):
        assert torch.equal(fake_quantize_activation(x, bits, quant_lambda=0.0), x)
        code, scale = quantize(x)
        assert torch.equal(fake_quantize_activation(x, bits, quant_lambda=1.0), code * scale)


@pytest.mark.parametrize("quant_lambda", [0.1, 0.5, 0.9])
def test_lambda_between_mixes_latent_and_quantised_values(quant_lambda):
    latent, x = torch.randn(4, 20), torch.randn(4, 20)
    code, scale = (part.double() for part in ternarize(latent))
    mixed = (1 - quant_lambda) * latent.double() + quant_lambda * code * scale
    actual = fake_quantize_weight(latent, quant_lambda=quant_lambda)
    torch.testing.assert_close(actual.double(), mixed, rtol=1e-6, atol=1e-7)
    code, scale = (part.double() for part in quantize_int4(x))
    mixed = (1 - quant_lambda) * x.double() + quant_lambda * code * scale
    actual = fake_quantize_activation(x, 4, quant_lambda)
    torch.testing.assert_close(actual.double(), mixed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiply_is_transformers_bitnet_to_the_last_bit(dtype):
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    def unlike(ours: torch.Tensor, theirs: torch.Tensor) -> int:
        return int((ours != theirs).sum())

    differs_from_divide = 0
    with torch.compiler.set_stance("force_eager"):
        for size in (1, 7, 64, 300):
            # Whole numbers make ties; rows of zeros and tiny values meet the floor.
            for x in (
                torch.randn(96, size),
                torch.randint(-300, 300, (96, size)).float(),
                torch.zeros(2, size),
            ):
                x = x.to(dtype)
                assert unlike(fake_quantize_weight(x, rounding="multiply"), WeightQuant.apply(x)) == 0
                ours = fake_quantize_activation(x, rounding="multiply")
                assert unlike(ours, ActQuant.apply(x)) == 0
                differs_from_divide += unlike(ours, fake_quantize_activation(x))
                code, scale = ternarize(x, rounding="multiply")
                assert unlike((code * scale).to(dtype), WeightQuant.apply(x)) == 0
    assert differs_from_divide > 0


def test_fake_quantised_values_keep_the_input_dtype():
    latent = torch.randn(4, 20).bfloat16()
    code, scale = ternarize(latent)
    assert torch.equal(fake_quantize_weight(latent), (code * scale).bfloat16())
    code, scale = quantize_int8(latent)
    assert torch.equal(fake_quantize_activation(latent), (code * scale).bfloat16())
