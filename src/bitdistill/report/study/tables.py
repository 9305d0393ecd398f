"""The tables of a study, as text."""

from collections.abc import Sequence
from statistics import median

from ...config import LABELS, METHODS
from ..records import StepRecord
from ..summary import MIN_GAP_POINTS, MIN_OVER_MAJORITY_POINTS
from ..tables import Table, as_rate
from ..words import MISSING, SHORT_STAGES, duration, heading, metric_name
from .cells import DISTILLED, Cell, Column, Key, Study
from .records import StudyRecord
from .results import DIRECT, LOWEST_CLOSURE, LOWEST_DIFFERENCE_POINTS, Entry
from .statistics import DRAWS, Interval

INTERVALS = (
    f"Brackets: 95 % intervals of a paired bootstrap ({DRAWS:,} draws) over items and seeds; of one seed, over items "
    "alone."
)


def points(interval: Interval | None) -> str:
    """A difference in points with its interval."""
    if interval is None:
        return "not paired"
    return f"{100 * interval.value:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def score(cell: Cell | None) -> str:
    """Mean and spread over seeds, in percent."""
    if cell is None:
        return MISSING
    spread = "" if cell.deviation is None else f" ± {100 * cell.deviation:.2f}"
    return f"{100 * cell.mean:.2f}{spread}"


def main_table(entries: Sequence[Entry]) -> Table:
    """The four methods on every task, size and preset, and the verdict."""

    def row(entry: Entry) -> tuple[str, ...]:
        def difference(method: str, interval: Interval | None) -> str:
            return points(interval) if entry.better is not None and method in entry.keys else MISSING

        return (
            entry.column.task,
            entry.column.size,
            entry.preset,
            str(len(entry.seeds)),
            *(score(entry.cell(method)) for method in METHODS),
            difference(DIRECT, entry.direct_difference),
            difference(DISTILLED, entry.difference),
            _closure(entry),
            entry.verdict,
        )

    return Table(
        title="The four methods",
        header=(
            "Task",
            "Size",
            "Preset",
            "Seeds",
            *(LABELS[method] for method in METHODS),
            "BitNet-SFT - better FP16, points",
            "BitDistill - better FP16, points",
            "Gap closure",
            "Against the bar",
        ),
        rows=[row(entry) for entry in entries],
        num_text=3,
        notes=(*_main_notes(entries), *_failures([entry.column for entry in entries])) if entries else (),
    )


def _closure(entry: Entry) -> str:
    if entry.closure is None:
        gap = entry.gap_points
        return "-" if gap is None else f"- (gap {gap:.1f} points)"
    value, bounds = entry.closure
    return f"{value:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else f"{value:.2f} [not certain]"


def _main_notes(entries: Sequence[Entry]) -> list[str]:
    metrics = ", ".join(dict.fromkeys(metric_name(entry.column.metric) for entry in entries))
    items = {entry.column.task: entry.cell(next(iter(entry.keys))) for entry in entries}
    counts = ", ".join(
        f"{task} {cell.num_items:,}" for task, cell in items.items() if cell and cell.num_items
    )
    bars = ", ".join(f"{bar:.1f} on {task}" for task, bar in LOWEST_DIFFERENCE_POINTS.items())
    notes = [
        f"{heading(metrics)} in percent on the test items ({counts}): mean over seeds ± sample standard deviation.",
        INTERVALS,
        "Better FP16: the full-precision row with the higher mean. Gap closure: (BitDistill - BitNet-SFT) / (better "
        f"FP16 - BitNet-SFT), where that gap is at least {MIN_GAP_POINTS:g} points.",
        f"The bar: lower bound of the difference above {bars}; closure at least {LOWEST_CLOSURE:g} where it is given.",
        f"Uninformative: the better FP16 row is less than {MIN_OVER_MAJORITY_POINTS:g} points above always answering "
        "the commonest class.",
    ]
    if any(len(entry.seeds) == 1 for entry in entries):
        notes.append(
            "Rows of one seed have no spread, and their intervals hold nothing of what a seed changes."
        )
    for entry in entries:
        counts_by_method = {
            LABELS[method]: len(cell.seeds) for method in METHODS if (cell := entry.cell(method))
        }
        if len(set(counts_by_method.values())) > 1:
            listed = ", ".join(f"{label} {count}" for label, count in counts_by_method.items())
            notes.append(f"{entry.column.title}, {entry.preset}: seeds differ by method ({listed}).")
    return notes


