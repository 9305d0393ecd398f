"""What a study is made of: one record for each finished run, its rows with their items."""

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ..records import Method, StepRecord

Items = NDArray[Any]
"""What each item scored, ``[N]``: uint8 where all are 0 or 1, else float64."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The full-precision model that a run began with."""

    identity: str
    """What tells it from other bases: the digest of its weights, or the recipe that made it for each seed."""
    name: str
    """Last part of where it lies."""
    non_embedding_parameters: float | None

    @property
    def size(self) -> str:
        """Its non-embedding parameters in words, such as ``1.6M``."""
        return size_in_words(self.non_embedding_parameters)


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """One finished run."""

    path: str
    """Its file, relative to the folder of the report."""
    study: str
    title: str
    point: dict[str, Any]
    """Dotted recipe keys that the study varies, with the values of this run."""
    is_reference: bool
    seed: int
    task: str
    preset: str
    base: Base
    judged_on: str
    metric: str
    num_items: int
    items_digest: str
    """What they were; records that share it answered the same items."""
    meta: dict[str, Any]
    methods: dict[str, Method]
    """Rows by method key."""
    items: dict[str, Items]
    """``[num_items]`` by method key."""
    steps: dict[str, StepRecord] = field(default_factory=dict)
    failed: str = ""
    """Why training ended before there were rows; empty if it did not."""


def size_in_words(parameters: float | None) -> str:
    """A number of parameters with one decimal: ``52.1k``, ``4.9M``, ``1.7B``."""
    if parameters is None:
        return "size not recorded"
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= 0.99995 * divisor:
            return f"{parameters / divisor:.1f}{unit}"
    return f"{parameters:.0f}"
