"""Integer kernels of every room equal numpy's int64 dot products exactly, whatever the shapes and the values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill import _core, layout

ROOMS = _core.available_isas()

# K below, at and beyond a group of 20 and of 16, and where int16 sums are flushed (16 groups of 16).
EDGES = [1, 3, 4, 5, 15, 16, 17, 19, 20, 21, 40, 79, 80, 81, 255, 256, 257, 320, 512, 513]
ADVERSARIAL = ("random", "all 127", "all -128", "+-127 against the weights", "zero")


def codes(kind: str, weights: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    columns = weights.shape[1]
    if kind == "random":
        return rng.integers(-128, 128, (tokens, columns)).astype(np.int8)
    if kind == "+-127 against the weights":  # every product has one sign: the largest sums there are
        return np.tile(np.where(weights[0] < 0, -127, 127).astype(np.int8), (tokens, 1))
    return np.full((tokens, columns), {"all 127": 127, "all -128": -128, "zero": 0}[kind], np.int8)


def reference(weights: np.ndarray, code: np.ndarray, block: int) -> np.ndarray:
    """``[M, S, N]`` per segment, in int64."""
    columns = weights.shape[1]
    segment = min(block or columns, columns)
    parts = [slice(start, start + segment) for start in range(0, columns, segment)]
    return np.stack([code[:, p].astype(np.int64) @ weights[:, p].T.astype(np.int64) for p in parts], axis=1)


def check(weights: np.ndarray, code: np.ndarray, block: int, isa: str) -> None:
    packed = layout.pack(weights, block or None)
    rows, columns = weights.shape
    for kernel in ("gemv", "gemm"):
        dot = _core.ternary_dot(packed, rows, columns, code, isa=isa, kernel=kernel, block_size=block)
        np.testing.assert_array_equal(dot, reference(weights, code, block), err_msg=f"{isa} {kernel}")


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("columns", EDGES)
def test_every_edge_of_k(isa: str, columns: int, kind: str) -> None:
    rng = np.random.default_rng(columns)
    weights = rng.integers(-1, 2, (33, columns)).astype(np.int8)
    check(weights, codes(kind, weights, 3, rng), 0, isa)


@pytest.mark.parametrize("tokens", range(1, 27))
def test_every_tile_of_tokens(isa: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    weights = rng.integers(-1, 2, (70, 45)).astype(np.int8)
    check(weights, codes("random", weights, tokens, rng), 0, isa)


@pytest.mark.parametrize("weight", [-1, 0, 1])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_extreme_sums_at_a_real_width(isa: str, weight: int, kind: str) -> None:
    """K = 11008: the largest sums, 128 * 11008, in rows that are all one sign."""
    weights = np.full((32, 11008), weight, np.int8)
    check(weights, codes(kind, weights, 2, np.random.default_rng(0)), 0, isa)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 30),
    block=st.one_of(st.just(0), st.integers(1, 200)),
    kind=st.sampled_from(ADVERSARIAL),
    room=st.sampled_from(ROOMS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(rows: int, columns: int, tokens: int, block: int, kind: str, room: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    check(weights, codes(kind, weights, tokens, rng), block, room)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("tokens", [1, 2, 13, 29])
@pytest.mark.parametrize("threads", [1, 3])
def test_linear_scales_and_biases_in_float(isa: str, granularity: str, tokens: int, threads: int) -> None:
    """The decoder's own path over many row blocks and threads, against float64."""
    rng = np.random.default_rng(tokens)
    rows, columns, block = 333, 150, 32 if granularity == "block" else 0
    weights = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    code = rng.integers(-127, 128, (tokens, columns)).astype(np.int8)
    act_scale = rng.uniform(0.01, 1, tokens).astype(np.float32)
    shape = {"tensor": (1, 1), "channel": (rows, 1), "block": (rows, -(-columns // 32))}[granularity]
    scale = rng.uniform(0.01, 1, shape).astype(np.float32)
    bias = rng.normal(size=rows).astype(np.float32)
    got = _core.ternary_linear(
        layout.pack(weights, block or None),
        scale,
        bias,
        rows,
        columns,
        code,
        act_scale,
        isa=isa,
        threads=threads,
        block_size=block,
    )
    spread = np.repeat(scale, 32, axis=1)[:, :columns] if granularity == "block" else scale
    expected = (code * act_scale[:, None].astype(float)) @ (weights * spread.astype(float)).T + bias
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_random_weights_are_valid_trits() -> None:
    packed = _core.pack_random(100, 333, seed=3)
    code = layout.unpack(packed, 100, 333)
    shares = [(code == trit).mean() for trit in (-1, 0, 1)]
    assert all(abs(share - 1 / 3) < 0.02 for share in shares)
    np.testing.assert_array_equal(packed, _core.pack_random(100, 333, seed=3))


def test_kernels_refuse_arrays_that_do_not_fit() -> None:
    packed = layout.pack(np.zeros((4, 40), np.int8))
    code = np.zeros((1, 40), np.int8)
    with pytest.raises(ValueError, match="shape of this matrix"):
        _core.ternary_dot(packed, 4, 41, np.zeros((1, 41), np.int8), isa="scalar", kernel="gemv")
    with pytest.raises(ValueError, match="columns"):
        _core.ternary_dot(packed, 4, 40, code[:, :-1].copy(), isa="scalar", kernel="gemv")
    with pytest.raises(ValueError, match="kernel"):
        _core.ternary_dot(packed, 4, 40, code, isa="scalar", kernel="other")  # type: ignore[arg-type]
