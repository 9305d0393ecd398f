"""The report of models pre-trained from scratch in one run folder: a native BitNet, its full-precision twin, others.

Curves are drawn side by side. What stood on both sides and what did not (initial weights, text, tokens, learning rate)
is in the table, so that nobody takes runs for twins that are none.
"""

import json
import math
from pathlib import Path
from typing import Any

from .collect import collect_pretraining
from .html import details, document, gallery, notes, section
from .markdown import escaped, fence, table_section
from .plots import Chart, Curve, compare, step_charts
from .records import StepRecord, number
from .tables import Table, shares_table
from .words import MISSING, duration

RULES = (
    "Same start: the digest of the untrained model; where two rows share it, they began with the same weights, "
    "tokenizer and vocabulary.",
    "Held-out loss: mean next-token cross-entropy, in nats, of text that no row was trained on; fully quantised where "
    "the row is ternary.",
    "Loss: of the training batches, over the steps since the line before.",
)
DROP = "dashed: the learning rate drops"


def render_pretraining(run_dir: Path) -> dict[str, str] | None:
    """``report.html`` and ``report.md`` of a run folder by name; None if nothing was pre-trained there."""
    steps, damaged = collect_pretraining(run_dir)
    if not steps:
        return None
    name = run_dir.resolve().name
    tables = [curves_table(steps), shares_table(steps)]
    charts = comparison_charts(steps)
    page = [
        gallery(charts),
        *map(section, tables),
        "<h2>One by one</h2>",
        *(_step(step) for step in steps),
        notes(tuple(damaged)),
    ]
    text = [
        f"# {escaped(name)}",
        *map(table_section, tables),
        *(
            f"## {escaped(s.path)}\n\n{fence(json.dumps(s.run, indent=1, ensure_ascii=False), 'json')}"
            for s in steps
        ),
        "\n".join(f"- {escaped(note)}" for note in damaged),
    ]
    return {
        "report.html": document(name, "pre-training from scratch", page),
        "report.md": "\n\n".join(part for part in text if part) + "\n",
    }


def curves_table(steps: list[StepRecord]) -> Table:
    """What every row was, and where it ended."""

    def row(step: StepRecord) -> tuple[str, ...]:
        loss, heldout = _last(step, "loss"), _last(step, "heldout/loss")
        training = _training(step)
        return (
            step.path,
            linears(step),
            str(_settings(step).get("source") or MISSING),
            str(training.get("schedule") or MISSING),
            _number(training.get("learning_rate"), "g"),
            _number(training.get("tokens"), ",.0f"),
            _number(_last(step, "step"), ",.0f"),
            _number(loss, ".4f"),
            _number(heldout, ".4f"),
            MISSING if heldout is None else f"{math.exp(heldout):.2f}",
            duration(step.time_s),
        )

    return Table(
        title="Pre-trained from scratch",
        header=(
            "Model",
            "Linears",
            "Same start",
            "Schedule",
            "Learning rate",
            "Tokens",
            "Steps",
            "Loss",
            "Held-out loss",
            "Held-out perplexity",
            "Time",
        ),
        rows=[row(step) for step in steps],
        num_text=4,
        notes=RULES,
    )


def linears(step: StepRecord) -> str:
    """What the linears of a pre-trained model are."""
    ternary = _training(step).get("ternary")
    return MISSING if ternary is None else "ternary" if ternary else "full precision"


def comparison_charts(steps: list[StepRecord]) -> list[Chart]:
    """Loss, held-out perplexity and learning rate of all of them, each in one chart."""
    owner = "-".join(step.path for step in steps)
    drops = sorted({drop for step in steps if (drop := _drop(step)) is not None})
    labels = [f"{step.path}, {linears(step)}" for step in steps]

    def curves(key: str) -> dict[str, Curve]:
        found = {label: step.curve(key) for label, step in zip(labels, steps, strict=True)}
        return {label: curve for label, curve in found.items() if curve[0]}

    loss, heldout, rate = curves("loss"), curves("heldout/loss"), curves("optim/lr")
    perplexity = {label: (xs, [math.exp(y) for y in ys]) for label, (xs, ys) in heldout.items()}
    where = f"; {DROP}" if drops else ""
    wanted = (
        (f"Training loss, nats{where}", loss, False),
        (f"Held-out perplexity (log scale){where}", perplexity, True),
        ("Learning rate", rate, False),
    )
    return [
        compare(owner, title, found, is_log=is_log, marks=drops) for title, found, is_log in wanted if found
    ]


def _step(step: StepRecord) -> str:
    heading = section(Table(title=step.path, header=(), rows=[]))
    return heading + gallery(step_charts(step, None)) + details("Settings and metrics", step.run)


def _settings(step: StepRecord) -> dict[str, Any]:
    settings = step.run.get("settings")
    return settings if isinstance(settings, dict) else {}


def _training(step: StepRecord) -> dict[str, Any]:
    training = _settings(step).get("training")
    return training if isinstance(training, dict) else {}


def _drop(step: StepRecord) -> float | None:
    """The optimizer step at which a finished two-stage run lowered its learning rate."""
    metrics = step.run.get("metrics")
    total = number(metrics.get("steps")) if isinstance(metrics, dict) else None
    if total is None or not str(_training(step).get("schedule")).startswith("two_stage"):
        return None
    return math.ceil(total / 2) + 1.0  # steps are counted from 1 in the log


def _last(step: StepRecord, key: str) -> float | None:
    return next((line[key] for line in reversed(step.log) if key in line), None)


def _number(value: object, form: str) -> str:
    found = number(value)
    return MISSING if found is None else format(found, form)
