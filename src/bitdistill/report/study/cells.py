"""Records grouped into the cells of tables: one method at one point, on one task from one base, over its seeds."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...config import METHODS, Recipe
from ...recipe import to_dict
from ..records import Method, clean, number
from .records import Base, Items, StudyRecord
from .statistics import Draws, Interval, deviation, interval, mean, resampled_means

Key = tuple[str, str]
"""Point, as ``point_key`` writes it, and method."""
DISTILLED = "bitdistill"


def point_key(point: dict[str, Any]) -> str:
    """A point as text, the same for the same values."""
    return json.dumps(point, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the seeds of one method at one point scored on one task from one base."""

    records: tuple[StudyRecord, ...]
    """By seed."""
    methods: tuple[Method, ...]
    items: tuple[Items, ...]
    """``[N]`` of each seed."""

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return self.methods[0].label

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records)

    @property
    def mean(self) -> float:
        """Mean score over seeds, a share."""
        return mean(tuple(method.score or 0.0 for method in self.methods))

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None of one seed."""
        return deviation(tuple(method.score or 0.0 for method in self.methods))

    @property
    def num_items(self) -> int | None:
        """Items that every seed answered; None where that differs."""
        counts = {len(items) for items in self.items}
        return counts.pop() if len(counts) == 1 else None

    @property
    def answered(self) -> str | None:
        """Digest of the items that every seed answered; None where that differs."""
        digests = {record.items_digest for record in self.records}
        return digests.pop() if len(digests) == 1 else None

    def has_items_of(self, other: "Cell") -> bool:
        """Whether both gave the same answers at the same seeds: the same run, counted at two points."""
        same = (np.array_equal(a, b) for a, b in zip(self.items, other.items, strict=False))
        return self.seeds == other.seeds and all(same)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One task from one base, judged on one part of the data: cells here answered the same items."""

    task: str
    base: Base
    size: str
    """Size of the base in words, unlike that of any other base of the folder."""
    judged_on: str
    metric: str
    majority: float | None
    cells: dict[Key, Cell]
    failures: tuple[StudyRecord, ...]

    @property
    def title(self) -> str:
        return f"{self.task} {self.size}"

    @cached_property
    def draws(self) -> dict[Key, Draws]:
        """Resampled means of every cell whose seeds answered the same items."""
        digests = {digest for cell in self.cells.values() if (digest := cell.answered)}
        found: dict[Key, Draws] = {}
        for digest in sorted(digests):
            cells = {key: cell for key, cell in self.cells.items() if cell.answered == digest}
            found |= resampled_means({k: (c.seeds, np.stack(c.items)) for k, c in cells.items()})
        return found

    def are_paired(self, *keys: Key) -> bool:
        """Whether cells can be compared item by item."""
        digests = {self.cells[key].answered for key in keys}
        return len(digests) == 1 and None not in digests

    def interval(self, key: Key) -> Interval | None:
        """The mean of a cell with its 95 % interval over items and seeds."""
        draws = self.draws.get(key)
        return None if draws is None else interval(self.cells[key].mean, draws)

    def difference(self, key: Key, reference: Key) -> Interval | None:
        """Mean of a cell minus that of another with the paired 95 % interval; None if they cannot be paired."""
        if not self.are_paired(key, reference):
            return None
        value = self.cells[key].mean - self.cells[reference].mean
        return interval(value, self.draws[key] - self.draws[reference])


@dataclass(frozen=True, kw_only=True)
class Study:
    """All cells of one study."""

    name: str
    title: str
    columns: list[Column]
    points: dict[str, dict[str, Any]]
    """Values by point key, the reference first."""

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """Recipe keys that are not the same at every point."""
        keys = dict.fromkeys(key for point in self.points.values() for key in point)
        values = {key: {_text(point.get(key)) for point in self.points.values()} for key in keys}
        return tuple(key for key in keys if len(values[key]) > 1)

    @cached_property
    def methods(self) -> list[str]:
        """Keys of all methods in the order of the paper's table, ablations behind their method."""
        return sorted({method for column in self.columns for _, method in column.cells}, key=_method_order)

    @cached_property
    def reference(self) -> Key:
        """The row that others are held against: BitDistill, or else the last method, at the first point."""
        first = next(iter(self.points))
        there = {method for column in self.columns for point, method in column.cells if point == first}
        known = [method for method in self.methods if method in there] or [DISTILLED]
        plain = [method for method in known if ":" not in method]
        return first, DISTILLED if DISTILLED in known else (plain or known)[-1]

    @cached_property
    def rows(self) -> list[Key]:
        """Keys of the rows, point by point; a method that is the same run at every point is there once."""
        known = dict.fromkeys(key for column in self.columns for key in column.cells)
        failed = {self.key_of(record) for column in self.columns for record in column.failures}
        wanted = known.keys() | failed
        ordered = [(point, method) for point in self.points for method in (*self.methods, DISTILLED)]
        keys = [key for key in dict.fromkeys(ordered) if key in wanted]
        once = {method for method in self.methods if self.is_same_at_every_point(method)}
        firsts = {method: next(key for key in keys if key[1] == method) for method in once}
        return [key for key in keys if key[1] not in once or key == firsts[key[1]]]

    def key_of(self, failure: StudyRecord) -> Key:
        """Where a failed run stands in tables; nobody knows which of its methods failed."""
        return point_key(failure.point), self.reference[1]

    def is_same_at_every_point(self, method: str) -> bool:
        """Whether a method gave the same answers at all points that have it: what varies is not its own.

        Never the method of the reference row, which is what the study is about.
        """
        if method == self.reference[1]:
            return False
        most = 0
        for column in self.columns:
            cells = [cell for (_, m), cell in column.cells.items() if m == method]
            if not all(cell.has_items_of(cells[0]) for cell in cells):
                return False
            most = max(most, len(cells))
        return most > 1

    def point_label(self, point: str) -> str:
        """What varies, with its values here."""
        names = Counter(key.rpartition(".")[2] for key in self.varied)
        parts = []
        for key in self.varied:
            if key in self.points[point]:
                last = key.rpartition(".")[2]
                parts.append(f"{last if names[last] == 1 else key} {_text(self.points[point][key])}")
        return ", ".join(parts) or "as in the recipe"

    def method_label(self, method: str) -> str:
        """A method as its rows call it."""
        cells = (cell for column in self.columns for (_, m), cell in column.cells.items() if m == method)
        return next((cell.label for cell in cells), method)

    def row_label(self, key: Key) -> tuple[str, str]:
        """Point and method of a row."""
        point, method = key
        everywhere = self.is_same_at_every_point(method)
        return "every point" if everywhere else self.point_label(point), self.method_label(method)


