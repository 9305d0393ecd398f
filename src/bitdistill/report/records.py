"""What a report is made of: method rows, steps, weight statistics. None: not recorded."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the accuracy table."""

    key: str
    label: str
    score: float | None
    """The metric that the run chose by, a share in [0, 1]."""
    stderr: float | None
    size_bytes: float | None
    parameters: float | None
    learning_rate: float | None
    validation: float | None
    steps: tuple[str, ...]
    """Step folders relative to the run folder, in order."""
    time_s: dict[str, float]
    grid: dict[str, float]
    """Validation score by learning rate as written."""
    others: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Further metrics of the same answers, with their standard errors."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Latent weights over their absmean scale, and the codes they turn into."""

    edges: list[float]
    counts: list[float]
    minus_frac: float | None
    zero_frac: float | None
    plus_frac: float | None
    near_threshold_frac: float | None
    flip_rate: float | None


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step folder, shown once however many methods share it."""

    path: str
    parent: str | None
    used_by: tuple[str, ...]
    stage: str
    """``settings.stage`` of its record; empty if not recorded."""
    time_s: float | None
    run: dict[str, Any]
    log: list[dict[str, float]]
    """Lines of metrics.jsonl, finite numbers only."""
    weights: Weights | None
    surgery: str

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Optimizer steps and values of one metric."""
        lines = [line for line in self.log if key in line and "step" in line]
        return [line["step"] for line in lines], [line[key] for line in lines]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything the report shows."""

    name: str
    meta: dict[str, Any]
    metric: str
    """The metric that the run chose by, in words."""
    methods: list[Method]
    steps: list[StepRecord]
    metric_key: str = "accuracy"
    """The same as result.json calls it."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores that take no model, by name and metric."""
    notes: list[str] = field(default_factory=list)

    def method(self, key: str) -> Method | None:
        """The row of a method, if it has a score."""
        return next((m for m in self.methods if m.key == key and m.score is not None), None)

    def step(self, path: str | None) -> StepRecord | None:
        """The step of a path."""
        return next((s for s in self.steps if s.path == path), None)


def number(value: object) -> float | None:
    """The value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float can hold
        return None


def clean(value: object) -> str:
    """Text without the characters that neither XML nor UTF-8 can hold."""
    return "".join(c for c in str(value) if (c >= " " or c in "\n\t") and not "\ud800" <= c <= "\udfff")
