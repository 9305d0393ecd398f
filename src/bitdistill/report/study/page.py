"""The report of a folder of studies: one page, its Markdown, and ``summary.json``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..html import details, document, gallery, notes, paragraph, section, step_section
from ..markdown import escaped, table_section
from ..plots import Chart
from ..records import StepRecord, clean
from ..tables import Table, shares_table
from ..words import MISSING, duration, stage_name
from .cells import Study, studies
from .charts import difference_chart, size_chart, stage_2_charts, step_charts
from .reading import read_study
from .records import StudyRecord
from .results import Entry, main_entries, summary_json
from .steps import shown_steps
from .tables import costs_table, main_table, rates_table, study_table

SUMMARY_FILE = "summary.json"
CURVES = (
    "Curves and weights of the main table's rows, each of the run of its lowest seed; a step that several rows share "
    "is shown once, under the first of them. Flips: the share of codes that one optimizer step changes, measured at "
    "single steps and drawn times 1,000: a code that goes to and fro counts each time. Weight histograms: latents over "
    "their absmean scale, before and after the step; the dashed lines at ±0.5 are where a code turns from 0 to ±1."
)


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """Everything that the report shows."""

    name: str
    records: list[StudyRecord]
    studies: list[Study]
    entries: list[Entry]
    steps: list[tuple[StepRecord, list[Chart]]]
    tables: dict[str, Table]
    remarks: tuple[str, ...]
    """What was left out of tables, and files that could not be used."""


def render_study(folder: Path) -> tuple[dict[str, str] | None, list[str]]:
    """``report.html``, ``report.md`` and ``summary.json`` of a folder by name, None if it holds no record; and what was
    wrong with files.

    Raises:
        CheckpointError: a record has a format that this version does not know.
        BitDistillError: matplotlib is not installed.
    """
    records, damaged = read_study(folder)
    if not records:
        return None, damaged
    found = studies(records)
    entries, left_out = main_entries(found)
    report = StudyReport(
        name=folder.resolve().name,
        records=records,
        studies=found,
        entries=entries,
        steps=step_charts(shown_steps(entries)),
        tables=study_tables(found, entries),
        remarks=(*left_out, *damaged),
    )
    pages = {
        "report.html": _html(report),
        "report.md": _markdown(report),
        SUMMARY_FILE: summary_text(entries),
    }
    return pages, damaged


def summary_text(entries: Sequence[Entry]) -> str:
    """What ``summary.json`` holds."""
    return json.dumps(summary_json(entries), indent=1) + "\n"


def study_tables(found: Sequence[Study], entries: Sequence[Entry]) -> dict[str, Table]:
    """All tables by name; that of a study is called ``study NAME``."""
    tables = {"main": main_table(entries)} if entries else {}
    tables |= {f"study {study.name}": study_table(study) for study in found if not _is_in(study, entries)}
    rates = rates_table(found)
    tables |= {"learning rates": rates} if rates else {}
    steps = [shown.step for shown in shown_steps(entries)]
    tables |= {"costs": costs_table(entries)} if entries else {}
    return tables | ({"trit shares": shares_table(steps)} if steps else {})


def _is_in(study: Study, entries: Sequence[Entry]) -> bool:
    """Whether the main table shows every cell of a study."""
    shown = {(id(entry.column), key) for entry in entries for key in entry.keys.values()}
    return all((id(column), key) in shown for column in study.columns for key in column.cells)


def summary(report: StudyReport) -> str:
    """What there is and how the main table came out, in a paragraph."""
    records, entries = report.records, report.entries
    num_studies = len({record.study for record in records})
    failed = sum(bool(record.failed) for record in records)
    runs = f"{len(records)} {'run' if len(records) == 1 else 'runs'}"
    sentences = [f"{runs} of {num_studies} {'study' if num_studies == 1 else 'studies'}; {failed} failed."]
    judged = [entry for entry in entries if entry.misses is not None]
    if judged:
        reached = sum(not entry.misses for entry in judged)
        sentences.append(f"Of {len(judged)} rows that can be held against the bar, {reached} reach it.")
    useless = sum(not entry.informative for entry in entries)
    if useless:
        sentences.append(f"{useless} of {len(entries)} rows of the main table are uninformative.")
    if not entries:
        sentences.append(
            "No run with all four methods was judged on the test items, so there is no main table."
        )
    return " ".join(sentences)


def _html(report: StudyReport) -> str:
    body = [paragraph(summary(report), "summary")]
    by_task: dict[str, list[Entry]] = {}
    for entry in report.entries:
        by_task.setdefault(entry.column.task, []).append(entry)
    for name, table in report.tables.items():
        body.append(section(table))
        if name == "main":
            drawn = (size_chart(task, own) for task, own in by_task.items())
            body.append(gallery([chart for chart in drawn if chart]))
        for study in report.studies:
            if name == f"study {study.name}":
                charts = (difference_chart(study, column) for column in study.columns)
                body.append(gallery([chart for chart in charts if chart]))
    if report.steps:
        body += ["<h2>Curves and weights</h2>", paragraph(CURVES), gallery(stage_2_charts(report.entries))]
        for step, own_charts in report.steps:
            body.append(
                step_section(
                    step.path, (f"{stage_name(step)} · {duration(step.time_s)}",), [gallery(own_charts)]
                )
            )
    body.append("<h2>Recipes</h2>")
    for study in report.studies:
        own = [record for record in report.records if record.study == study.name]
        first = next((record for record in own if record.is_reference), own[0])
        body.append(details(f"{study.name}: {first.path}", first.meta.get("recipe") or MISSING))
    body += ["<h2>Where the numbers come from</h2>", notes((*origin(report.records), *report.remarks))]
    return document(report.name, "study", body)


def _markdown(report: StudyReport) -> str:
    parts = [
        f"# {escaped(report.name)}",
        escaped(summary(report)),
        *map(table_section, report.tables.values()),
        "## Where the numbers come from",
        "\n".join(f"- {escaped(line)}" for line in (*origin(report.records), *report.remarks)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def origin(records: Sequence[StudyRecord]) -> list[str]:
    """Machines, versions, revisions and times of all runs."""

    def listed(key: str) -> str:
        return ", ".join(dict.fromkeys(clean(record.meta.get(key) or MISSING) for record in records))

    versions: dict[str, None] = {}
    for record in records:
        found = record.meta.get("versions")
        pairs = found.items() if isinstance(found, dict) else ()
        versions |= dict.fromkeys(f"{clean(name)} {clean(version)}" for name, version in pairs)
    finished = sorted(str(time) for record in records if (time := record.meta.get("finished")))
    return [
        f"Machine: {listed('machine')}.",
        f"Git revision: {listed('git_revision')}.",
        f"Versions: {', '.join(versions) or MISSING}.",
        f"Finished: {finished[0]} to {finished[-1]}." if finished else f"Finished: {MISSING}.",
    ]
