"""Kernels of BitNet v2: Hadamard transform, INT4 activations, caches of four and three bits.

Oracles: the transform's definition in float64, its butterflies in numpy's fp32, torch's quantisers, and attention in
float64 over the numbers that the codes stand for.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bitdistill import _core, layout
from bitdistill.model.quant import quantize_int4

ROOMS = _core.available_isas()


def butterflies(x: np.ndarray, block: int) -> np.ndarray:
    """fp32, in the order that the training side has: h = 1, 2, 4, ..., then one multiplication."""
    y = x.astype(np.float32).reshape(-1, block).copy()
    half = 1
    while half < block:
        pairs = y.reshape(-1, 2, half)
        low, high = pairs[:, 0].copy(), pairs[:, 1].copy()
        pairs[:, 0], pairs[:, 1] = low + high, low - high
        half *= 2
    return (y * np.float32(1 / np.sqrt(block))).reshape(x.shape)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 256, 2048, 8192])
@pytest.mark.parametrize("blocks", [1, 3])
def test_hadamard_has_the_bits_of_the_butterflies(isa: str, block: int, blocks: int) -> None:
    rng = np.random.default_rng(block)
    x = (rng.normal(size=(3, block * blocks)) * np.logspace(-3, 3, 3)[:, None]).astype(np.float32)
    got = _core.hadamard(x, block, isa=isa)
    np.testing.assert_array_equal(got.view(np.uint32), butterflies(x, block).view(np.uint32))


@pytest.mark.parametrize("block", [2, 8, 128])
def test_hadamard_is_sylvesters_matrix(isa: str, block: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = np.random.default_rng(0).normal(size=(5, 2 * block)).astype(np.float32)
    expected = (x.astype(float).reshape(5, 2, block) @ matrix.T / np.sqrt(block)).reshape(5, -1)
    np.testing.assert_allclose(_core.hadamard(x, block, isa=isa), expected, rtol=1e-5, atol=1e-5)


def test_hadamard_refuses_blocks_that_do_not_fit() -> None:
    for columns, block in ((24, 16), (24, 3), (8, 0)):
        with pytest.raises(ValueError, match="power of two"):
            _core.hadamard(np.zeros((1, columns), np.float32), block, isa="scalar")


@pytest.mark.parametrize("columns", [1, 7, 16, 63, 64, 65, 100, 2560])
def test_int4_quantisation_is_torchs_up_to_ties(isa: str, columns: int) -> None:
    torch.manual_seed(columns)
    x = torch.randn(200, columns) * torch.logspace(-8, 8, 200)[:, None]
    x[0] = 0
    x[1, 0] = 1e6  # clips at 7, and the rest is rounded to nothing
    x[2, 0] = -1e6
    code, scale = quantize_int4(x)
    got_code, got_scale = _core.norm_quantize(x.numpy(), None, 0.0, isa=isa, bits=4)
    np.testing.assert_allclose(got_scale, scale[:, 0].numpy(), rtol=1e-6)
    different = got_code != code.numpy()
    ratio = (x.double() / scale.double()).numpy()
    assert (np.abs(np.abs(ratio[different]) % 1 - 0.5) < 1e-5).all()
    assert different.mean() < 1e-3
    assert got_code.min() >= -8 and got_code.max() <= 7


def test_int4_codes_are_the_same_in_every_room() -> None:
    x = np.random.default_rng(1).normal(size=(50, 333)).astype(np.float32)
    x[0, 0], x[1, 1], x[2] = np.nan, np.inf, np.nan
    expected = _core.norm_quantize(x, None, 0.0, isa="scalar", bits=4)
    for room in ROOMS:
        code, scale = _core.norm_quantize(x, None, 0.0, isa=room, bits=4)
        np.testing.assert_array_equal(code[3:], expected[0][3:])
        np.testing.assert_array_equal(scale[3:].view(np.uint32), expected[1][3:].view(np.uint32))
        assert code.min() >= -8 and code.max() <= 7  # whatever comes in: a look-up relies on it


def stored(x: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes of keys or values ``[T, H, E]`` stand for: absmax per token and head, position 0 at 8 bits."""

    def quantised(x: torch.Tensor, bits: int) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        step = torch.where(step == 0, 1.0, step)
        zero = 2 ** (bits - 1)
        return (((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step

    return torch.cat([quantised(x[:1], 8), quantised(x[1:], bits)])


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    group, positions = query.shape[1] // key.shape[1], len(key)
    behind = torch.arange(positions - len(query), positions)[:, None] - torch.arange(positions)[None, :]
    return F.scaled_dot_product_attention(
        query.transpose(0, 1).double(),
        key.repeat_interleave(group, 1).transpose(0, 1).double(),
        value.repeat_interleave(group, 1).transpose(0, 1).double(),
        attn_mask=(behind >= 0) & (behind < (window or positions)),
        scale=scale,
    ).transpose(0, 1)


@given(
    tokens=st.integers(1, 40),
    before=st.one_of(st.integers(0, 600), st.just(0)),
    kv=st.integers(1, 3),
    group=st.integers(1, 5),
    dim=st.sampled_from([2, 6, 8, 16, 30, 34, 64, 128]),
    room=st.sampled_from(ROOMS),
    bits=st.sampled_from([4, 3]),
    window=st.sampled_from([0, 1, 15, 16, 17, 40, 300]),
)
def test_attention_over_few_bits(
    tokens: int, before: int, kv: int, group: int, dim: int, room: str, bits: int, window: int
) -> None:
    torch.manual_seed(tokens * 1000 + before)
    positions = tokens + before
    query = torch.randn(tokens, kv * group, dim) * 2
    key, value = torch.randn(positions, kv, dim), torch.randn(positions, kv, dim)
    value[0] *= 5  # what stands at position 0 is seen in the result
    value[positions // 2] = 0
    kept_key, kept_value = stored(key, bits), stored(value, bits)
    expected = attention(query, kept_key, kept_value, dim**-0.5, window)
    got = _core.attend(
        query.numpy(), key.numpy(), value.numpy(), dim**-0.5, isa=room, kv=f"int{bits}", window=window
    )
    # As with an int8 cache: queries and weights are split in two codes each.
    step, largest = 1 / (127 * 254 * 2), kept_value.abs().max().item()
    score_error = dim**-0.5 * query.abs().max().item() * step * kept_key.abs().sum(-1).max().item()
    bound = 2e-5 + largest * (2 * score_error + 2 * min(positions, window or positions) * step)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=bound)


@pytest.mark.parametrize("bits", [4, 3])
def test_every_code_comes_back_from_its_place(isa: str, bits: int) -> None:
    """A score far above the rest singles out one position: what is read there is the value's code, whole."""
    top, dim, positions = 2 ** (bits - 1) - 1, 48, 300
    rng = np.random.default_rng(bits)
    value = rng.integers(-top, top + 1, (positions, 1, dim)).astype(np.float32)
    value[:, 0, 0] = top  # step 1: codes are the values
    value[0] = rng.integers(-127, 128, (1, dim))
    value[0, 0, 0] = 127
    for position in [0, 1, 2, 15, 16, 31, 32, 33, 200, 255, 256, 257, 299]:
        key = np.zeros((positions, 1, dim), np.float32)
        key[position] = 1
        query = np.full((1, 1, dim), 20, np.float32)
        got = _core.attend(query, key, value, 1.0, isa=isa, kv=f"int{bits}")
        np.testing.assert_allclose(got[0, 0], value[position, 0], atol=127 / 64516 * 1.01)


@pytest.mark.parametrize("bits", [4, 3])
def test_few_bits_at_their_ends(isa: str, bits: int) -> None:
    """Keys, values and queries at full scale and of one sign."""
    query = np.full((1, 1, 256), 3.0, np.float32)
    key = np.full((300, 1, 256), -2.0, np.float32)
    value = np.where(np.arange(300) % 2 == 0, 5.0, -5.0).astype(np.float32)[:, None, None].repeat(256, axis=2)
    got = _core.attend(query, key, value, 0.01, isa=isa, kv=f"int{bits}")
    np.testing.assert_allclose(got, 0, atol=2 * 5 * 300 / 64516)
    got = _core.attend(query, key, np.abs(value), 0.01, isa=isa, kv=f"int{bits}")
    np.testing.assert_allclose(got, 5, rtol=1e-4)


def test_ternary_products_of_int4_codes_at_their_ends(isa: str) -> None:
    """Codes of -8 and 7 with weights of one sign, at a real width: exact, as any int8 codes are."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-1, 2, (64, 8192)).astype(np.int8)
    weights[0], weights[1] = 1, -1
    code = rng.integers(-8, 8, (14, 8192)).astype(np.int8)
    code[0], code[1], code[2], code[3] = (
        -8,
        7,
        np.where(weights[2] < 0, -8, 7),
        np.where(weights[2] < 0, 7, -8),
    )
    packed = layout.pack(weights)
    for kernel in ("gemv", "gemm"):
        dot = _core.ternary_dot(packed, 64, 8192, code, isa=isa, kernel=kernel)[:, 0]
        np.testing.assert_array_equal(dot, code.astype(np.int64) @ weights.T.astype(np.int64))


LOOK_UP = "avx512_vbmi"
"""The one room that looks 4-bit codes up; the others multiply them as int8."""
needs_look_up = pytest.mark.skipif(LOOK_UP not in ROOMS, reason=f"this CPU cannot run {LOOK_UP}")


def check_look_up(weights: np.ndarray, code: np.ndarray) -> None:
    packed, (rows, columns) = layout.pack(weights), weights.shape
    dot = _core.ternary_dot(packed, rows, columns, code, isa=LOOK_UP, kernel="gemm_int4")[:, 0]
    np.testing.assert_array_equal(dot, code.astype(np.int64) @ weights.T.astype(np.int64))


@needs_look_up
@pytest.mark.parametrize("weight", [-1, 0, 1, None])
@pytest.mark.parametrize("columns", [1, 19, 20, 21, 239, 240, 241, 8192])
def test_look_up_at_the_ends_of_its_sums(weight: int | None, columns: int) -> None:
    """Widths around a chunk of 12 groups; codes that make every entry of a table its largest or its smallest."""
    rng = np.random.default_rng(columns)
    weights = rng.integers(-1, 2, (70, columns)).astype(np.int8)
    if weight is not None:
        weights[:] = weight
    code = rng.integers(-8, 8, (7, columns)).astype(np.int8)
    code[0], code[1] = -8, 7
    code[2], code[3] = np.where(weights[0] < 0, -8, 7), np.where(weights[0] < 0, 7, -8)
    check_look_up(weights, code)


@needs_look_up
@given(
    rows=st.integers(1, 2200),
    columns=st.integers(1, 800),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_look_up_of_any_shape(rows: int, columns: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    check_look_up(weights, rng.integers(-8, 8, (tokens, columns)).astype(np.int8))


def test_look_up_is_refused_where_there_is_none() -> None:
    packed, code = layout.pack(np.zeros((4, 40), np.int8)), np.full((1, 40), 8, np.int8)
    with pytest.raises(ValueError, match="gemm_int4"):
        _core.ternary_dot(packed, 4, 40, code, isa="scalar", kernel="gemm_int4")
    if LOOK_UP in ROOMS:
        with pytest.raises(ValueError, match=r"-8\.\.7"):
            _core.ternary_dot(packed, 4, 40, code, isa=LOOK_UP, kernel="gemm_int4")
