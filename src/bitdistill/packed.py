"""The packed model's data file: safetensors with checksums in its header, in numpy alone (docs/format.md).

Writing streams tensor by tensor; reading looks at the header only and checks all it says against the file's size, so
that whatever takes the offsets from here stays inside the file.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .layout import FORMAT_VERSION, FORMAT_VERSION_V2, LAYOUT, checksum

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DIGESTS_FILE = "digests.json"

READ_VERSIONS = (FORMAT_VERSION, FORMAT_VERSION_V2)

ELEMENT_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F32": 4}
"""Element types that a packed model may hold, by their safetensors names."""
_NUMPY_TYPES = {"U8": "|u1", "I8": "|i1", "BF16": "<u2", "F32": "<f4"}

ALIGNMENT = 64
"""Where the data section starts, in bytes of the file: a cache line."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package itself."""
_CHECKSUM_DIGITS = 16
_REMEDY = "fetch or export the model again"


@dataclass(frozen=True)
class PackedTensor:
    """One tensor to write; ``load`` makes its values when their turn comes, so one is in memory at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a data file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int
    checksum: int | None


def write_tensors(path: Path, tensors: Sequence[PackedTensor], version: int = FORMAT_VERSION) -> None:
    """Write a data file: U8 tensors first, checksums in the header, data aligned; ``version`` is the format's."""
    ordered = sorted(tensors, key=lambda tensor: tensor.dtype != "U8")
    checksums = {tensor.name: "0" * _CHECKSUM_DIGITS for tensor in ordered}
    header = _header(ordered, checksums, version)
    with path.open("wb") as stream:
        stream.write(header)
        for tensor in ordered:
            values = np.ascontiguousarray(tensor.load(), dtype=_NUMPY_TYPES[tensor.dtype])
            assert values.shape == tensor.shape, tensor.name
            data = values.reshape(-1).view(np.uint8).data
            checksums[tensor.name] = f"{checksum(data):0{_CHECKSUM_DIGITS}x}"
            stream.write(data)
        stream.seek(0)
        final = _header(ordered, checksums, version)
        assert len(final) == len(header)
        stream.write(final)


def _header(tensors: Sequence[PackedTensor], checksums: dict[str, str], version: int) -> bytes:
    """Length and JSON text, padded with spaces; its size does not depend on the checksums' values."""
    header: dict[str, Any] = {
        "__metadata__": {
            "format_version": str(version),
            "layout": LAYOUT,
            "checksums": json.dumps(checksums, separators=(",", ":")),
        }
    }
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a data file, by name.

    Raises:
        CheckpointError: the file cannot be read, or its header is not one, contradicts the file's size, or belongs to
            another version of the format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: its header claims {length} bytes of a file of {size}; it is truncated or not a "
                    f"safetensors file: {_REMEDY}"
                )
            text = stream.read(length)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot read it ({error.strerror}); {_REMEDY}") from error
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("__metadata__ is not a JSON object")
        _check_versions(metadata, f"{path}: __metadata__")
        sums = json.loads(metadata.get("checksums", "{}"))
        if not isinstance(sums, dict):
            raise ValueError("checksums is not a JSON object")
        entries = {name: _entry(name, value, 8 + length, sums.get(name)) for name, value in header.items()}
    except (ValueError, TypeError, RecursionError) as error:  # JSON's and unicode's errors are ValueErrors
        raise CheckpointError(f"{path}: damaged header ({error}); {_REMEDY}") from error
    for name, entry in entries.items():
        if entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{path}: {name} ends beyond the file's {size} bytes; it is truncated: {_REMEDY}"
            )
    unknown = sorted(set(sums) - set(entries))
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]} has a checksum and is not there; {_REMEDY}")
    return entries


def _entry(name: str, value: Any, data_start: int, stored: Any) -> Entry:
    """One header entry, checked in itself.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not a JSON object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"{name}: dtype {dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
    if not _are_counts(shape) or len(shape) > 8:
        raise ValueError(f"{name}: shape {shape!r} is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: data_offsets {offsets!r} are not two positions")
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise ValueError(f"{name}: {dtype} {shape} does not take {nbytes} bytes")
    sum_ = None
    if stored is not None:
        if not isinstance(stored, str) or len(stored) != _CHECKSUM_DIGITS:
            raise ValueError(f"{name}: checksum {stored!r} is not {_CHECKSUM_DIGITS} hex digits")
        sum_ = int(stored, 16)
        if sum_ < 0:
            raise ValueError(f"{name}: checksum {stored!r} is negative")
    return Entry(dtype, tuple(shape), data_start + offsets[0], nbytes, sum_)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _check_versions(section: dict[str, Any], where: str) -> None:
    """Raise CheckpointError for a format version or layout this package does not read; absent keys pass."""
    version, layout = section.get("format_version"), section.get("layout")
    if version is not None and str(version) not in map(str, READ_VERSIONS):
        known = " or ".join(map(str, READ_VERSIONS))
        raise CheckpointError(
            f"{where}: format_version {version!r} is not {known}, those that this version of bitdistill reads; "
            "update bitdistill or export the student again"
        )
    if layout is not None and layout != LAYOUT:
        raise CheckpointError(
            f"{where}: layout {layout!r} is not {LAYOUT!r}, the one this version of bitdistill reads; "
            "update bitdistill or export the student again"
        )


def read_packed_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a packed folder, with a ``packed`` section that this package reads.

    Raises:
        CheckpointError: it is missing, damaged, not a packed model's, or of another version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json there; this is not a model folder")
    config = read_json_object(path)
    packed = config.get("packed")
    if not isinstance(packed, dict):
        raise CheckpointError(
            f"{folder}: config.json has no section 'packed', so this is not an exported model; "
            "make one with: bitdistill export STUDENT OUT"
        )
    for key in ("format_version", "layout"):
        if packed.get(key) is None:
            raise CheckpointError(f"{path}: packed.{key} is missing; {_REMEDY}")
    _check_versions(packed, f"{path}: packed")
    return config


def is_packed(folder: Path) -> bool:
    """Whether a folder is an exported model, of whatever version."""
    try:
        return isinstance(read_json_object(folder / CONFIG_FILE).get("packed"), dict)
    except CheckpointError:
        return False


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror}); {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; {_REMEDY}")
    return value