def _failures(columns: Sequence[Column]) -> list[str]:
    failed = {id(record): (column, record) for column in columns for record in column.failures}
    return [
        f"{column.title}, seed {record.seed}, {record.path} failed: {record.failed}"
        for column, record in failed.values()
    ]


def study_table(study: Study) -> Table:
    """Every point and method of a study, with the difference to its reference row on each task and size."""
    most = max((len(cell.seeds) for column in study.columns for cell in column.cells.values()), default=1)
    labels = [study.row_label(key) for key in study.rows]
    is_shown = (len(study.points) > 1, len({method for _, method in labels}) > 1)
    shown = [index for index in (0, 1) if is_shown[index]] or [1]
    header = [("Point", "Method")[index] for index in shown]
    judged = {column.judged_on for column in study.columns}
    for column in study.columns:
        part = f", {column.judged_on}" if len(judged) > 1 else ""
        header += [f"{column.title}{part}", "Difference, points"]
    rows = []
    for key, label in zip(study.rows, labels, strict=True):
        cells = [text for column in study.columns for text in _cells(study, column, key, most)]
        rows.append((*(label[index] for index in shown), *cells))
    return Table(
        title=study.title if study.title == study.name else f"{study.name}: {study.title}",
        header=tuple(header),
        rows=rows,
        num_text=len(shown),
        notes=tuple(_study_notes(study, most)),
    )


def _cells(study: Study, column: Column, key: Key, most: int) -> tuple[str, str]:
    cell = column.cells.get(key)
    if cell is None:
        is_failed = any(study.key_of(record) == key for record in column.failures)
        return ("failed", "") if is_failed else ("", "")
    seeds = len(cell.seeds)
    text = score(cell) + ("" if seeds == most else f" ({seeds} {'seed' if seeds == 1 else 'seeds'})")
    if key == study.reference:
        return text, "reference"
    return text, points(column.difference(key, study.reference)) if study.reference in column.cells else ""


def _study_notes(study: Study, most: int) -> list[str]:
    part = {"test": "the test items", "validation": "held-out training items; the test items stayed shut"}
    judged = "; ".join(dict.fromkeys(part.get(c.judged_on, c.judged_on) for c in study.columns))
    metrics = ", ".join(dict.fromkeys(metric_name(c.metric) for c in study.columns if c.metric))
    spread = "one seed" if most == 1 else f"mean over {most} seeds ± their sample standard deviation"
    notes = [f"{heading(metrics)} in percent, {spread}, on {judged}.", INTERVALS]
    if any(column.majority is not None for column in study.columns):
        known = (c for c in study.columns if c.majority is not None)
        listed = ", ".join(f"{c.title} {100 * (c.majority or 0.0):.1f}" for c in known)
        notes.append(f"Always answering the commonest class: {listed}.")
    if any(study.is_same_at_every_point(method) for method in study.methods):
        notes.append(
            "Every point: what varies does not concern this method; all points that have it gave the same answers."
        )
    unpaired = [
        column.title
        for column in study.columns
        if study.reference in column.cells and not column.are_paired(*column.cells)
    ]
    if unpaired:
        notes.append(f"{', '.join(unpaired)}: rows that answered other items cannot be paired.")
    on_edge = [f"{', '.join(row[:3])}: {row[4]}, {row[5]}" for row in rate_rows(study) if row[5]]
    if on_edge:
        notes.append(f"Learning rate on the edge of its grid: {'; '.join(on_edge)}.")
    return notes + _failures(study.columns)


