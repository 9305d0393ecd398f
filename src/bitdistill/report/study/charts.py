"""The charts of a study."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint import digest_of
from ...config import LABELS, METHODS
from ..plots import Chart, Curve, compare, draw, histogram, loss_charts
from ..records import StepRecord, Weights
from ..svg import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE
from ..words import heading, metric_name
from .cells import DISTILLED, Column, Study
from .results import Entry
from .statistics import Interval
from .steps import ShownStep, representative, steps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE_COLOURS = {"fp16_sft": INK, "fp16_ct_sft": MUTED, "bitnet_sft": ORANGE}
PRESET_COLOURS = (BLUE, GREEN, PURPLE)
DODGE = 1.03
"""Ratio of the places of neighbouring lines at one size, so that their whiskers do not lie on each other."""


def size_chart(task: str, entries: Sequence[Entry]) -> Chart | None:
    """Scores of the methods on one task against the size of the base, with 95 % intervals; None if none is known."""
    metric = metric_name(entries[0].column.metric)
    majority = [entry.column.majority for entry in entries if entry.column.majority is not None]
    lines = _lines(entries)

    def paint(axes: "Axes") -> None:
        sizes: dict[float, str] = {}
        for index, (label, (colour, places)) in enumerate(lines.items()):
            shift = DODGE ** (index - (len(lines) - 1) / 2)
            xs = [shift * size for size, _ in places]
            ys = [100 * found.value for _, found in places]
            below = [max(0.0, y - 100 * found.low) for y, (_, found) in zip(ys, places, strict=True)]
            above = [max(0.0, 100 * found.high - y) for y, (_, found) in zip(ys, places, strict=True)]
            axes.errorbar(xs, ys, yerr=[below, above], color=colour, marker="o", markersize=3.5, label=label)
        for entry in entries:
            sizes[entry.column.base.non_embedding_parameters or 1.0] = entry.column.base.size
        axes.set_xscale("log")
        axes.set_xticks(sorted(sizes), [sizes[size] for size in sorted(sizes)])
        axes.minorticks_off()
        axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.35)
        if majority:
            axes.axhline(100 * majority[0], color=MUTED, linestyle="--", linewidth=1)
        dashed = "; dashed: commonest class" if majority else ""
        axes.set_xlabel(f"parameters outside the embedding\nwhiskers: 95 %{dashed}")
        axes.set_ylabel(f"{metric}, %")
        axes.figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2)

    title = f"{heading(metric)} against size, {task}"
    return draw(f"size {task}", title, paint, height=3.0) if lines else None


def _lines(entries: Sequence[Entry]) -> dict[str, tuple[str, list[tuple[float, Interval]]]]:
    """Colour and points by label: a line for each baseline, where several presets have it of the first, and preset."""
    presets = list(dict.fromkeys(entry.preset for entry in entries))
    lines: dict[str, tuple[str, list[tuple[float, Interval]]]] = {}
    for method in METHODS:
        seen = set()
        for entry in entries:
            if method not in entry.keys or (found := entry.column.interval(entry.keys[method])) is None:
                continue
            label, colour = LABELS[method], BASELINE_COLOURS.get(method, BLUE)
            if method == DISTILLED and len(presets) > 1:
                label = f"{label}, {entry.preset}"
                colour = PRESET_COLOURS[presets.index(entry.preset) % len(PRESET_COLOURS)]
            place = (label, entry.column.size)
            if place not in seen:
                seen.add(place)
                size = entry.column.base.non_embedding_parameters or 1.0
                lines.setdefault(label, (colour, []))[1].append((size, found))
    return lines


def difference_chart(study: Study, column: Column) -> Chart | None:
    """Differences of all rows of a study to its reference in one column; None if there is none."""
    rows = [
        (" · ".join(study.row_label(key)), found)
        for key in study.rows
        if {key, study.reference} <= column.cells.keys() and key != study.reference
        if (found := column.difference(key, study.reference)) is not None
    ]

    def paint(axes: "Axes") -> None:
        for y, (label, found) in enumerate(rows):
            value, low, high = (100 * x for x in (found.value, found.low, found.high))
            is_clear = low > 0 or high < 0
            axes.barh(y, value, 0.42, color=BLUE if value >= 0 else ORANGE, alpha=0.85 if is_clear else 0.4)
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(value, y, xerr=error, color=INK, linewidth=1.5)
            text = axes.text(
                0.0, y - 0.3, _shortened(label), va="bottom", transform=axes.get_yaxis_transform()
            )
            text.set_in_layout(False)  # a long label must not shrink the bars
        axes.axvline(0, color=INK, linewidth=1)
        axes.set(ylim=(len(rows) - 0.5, -0.8), yticks=[])
        axes.set_xlabel("points; whiskers: 95 %; pale: the interval holds 0")

    reference = " · ".join(study.row_label(study.reference))
    title = f"{column.title}: difference to {reference}"
    owner = f"{study.name} {column.judged_on}"
    return draw(owner, title, paint, height=0.8 + 0.42 * len(rows)) if rows else None


def _shortened(label: str) -> str:
    return label if len(label) <= 58 else f"{label[:55]} ..."


def stage_2_charts(entries: Sequence[Entry]) -> list[Chart]:
    """Cross-entropy of stage 2, ternary beside full precision, once where runs share it."""
    charts: dict[str, Chart] = {}
    for entry in entries:
        record = representative(entry)
        curves: dict[str, Curve] = {}
        for label, method in (("ternary", DISTILLED), ("full precision", "fp16_ct_sft")):
            step = next((s for s in steps_of(record, method) if s.stage == "stage2_pretrain"), None)
            if step is not None and (curve := step.curve("loss/ce"))[0]:
                curves[label] = curve
        key = digest_of([entry.column.base.identity, curves])
        if len(curves) == 2 and key not in charts:
            title = f"{entry.column.size}: cross-entropy of stage 2"
            charts[key] = compare(f"stage 2 {key}", title, curves, is_log=False)
    return list(charts.values())


def step_charts(steps: Sequence[ShownStep]) -> list[tuple[StepRecord, list[Chart]]]:
    """Every step with its charts."""
    return [(shown.step, _step_charts(shown.step, shown.before)) for shown in steps]


def _step_charts(step: StepRecord, before: Weights | None) -> list[Chart]:
    """Losses on the task, flips along training, weights before and after."""
    charts = [] if step.stage == "stage2_pretrain" else loss_charts(step)
    steps, flips = step.curve("quant/flip_rate")
    if any(flips):
        per_thousand = {"": (steps, [1000 * flip for flip in flips])}
        charts.append(compare(step.path, "Flips per code in 1,000 steps", per_thousand, is_log=False))
    if step.weights:
        charts.append(histogram(step, step.weights, before))
    return charts