def studies(records: Sequence[StudyRecord]) -> list[Study]:
    """The studies of a folder by name, with their columns by task and size."""
    sizes = size_labels(record.base for record in records)
    found = []
    for name in sorted({record.study for record in records}):
        own = [record for record in records if record.study == name]
        found.append(
            Study(
                name=name,
                title=own[0].title,
                columns=_columns(own, sizes),
                points=_ordered_points(own),
            )
        )
    return found


def size_labels(bases: Iterable[Base]) -> dict[str, str]:
    """Labels by identity: the size; with the name where two have one size, with the digest where names are one too."""
    known = {base.identity: base for base in bases}
    sizes = Counter(base.size for base in known.values())
    names = Counter((base.size, base.name) for base in known.values())
    labels = {}
    for identity, base in known.items():
        name = base.name if names[base.size, base.name] == 1 else f"{base.name} {identity[:6]}"
        labels[identity] = base.size if sizes[base.size] == 1 else f"{base.size} ({name})"
    return labels


def _columns(records: Sequence[StudyRecord], sizes: dict[str, str]) -> list[Column]:
    groups: dict[tuple[str, float, str, str], list[StudyRecord]] = {}
    for record in records:
        base = record.base
        place = (record.task, base.non_embedding_parameters or 0.0, base.identity, record.judged_on)
        groups.setdefault(place, []).append(record)
    return [_column(groups[place], sizes) for place in sorted(groups)]


def _column(records: list[StudyRecord], sizes: dict[str, str]) -> Column:
    records = sorted(records, key=lambda record: record.seed)
    cells: dict[Key, list[StudyRecord]] = {}
    for record in records:
        for method in record.methods:
            cells.setdefault((point_key(record.point), method), []).append(record)
    first = next((record for record in records if record.methods), records[0])
    return Column(
        task=first.task,
        base=first.base,
        size=sizes[first.base.identity],
        judged_on=first.judged_on,
        metric=first.metric,
        majority=number(first.meta.get("majority_accuracy")),
        cells={
            key: Cell(
                records=tuple(own),
                methods=tuple(record.methods[key[1]] for record in own),
                items=tuple(record.items[key[1]] for record in own),
            )
            for key, own in cells.items()
        },
        failures=tuple(record for record in records if record.failed),
    )


def _ordered_points(records: Sequence[StudyRecord]) -> dict[str, dict[str, Any]]:
    """The points by their values, numbers as numbers; first the one that is marked, or else the recipe's defaults."""
    points = {point_key(record.point): record.point for record in records}
    marked = {point_key(record.point) for record in records if record.is_reference}
    defaults = to_dict(Recipe(name="defaults"))
    marked = marked or {key for key, point in points.items() if _are_defaults(point, defaults)}
    ordered = sorted(points, key=lambda key: (key not in marked, _point_order(points[key])))
    return {key: points[key] for key in ordered}


def _point_order(point: dict[str, Any]) -> list[tuple[str, bool, float, str]]:
    found = []
    for key, value in sorted(point.items()):
        as_number = number(value)
        found.append((key, as_number is None, as_number or 0.0, _text(value)))
    return found


def _are_defaults(point: dict[str, Any], defaults: dict[str, Any]) -> bool:
    def default(key: str) -> object:
        section: Any = defaults
        for part in key.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        return section

    return all(default(key) == value for key, value in point.items())


def _text(value: object) -> str:
    """A value of a recipe in a label."""
    if isinstance(value, list):
        return "[" + " ".join(map(_text, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return clean(value) if isinstance(value, str) else json.dumps(value)


def _method_order(method: str) -> tuple[int, int, str]:
    name, _, ablations = method.partition(":")
    return METHODS.index(name) if name in METHODS else len(METHODS), len(ablations), ablations