def rate_rows(study: Study) -> list[tuple[str, ...]]:
    """Task, size, point and method, grid, choice, and the edge on which it lies, for every cell with a grid."""
    rows: list[tuple[str, ...]] = []
    for column in study.columns:
        for key in study.rows:
            cell = column.cells.get(key)
            if cell and any(len(method.grid) > 1 for method in cell.methods):
                label = ", ".join(filter(None, study.row_label(key)))
                rows.append((column.task, column.size, label, *_rates(cell)))
    return rows


def _rates(cell: Cell) -> tuple[str, str, str]:
    """Grid, chosen rates, and edges; seeds that took the choice of another have no grid."""
    grids, chosen, edges = [], [], []
    for method in cell.methods:
        if method.learning_rate is None:
            continue
        chosen.append(f"{method.learning_rate:g}")
        rate = float(chosen[-1])  # the grid is written with as many digits
        rates = sorted(map(as_rate, method.grid))
        if len(rates) > 1:
            grids.append(" ".join(f"{value:g}" for value in rates))
            edges += ["lower edge"] * (rate == rates[0]) + ["upper edge"] * (rate == rates[-1])
    return ", ".join(dict.fromkeys(grids)), ", ".join(dict.fromkeys(chosen)), ", ".join(dict.fromkeys(edges))


def rates_table(found: Sequence[Study]) -> Table | None:
    """Learning rates that were chosen on held-out data; None if no grid was run."""
    rows = [(study.name, *row) for study in found for row in rate_rows(study)]
    if not rows:
        return None
    on_edge = sum(bool(row[-1]) for row in rows)
    return Table(
        title="Learning rates",
        header=("Study", "Task", "Size", "Row", "Grid", "Chosen", "On the grid's edge"),
        rows=rows,
        num_text=4,
        notes=(
            "Chosen on held-out training data, with one grid for every method. Where several are given, seeds chose "
            "for themselves.",
            f"{on_edge} of {len(rows)} choices lie on the edge of their grid: a better rate may lie beyond it.",
        ),
    )


def costs_table(entries: Sequence[Entry]) -> Table:
    """Time of every stage of the methods in the main table."""
    stages = list(SHORT_STAGES)
    rows: dict[tuple[str, ...], tuple[str, ...]] = {}
    for entry in entries:
        for method in METHODS:
            cell = entry.cell(method)
            if cell is None:
                continue
            times = _stage_times(cell)
            preset = entry.preset if method == DISTILLED else ""
            total = sum(times.values()) if times else None
            known = (duration(times.get(stage)) if stage in times else "" for stage in stages)
            label = (entry.column.task, entry.column.size, preset, LABELS[method])
            rows.setdefault(label, (*known, duration(total)))
    machines = sorted({str(r.meta.get("machine") or MISSING) for e in entries for r in _records(e)})
    return Table(
        title="Costs",
        header=("Task", "Size", "Preset", "Method", *map(heading, SHORT_STAGES.values()), "Total"),
        rows=[(*label, *cells) for label, cells in rows.items()],
        num_text=4,
        notes=(
            "Wall time of the training of one run, median over seeds, at the chosen learning rate alone. "
            f"{'; '.join(machines)}.",
            "A stage that several rows share was run once; its time counts in each of them.",
        )
        if entries
        else (),
    )


def _records(entry: Entry) -> list[StudyRecord]:
    return [record for key in entry.keys.values() for record in entry.column.cells[key].records]


def _stage_times(cell: Cell) -> dict[str, float]:
    """Median over seeds of the seconds by stage: machines have bad quarters of an hour."""
    by_stage: dict[str, list[float]] = {}
    for record, method in zip(cell.records, cell.methods, strict=True):
        of_seed: dict[str, float] = {}
        for name, seconds in method.time_s.items():
            step: StepRecord | None = record.steps.get(name)
            stage = step.stage if step else ""
            of_seed[stage] = of_seed.get(stage, 0.0) + seconds
        for stage, seconds in of_seed.items():
            by_stage.setdefault(stage, []).append(seconds)
    return {stage: median(seconds) for stage, seconds in by_stage.items()}
