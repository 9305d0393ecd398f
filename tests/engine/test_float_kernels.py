"""Float kernels of every room against torch: norm and quantisation, attention, embedding and head."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_student import as_bf16, int4_groups, int4_values, int8_rows
from torch.nn import functional as F

from bitdistill import _core, layout
from bitdistill.model.quant import quantize_int8

ROOMS = _core.available_isas()


@pytest.mark.parametrize("columns", [1, 7, 16, 33, 64, 100, 2560])
def test_quantisation_has_torchs_codes_exactly(isa: str, columns: int) -> None:
    """Without a norm the inputs are equal, so the codes must be, ties included."""
    x = torch.randn(50, columns) * torch.logspace(-8, 8, 50)[:, None]
    x[0] = 0
    x[1] = torch.arange(columns) % 255 - 127  # scale 1: codes are the values
    x[2] = (torch.arange(columns) % 127) + 0.5  # ties: to even
    x[2, 0] = 127
    code, scale = quantize_int8(x)
    got_code, got_scale = _core.norm_quantize(x.numpy(), None, 0.0, isa=isa)
    np.testing.assert_array_equal(got_scale, scale[:, 0].numpy())
    np.testing.assert_array_equal(got_code, code.numpy())


def test_multiplying_quantisation_is_transformers(isa: str) -> None:
    x = torch.randn(64, 96)
    factor = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    expected = (x * factor).round().clamp(-128, 127)
    code, _ = _core.norm_quantize(x.numpy(), None, 0.0, isa=isa, rounding="multiply")
    np.testing.assert_array_equal(code, expected.numpy())


@pytest.mark.parametrize("columns", [5, 64, 259, 2560])
def test_norm_then_quantisation(isa: str, columns: int) -> None:
    x, gain = torch.randn(200, columns) * 3, torch.rand(columns) + 0.5
    code, scale = quantize_int8(F.rms_norm(x, (columns,), gain, 1e-5))
    got_code, got_scale = _core.norm_quantize(x.numpy(), gain.numpy(), 1e-5, isa=isa)
    np.testing.assert_allclose(got_scale, scale[:, 0].numpy(), rtol=2e-6)
    different = got_code != code.numpy()
    assert different.mean() <= 1e-3  # sums round differently: a value next to a tie may move
    assert np.abs(got_code.astype(int) - code.numpy().astype(int)).max() <= 1


def test_values_that_are_not_finite_do_no_harm(isa: str) -> None:
    x = np.array([[np.nan, 1, 2], [np.inf, 1, 2], [-np.inf, np.nan, 0]], np.float32).repeat(9, axis=1)
    code, _ = _core.norm_quantize(x, None, 0.0, isa=isa)
    assert code.shape == x.shape


@given(
    tokens=st.integers(1, 40),
    before=st.integers(0, 600),
    kv=st.integers(1, 3),
    group=st.integers(1, 5),
    dim=st.sampled_from([2, 6, 8, 16, 30, 64, 128]),
    room=st.sampled_from(ROOMS),
    form=st.sampled_from(["fp32", "fp16", "int8"]),
    window=st.sampled_from([0, 1, 15, 16, 17, 300]),
)
def test_attention_is_torchs(
    tokens: int, before: int, kv: int, group: int, dim: int, room: str, form: str, window: int
) -> None:
    torch.manual_seed(tokens * 1000 + before)
    positions = tokens + before
    query = torch.randn(tokens, kv * group, dim) * 2
    key, value = torch.randn(positions, kv, dim), torch.randn(positions, kv, dim)
    # The cache's rounding is not under test.
    if form == "fp16":
        key, value = key.half().float(), value.half().float()
    if form == "int8":
        key, value = (torch.mul(*quantize_int8(x)) for x in (key, value))
    behind = torch.arange(before, positions)[:, None] - torch.arange(positions)[None, :]
    mask = (behind >= 0) & (behind < (window or positions))
    expected = F.scaled_dot_product_attention(
        query.transpose(0, 1).double(),
        key.repeat_interleave(group, 1).transpose(0, 1).double(),
        value.repeat_interleave(group, 1).transpose(0, 1).double(),
        attn_mask=mask,
    ).transpose(0, 1)
    got = _core.attend(query.numpy(), key.numpy(), value.numpy(), dim**-0.5, isa=room, kv=form, window=window)
    bound = 2e-5
    if form == "int8":
        # Queries and weights are split in two codes each: off by at most 1 / (127 * 254 * 2) of their peak. A score
        # that is off by s scales its weight by e^s.
        step, largest = 1 / (127 * 254 * 2), value.abs().max().item()
        score_error = dim**-0.5 * query.abs().max().item() * step * key.abs().sum(-1).max().item()
        bound += largest * (2 * score_error + 2 * min(positions, window or positions) * step)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=bound)


def test_attention_over_an_int8_cache_is_the_same_in_every_room() -> None:
    """Products of codes are whole numbers; only exp and the last sums may round."""
    torch.manual_seed(0)
    query, key, value = torch.randn(33, 6, 64) * 3, torch.randn(600, 2, 64), torch.randn(600, 2, 64)
    by_room = [
        _core.attend(query.numpy(), key.numpy(), value.numpy(), 0.125, isa=room, kv="int8") for room in ROOMS
    ]
    for other in by_room[1:]:
        np.testing.assert_allclose(other, by_room[0], rtol=1e-5, atol=2e-6)


def test_attention_over_codes_at_their_ends(isa: str) -> None:
    """Keys, values and queries at full scale and of one sign: no sum of a lane may overflow."""
    query = np.full((1, 1, 256), 3.0, np.float32)
    key = np.full((300, 1, 256), -2.0, np.float32)
    value = np.where(np.arange(300) % 2 == 0, 5.0, -5.0).astype(np.float32)[:, None, None].repeat(256, axis=2)
    got = _core.attend(query, key, value, 0.01, isa=isa, kv="int8")
    np.testing.assert_allclose(got, 0, atol=5 * 300 / 64516)  # all scores are one: the mean of the values
    got = _core.attend(query, key, np.abs(value), 0.01, isa=isa, kv="int8")
    np.testing.assert_allclose(got, 5, rtol=1e-4)


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8"])
def test_attention_over_a_long_text(isa: str, form: str) -> None:
    """32,768 positions: 128 chunks of keys, whose running maximum and sum are carried all the way."""
    torch.manual_seed(0)
    positions, dim = 32768, 16
    query, key, value = (
        torch.randn(2, 2, dim) * 4,
        torch.randn(positions, 1, dim),
        torch.randn(positions, 1, dim),
    )
    if form == "fp16":
        key, value = key.half().float(), value.half().float()
    if form == "int8":
        key, value = (torch.mul(*quantize_int8(x)) for x in (key, value))
    scores = torch.einsum("qhd,kd->qhk", query.double(), key[:, 0].double()) * 0.25
    scores[0, :, -1] = -torch.inf  # the first of two tokens does not see the second
    expected = scores.softmax(-1) @ value[:, 0].double()
    got = _core.attend(query.numpy(), key.numpy(), value.numpy(), 0.25, isa=isa, kv=form)
    # Roundings of thousands of keys are independent of each other: far below the bound of the test before.
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=2e-4 if form == "int8" else 2e-5)


def test_attention_with_scores_far_apart(isa: str) -> None:
    """exp underflows for all keys but one, and the best key comes last: the running maximum must carry it."""
    query = np.full((1, 1, 16), 30, np.float32)
    key = np.linspace(-5, 5, 700, dtype=np.float32)[:, None, None].repeat(16, axis=2)
    value = np.arange(700, dtype=np.float32)[:, None, None].repeat(16, axis=2)
    got = _core.attend(query, key, value, 1.0, isa=isa, kv="fp32")
    scores = 480.0 * key[:, 0, 0].astype(np.float64)
    weights = np.exp(scores - scores.max())
    expected = (weights * value[:, 0, 0]).sum() / weights.sum()
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def int4_logits(code: np.ndarray, scale: np.ndarray, x: np.ndarray, isa: str) -> np.ndarray:
    packed, scales = layout.pack_int4(code), np.ascontiguousarray(layout.pack_int4_scales(scale))
    return _core.head_logits(packed, scales, x, isa=isa)[:, : len(code)]


@pytest.mark.parametrize("rows", [1, 3, 4, 66])
@pytest.mark.parametrize("columns", [1, 15, 64, 100, 257])
@pytest.mark.parametrize("tokens", [1, 5])
def test_head(isa: str, rows: int, columns: int, tokens: int) -> None:
    weight, x = torch.randn(rows, columns), torch.randn(tokens, columns)
    exact = x.double() @ weight.double().T
    np.testing.assert_allclose(
        _core.head_logits(weight.numpy(), None, x.numpy(), isa=isa), exact, rtol=1e-5, atol=1e-4
    )

    rounded = x.double() @ weight.bfloat16().double().T
    np.testing.assert_allclose(
        _core.head_logits(as_bf16(weight), None, x.numpy(), isa=isa), rounded, rtol=1e-5, atol=1e-4
    )

    code, scale = int8_rows(weight)
    quantised = x.double().numpy() @ (code * scale).astype(np.float64).T
    got = _core.head_logits(code, scale[:, 0].copy(), x.numpy(), isa=isa)
    # x is split in two int8 codes: half a step of the finer one, peak / 127 / 254 / 2, over each of the columns.
    bound = np.abs(code * scale).sum(1)[None, :] * x.abs().amax(1).numpy()[:, None] / 127 / 254 / 2
    assert (np.abs(got - quantised) <= bound * 1.01 + 1e-4).all()

    code, scale = int4_groups(weight)
    values = int4_values(code, scale).astype(np.float64)
    got = int4_logits(code, scale, x.numpy(), isa)
    bound = np.abs(values).sum(1)[None, :] * x.abs().amax(1).numpy()[:, None] / 127 / 254 / 2
    assert (np.abs(got - x.double().numpy() @ values.T) <= bound * 1.01 + 1e-4).all()


def test_int4_head_with_every_code_at_its_end(isa: str) -> None:
    """Codes of -8 and 7 against states of full scale: no sum of a lane may overflow."""
    code = np.where(np.arange(256) % 3 == 0, -8, 7).astype(np.int8)[None].repeat(3, 0)
    scale = np.full((3, 4), 0x3F80, np.uint16)  # 1 in bf16
    x = np.stack([np.full(256, 2.0), np.where(code[0] < 0, -2.0, 2.0)]).astype(np.float32)
    got = int4_logits(code, scale, x, isa)
    np.testing.assert_allclose(got, x @ code.T.astype(np.float32), rtol=1e-5)


def test_int8_head_is_the_same_in_every_room() -> None:
    code = np.random.default_rng(0).integers(-128, 128, (50, 200)).astype(np.int8)
    scale, x = np.ones(50, np.float32), np.random.default_rng(1).normal(size=(3, 200)).astype(np.float32)
    results = [_core.head_logits(code, scale, x, isa=room) for room in ROOMS]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
