"""How a section refuses a value: the key, the value and the remedy."""

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError

LARGEST_SIZE = 2**31
"""What no dimension of a model reaches: token ids and offsets are 32-bit numbers in places."""


def check(ok: bool, key: str, value: object, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r}: {remedy}")


def check_unused(config: Any, section: str, keys: Iterable[str], remedy: str) -> None:
    """A setting that would be ignored is an error, unless it is at its default."""
    for key in keys:
        value = getattr(config, key)
        check(
            value == getattr(type(config), key), f"{section}.{key}", value, f"it is not used here: {remedy}"
        )
