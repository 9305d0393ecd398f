"""Lines and JSON rows of a text file, with one clear error for whatever is wrong with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError


def read_lines(path: Path, key: str, errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a UTF-8 file, line ends kept, without holding the file in memory.

    ``key`` is the recipe key that names the file, for the error; ``errors`` is Python's.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8", errors=errors, newline="") as stream:
            yield from stream
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}); check {key}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it, or check {key}") from error


def read_jsonl(path: Path, key: str, errors: str = "strict") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(file:line, object)``; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(read_lines(path, key, errors), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row
