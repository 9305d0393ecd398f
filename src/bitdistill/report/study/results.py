"""What the main study says: the four methods beside each other, gap closure, and a verdict against the bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...config import METHODS
from ...recipe import DISTILL_PRESETS
from ..summary import MIN_GAP_POINTS, MIN_OVER_MAJORITY_POINTS
from .cells import DISTILLED, Cell, Column, Key, Study
from .statistics import Interval, closure_interval

MAIN = "main"
"""The study whose rows come first where two studies have rows for one place of the main table."""
PRESET_KEY = "distill.preset"
LOWEST_DIFFERENCE_POINTS = {"qnli": -1.0, "mnli": -1.0, "sst2": -2.0}
"""The bar: the 95 % interval of BitDistill minus the better full-precision row lies above this many points."""
LOWEST_CLOSURE = 0.9
"""The bar: gap closure, where there is a gap of MIN_GAP_POINTS."""
FULL_PRECISION = ("fp16_sft", "fp16_ct_sft")
DIRECT = "bitnet_sft"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the main table: the four methods on one task, from one base, with one preset."""

    study: str
    column: Column
    preset: str
    keys: dict[str, Key]
    """Keys of the cells by method; a method that was not run has none."""

    def cell(self, method: str) -> Cell | None:
        """The cell of a method, if it was run."""
        return self.column.cells[self.keys[method]] if method in self.keys else None

    @property
    def seeds(self) -> list[int]:
        """Seeds of any of the methods."""
        return sorted({seed for key in self.keys.values() for seed in self.column.cells[key].seeds})

    @property
    def better(self) -> str | None:
        """The full-precision row with the higher mean, which differences are quoted against."""
        known = [method for method in FULL_PRECISION if method in self.keys]
        return max(known, key=lambda m: self.column.cells[self.keys[m]].mean, default=None)

    @property
    def difference(self) -> Interval | None:
        """BitDistill minus the better full-precision row; None if one is missing or they cannot be paired."""
        return self._to_better(DISTILLED)

    @property
    def direct_difference(self) -> Interval | None:
        """BitNet-SFT minus the better full-precision row: what a bar that BitDistill reaches could have told apart."""
        return self._to_better(DIRECT)

    def _to_better(self, method: str) -> Interval | None:
        if self.better is None or method not in self.keys:
            return None
        return self.column.difference(self.keys[method], self.keys[self.better])

    @property
    def gap_points(self) -> float | None:
        """Better full-precision row minus BitNet-SFT, in points."""
        full, direct = self.cell(self.better or ""), self.cell(DIRECT)
        return _points(full.mean - direct.mean) if full and direct else None

    @property
    def closure(self) -> tuple[float, tuple[float, float] | None] | None:
        """(BitDistill - BitNet-SFT) / (better FP16 - BitNet-SFT) with its interval; None where the gap is small."""
        student, direct, full = self.cell(DISTILLED), self.cell(DIRECT), self.cell(self.better or "")
        if not (student and direct and full) or (self.gap_points or 0.0) < MIN_GAP_POINTS:
            return None
        keys = [self.keys[method] for method in (DISTILLED, DIRECT, self.better or "")]
        value = (student.mean - direct.mean) / (full.mean - direct.mean)
        if not self.column.are_paired(*keys):
            return value, None
        return value, closure_interval(*(self.column.draws[key] for key in keys))

    @property
    def informative(self) -> bool:
        """Whether the better full-precision row has learned the task; where there are no classes, it always has."""
        full, majority = self.cell(self.better or ""), self.column.majority
        if full is None:
            return False
        return majority is None or _points(full.mean - majority) >= MIN_OVER_MAJORITY_POINTS

    @property
    def misses(self) -> list[str] | None:
        """By how much the row misses the bar, empty if it reaches it; None where it cannot be held against it."""
        bar, difference = LOWEST_DIFFERENCE_POINTS.get(self.column.task), self.difference
        if bar is None or difference is None or not self.informative:
            return None
        found = []
        if (low := 100 * difference.low) <= bar:
            found.append(f"the lower bound by {bar - low:.2f} points")
        if self.closure is not None and self.closure[0] < LOWEST_CLOSURE:
            found.append(f"closure by {LOWEST_CLOSURE - self.closure[0]:.2f}")
        return found

    @property
    def verdict(self) -> str:
        """The row against the bar, in words."""
        if self.better is None or DISTILLED not in self.keys:
            return "rows are missing"
        if not self.informative:
            return "uninformative: proves nothing"
        if self.difference is None:
            return "not paired"
        if self.misses is None:
            return "no bar for this task"
        return f"missed: {', '.join(self.misses)}" if self.misses else "reached"


def main_entries(found: Sequence[Study]) -> tuple[list[Entry], list[str]]:
    """Rows of the main table, by task, size and preset; and which rows were left out of it for others.

    They are judged on the test items, at points that vary nothing but the preset, with all four methods; of the study
    MAIN also those that lack methods.
    """
    entries: dict[tuple[str, str, str], Entry] = {}
    notes = []
    for study in sorted(found, key=lambda study: (study.name != MAIN, study.name)):
        for column in study.columns:
            if column.judged_on != "test":
                continue
            for preset, keys in _by_preset(study, column).items():
                if study.name != MAIN and set(METHODS) - keys.keys():
                    continue
                entry = Entry(study=study.name, column=column, preset=preset, keys=keys)
                first = entries.setdefault((column.task, column.size, preset), entry)
                if first is not entry:
                    notes.append(
                        f"{column.title} with preset {preset} stands in the main table as {first.study} has it; "
                        f"{study.name} has it too."
                    )
    ordered = sorted(entries.values(), key=_place)
    return ordered, notes


def _place(entry: Entry) -> tuple[str, float, str, int, str]:
    base = entry.column.base
    order = (
        list(DISTILL_PRESETS).index(entry.preset) if entry.preset in DISTILL_PRESETS else len(DISTILL_PRESETS)
    )
    return entry.column.task, base.non_embedding_parameters or 0.0, entry.column.size, order, entry.preset


def _by_preset(study: Study, column: Column) -> dict[str, dict[str, Key]]:
    found: dict[str, dict[str, Key]] = {}
    for key, cell in column.cells.items():
        point, method = key
        if method in METHODS and study.points[point].keys() <= {PRESET_KEY}:
            found.setdefault(cell.records[0].preset, {}).setdefault(method, key)
    return found


def summary_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The main table as ``summary.json`` holds it: scores as shares, differences in shares too."""
    return [_summary(entry) for entry in entries]


def _summary(entry: Entry) -> dict[str, Any]:
    def method(name: str) -> dict[str, float | None] | None:
        cell = entry.cell(name)
        return None if cell is None else {"mean": cell.mean, "sd": cell.deviation}

    closure, difference = entry.closure, entry.difference
    return {
        "task": entry.column.task,
        "size": entry.column.size,
        "preset": entry.preset,
        "seeds": entry.seeds,
        **{name: method(name) for name in METHODS},
        "gap_closure": closure and {"mean": closure[0], "ci95": closure[1] and list(closure[1])},
        "diff_ci95": difference and [difference.low, difference.high],
        "informative": entry.informative,
    }


def _points(share: float) -> float:
    """A difference in points; rounded, so that 0.92 - 0.88 is 4."""
    return round(100 * share, 6)
