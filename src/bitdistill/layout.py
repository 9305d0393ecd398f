"""Layout ``t5x32-v1`` of ternary matrices: five trits a byte, 1.6 bits a weight (docs/format.md).

    byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4,    c = code + 1 in {0, 1, 2}

The canonical, portable order of packed files, in numpy. The engine's own decoders are tested against this one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYOUT = "t5x32-v1"
FORMAT_VERSION = 1
"""Version of a file that needs nothing later."""
FORMAT_VERSION_V2 = 2
"""Version of a file with Hadamard transforms, activations of other than 8 bits or attention states of few bits, which a
reader of version 1 would leave out."""

ROWS = 32
"""Rows of a row block."""
GROUP = 20
"""Input features of a group: five trits of each of four bytes."""
TRITS = 5
LANE = 4
"""Bytes, and so consecutive features, that meet in one four-way dot product."""
MAX_BYTE = 3**TRITS - 1
_POWERS = np.array([3**p for p in range(TRITS)], dtype=np.uint8)


def version_needed(packed: Mapping[str, Any]) -> int:
    """The version of a file whose config has this ``packed`` section: the first whose readers know all of it."""
    return FORMAT_VERSION_V2 if later_settings(packed) else FORMAT_VERSION


def later_settings(packed: Mapping[str, Any]) -> list[str]:
    """Keys of a ``packed`` section that a reader of version 1 would leave out."""
    later = [key for key in ("query_bits", "kv_bits", "hadamard") if key in packed]
    return [*later, "activation_bits"] if packed.get("activation_bits", 8) != 8 else later


def packed_shape(rows: int, columns: int, block_size: int | None = None) -> tuple[int, int, int, int]:
    """``[row blocks, segments, groups, 128]`` of a packed ``[rows, columns]`` matrix."""
    segment = min(columns, block_size or columns)
    segments = -(-columns // segment)
    return -(-rows // ROWS), segments, -(-segment // GROUP), ROWS * LANE


def pack(code: NDArray[np.int8], block_size: int | None = None) -> NDArray[np.uint8]:
    """Bytes of a code matrix ``[N, K]`` that holds -1, 0, +1.

    ``block_size`` is the number of input features per scale when scales are per block; each block then starts a
    fresh group.

    Raises:
        ValueError: the matrix is empty or not two-dimensional, or holds another value.
    """
    if code.ndim != 2 or not code.size:
        raise ValueError(f"a code matrix has two dimensions and at least one element, not shape {code.shape}")
    if ((code < -1) | (code > 1)).any():
        raise ValueError("a code matrix holds only -1, 0 and +1")
    rows, columns = code.shape
    row_blocks, segments, groups, _ = packed_shape(rows, columns, block_size)
    segment = min(columns, block_size or columns)
    trits = np.ones((row_blocks * ROWS, segments * segment), dtype=np.uint8)
    trits[:rows, :columns] = code.astype(np.int8) + 1
    padded = np.ones((row_blocks * ROWS, segments, groups * GROUP), dtype=np.uint8)
    padded[:, :, :segment] = trits.reshape(row_blocks * ROWS, segments, segment)
    # [rb, r, s, g, p, j] -> [rb, s, g, r, j, p]
    split = padded.reshape(row_blocks, ROWS, segments, groups, TRITS, LANE).transpose(0, 2, 3, 1, 5, 4)
    return (split * _POWERS).sum(axis=-1, dtype=np.uint8).reshape(row_blocks, segments, groups, ROWS * LANE)


def unpack(
    packed: NDArray[np.uint8], rows: int, columns: int, block_size: int | None = None
) -> NDArray[np.int8]:
    """The code matrix ``[rows, columns]`` of packed bytes.

    Raises:
        ValueError: the shape does not belong to such a matrix, or a byte is above 242.
    """
    expected = packed_shape(rows, columns, block_size)
    if packed.shape != expected:
        raise ValueError(
            f"a packed {rows} x {columns} matrix has shape {list(expected)}, not {list(packed.shape)}"
        )
    if (packed > MAX_BYTE).any():
        raise ValueError(f"a byte above {MAX_BYTE} is not five trits")
    row_blocks, segments, groups, _ = expected
    trits = packed.reshape(row_blocks, segments, groups, ROWS, LANE, 1) // _POWERS % 3
    # [rb, s, g, r, j, p] -> [rb, r, s, g, p, j]
    padded = trits.transpose(0, 3, 1, 2, 5, 4).reshape(row_blocks * ROWS, segments, groups * GROUP)
    segment = min(columns, block_size or columns)
    flat = padded[:, :, :segment].reshape(row_blocks * ROWS, segments * segment)
    return flat[:rows, :columns].astype(np.int8) - 1


INT4_ROWS = 32
"""Rows of a block of an int4 table."""
INT4_GROUP = 64
"""Features of an int4 row that share a scale."""


def int4_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """``[blocks, groups, 1024]`` of the bytes of an int4 table; its scales are ``[blocks, groups, 32]``."""
    return -(-rows // INT4_ROWS), -(-columns // INT4_GROUP), INT4_ROWS * INT4_GROUP // 2


def pack_int4(code: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Bytes of int4 codes ``[N, K]`` in -8..7; each nibble is code + 8, padding is code 0."""
    rows, columns = code.shape
    blocks, groups, width = int4_shape(rows, columns)
    nibbles = np.full((blocks * INT4_ROWS, groups * INT4_GROUP), 8, np.uint8)
    nibbles[:rows, :columns] = code + 8
    # [b, r, g, i, half, j] -> [b, g, i, r, j, half]
    split = nibbles.reshape(blocks, INT4_ROWS, groups, INT4_GROUP // 8, 2, LANE).transpose(0, 2, 3, 1, 5, 4)
    return np.asarray(split[..., 0] | split[..., 1] << 4, dtype=np.uint8).reshape(blocks, groups, width)


def unpack_int4(packed: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.int8]:
    """The codes ``[N, K]`` of int4 bytes."""
    blocks, groups, _ = packed.shape
    split = packed.reshape(blocks, groups, INT4_GROUP // 8, INT4_ROWS, LANE)
    nibbles = np.stack((split & 15, split >> 4), axis=-1).transpose(0, 3, 1, 2, 5, 4)
    flat = nibbles.reshape(blocks * INT4_ROWS, groups * INT4_GROUP)
    return flat[:rows, :columns].astype(np.int8) - np.int8(8)


def pack_int4_scales(scale: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Scales ``[N, groups]`` (bf16 bits) in their order in the file; rows of padding get scale 1."""
    padded = np.full((-(-len(scale) // INT4_ROWS) * INT4_ROWS, scale.shape[1]), 0x3F80, np.uint16)
    padded[: len(scale)] = scale
    return padded.reshape(-1, INT4_ROWS, scale.shape[1]).transpose(0, 2, 1)


def checksum(data: bytes | memoryview) -> int:
    """Sum of ``(2 i + 1) * word[i]`` modulo 2^64 over little-endian 64-bit words, zero-padded."""
    whole = len(data) // 8 * 8
    words = np.frombuffer(data, dtype="<u8", count=whole // 8)
    total = 0
    step = 1 << 20
    for start in range(0, len(words), step):
        part = words[start : start + step]
        factors = np.arange(start, start + len(part), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        total += int((part * factors).sum(dtype=np.uint64))
    tail = int.from_bytes(bytes(data[whole:]), "little")
    return (total + tail * (2 * len(words) + 1)) % 2**64
