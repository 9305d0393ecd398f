"""Layout t5x32-v1 against the formula of docs/format.md, element by element, and the page's own hex dump."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistill import layout

FORMAT_PAGE = Path(__file__).parents[1] / "docs" / "format.md"


def byte_by_formula(code: np.ndarray, block_size: int, rb: int, s: int, g: int, at: int) -> int:
    """One byte as the page defines it."""
    row, j = rb * 32 + at // 4, at % 4
    byte = 0
    for p in range(5):
        inside = 20 * g + 4 * p + j
        k = s * block_size + inside
        trit = 1
        if row < code.shape[0] and inside < block_size and k < code.shape[1]:
            trit += int(code[row, k])
        byte += trit * 3**p
    return byte


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    block=st.none() | st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_pack_is_the_formula_and_unpack_inverts_it(
    rows: int, columns: int, block: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    code = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    packed = layout.pack(code, block)
    assert packed.shape == layout.packed_shape(rows, columns, block)
    np.testing.assert_array_equal(layout.unpack(packed, rows, columns, block), code)
    for _ in range(20):
        where = tuple(int(rng.integers(n)) for n in packed.shape)
        assert packed[where] == byte_by_formula(code, min(block or columns, columns), *where)


def dump(data: bytes) -> str:
    """As ``hexdump`` prints it: repeated lines become one ``*``."""
    lines, last = [], None
    for start in range(0, len(data), 16):
        line = data[start : start + 16].hex(" ")
        if line != last:
            lines.append(f"{start:04x}  {line}")
        elif lines[-1] != "*":
            lines.append("*")
        last = line
    return "\n".join([*lines, f"{len(data):04x}"])


def test_the_hex_dump_of_the_format_page_is_true() -> None:
    row, column = np.indices((2, 24))
    packed = layout.pack(((column + row) % 3 - 1).astype(np.int8))
    shown = re.search(
        r"regenerates this dump.*?```\n(.*?)\n```", FORMAT_PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert shown is not None
    assert shown[1] == dump(packed.tobytes())


@pytest.mark.parametrize("bad", [np.array([[2]], np.int8), np.zeros((0, 3), np.int8), np.zeros(3, np.int8)])
def test_pack_refuses_what_is_not_a_code_matrix(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="code matrix"):
        layout.pack(bad)


def test_unpack_refuses_another_shape_and_bytes_that_are_not_five_trits() -> None:
    packed = layout.pack(np.zeros((2, 24), np.int8))
    with pytest.raises(ValueError, match=r"shape \[1, 1, 3, 128\]"):
        layout.unpack(packed, 2, 41)
    packed[0, 0, 0, 0] = 243
    with pytest.raises(ValueError, match="above 242"):
        layout.unpack(packed, 2, 24)


@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_int4_codes_come_back_and_lie_where_the_page_says(rows: int, columns: int, seed: int) -> None:
    code = np.random.default_rng(seed).integers(-8, 8, (rows, columns)).astype(np.int8)
    packed = layout.pack_int4(code)
    assert packed.shape == layout.int4_shape(rows, columns)
    np.testing.assert_array_equal(layout.unpack_int4(packed, rows, columns), code)
    for row in range(rows):
        for k in (0, columns // 2, columns - 1):
            byte = int(packed[row // 16, k // 64, k % 64 // 8 * 64 + row % 16 * 4 + k % 4])
            assert (byte >> 4 if k % 8 >= 4 else byte & 15) == code[row, k] + 8


@given(st.binary(max_size=200))
def test_checksum_is_the_stated_sum(data: bytes) -> None:
    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    assert layout.checksum(data) == sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**64


@given(data=st.binary(min_size=1, max_size=100), bit=st.integers(0, 10_000))
def test_checksum_sees_every_single_bit(data: bytes, bit: int) -> None:
    bit %= 8 * len(data)
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert layout.checksum(bytes(flipped)) != layout.checksum(data)
