"""The steps of a study that are shown one by one: those behind the rows of the main table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...checkpoint import digest_of
from ..records import StepRecord, Weights
from .cells import DISTILLED
from .records import StudyRecord
from .results import Entry

CHAINS = ("bitnet_sft", DISTILLED)
"""Methods whose steps are shown."""


@dataclass(frozen=True)
class ShownStep:
    """A step, named after the first row that it belongs to."""

    step: StepRecord
    before: Weights | None
    """The weights that the step before it left."""


def representative(entry: Entry) -> StudyRecord | None:
    """The run whose steps stand for a row: that of its lowest seed that has the row of BitDistill."""
    cell = entry.cell(DISTILLED)
    return cell.records[0] if cell else None


def steps_of(record: StudyRecord | None, method: str) -> list[StepRecord]:
    """The recorded steps of a row, in order."""
    if record is None or method not in record.methods:
        return []
    return [record.steps[name] for name in record.methods[method].steps if name in record.steps]


def shown_steps(entries: Sequence[Entry]) -> list[ShownStep]:
    """Steps of the representative run of every row of the main table; a step that rows share once."""
    seen: set[str] = set()
    found = []
    for entry in entries:
        record = representative(entry)
        for method in CHAINS:
            before = None
            for step in steps_of(record, method):
                key = digest_of([entry.column.base.identity, step.path, step.log, step.run.get("metrics")])
                if key not in seen:
                    named = replace(step, path=f"{entry.column.title}, {entry.preset}: {step.path}")
                    found.append(ShownStep(named, before))
                seen.add(key)
                before = step.weights
    return found
