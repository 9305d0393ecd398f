"""The tables of the report, as text: both renderers print these cells, so that they cannot differ."""

from dataclasses import dataclass, field
from typing import Any

from .records import Method, RunReport, StepRecord, number
from .words import (
    MISSING,
    SHORT_STAGES,
    duration,
    heading,
    human_bytes,
    metric_name,
    percent,
    stage_name,
    users,
)

SIZE_RULE = (
    "Size when packed: ternary linears at 1.6 bits a weight with their scales, everything else, "
    "embeddings included, at 16 bits."
)
SHARE_RULES = (
    "Shares of the codes of all ternary linears; in full precision, of the codes these would have.",
    "Near threshold: latents within 0.05 of half their scale.",
    "Flip rate: codes that differ from those of the step before; a dash if there is none to compare with. In 1,000 "
    "steps: how often a code turns in training, measured at single steps; one that goes to and fro counts each time.",
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Header, rows and what the reader must know beside them."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    num_text: int = 1
    """Leading columns that hold text; the others hold numbers."""
    notes: tuple[str, ...] = field(default_factory=tuple)


LEAD_RULE = "lead-3: the first three sentences of every document, which takes no model."


def score(method: Method) -> str:
    """Score with its standard error, in percent."""
    return _score(method.score, method.stderr)


def _score(value: float | None, stderr: float | None) -> str:
    if value is None:
        return MISSING
    error = "" if stderr is None else f" ± {100 * stderr:.2f}"
    return f"{100 * value:.2f}{error}%"


def full_precision_size(report: RunReport) -> float | None:
    """Bytes of the full-precision model that sizes are held against."""
    rows = {m.key: m for m in report.methods}
    known = (rows[key].size_bytes for key in ("fp16_sft", "fp16_ct_sft") if key in rows)
    return next((size for size in known if size), None)


def accuracy_table(report: RunReport) -> Table:
    """Every method with its score, size, learning rate and time."""
    reference = full_precision_size(report)

    def row(m: Method) -> tuple[str, ...]:
        ratio = MISSING if not (reference and m.size_bytes) else f"{m.size_bytes / reference:.3f}"
        return (
            m.label,
            score(m),
            percent(m.validation),
            human_bytes(m.size_bytes),
            ratio,
            MISSING if m.parameters is None else f"{m.parameters:,.0f}",
            MISSING if m.learning_rate is None else f"{m.learning_rate:g}",
            _times(report, m),
            duration(_total(m)),
        )

    meta = report.meta
    seed, items = meta.get("seed", MISSING), meta.get("eval_items", MISSING)
    return Table(
        title=heading(report.metric),
        header=(
            "Method",
            heading(report.metric),
            "Validation",
            "Size",
            "Size / FP16",
            "Parameters",
            "Learning rate",
            "Time per stage",
            "Time",
        ),
        rows=[row(m) for m in report.methods],
        notes=(
            f"{heading(report.metric)} on {items} {_items(meta)} ± standard error over the items.",
            f"One seed ({seed}): the spread over seeds is not in these numbers.",
            SIZE_RULE,
            "A stage that several methods share was run once; its time counts in each of them.",
        ),
    )


def _items(meta: dict[str, Any]) -> str:
    """What the rows were judged on."""
    return "held-out training items" if meta.get("judged_on") == "validation" else "evaluation items"


def metrics_table(report: RunReport) -> Table | None:
    """Every metric of every method, with baselines that take no model; None if there is one metric alone."""
    keys = list(dict.fromkeys(key for m in report.methods for key in m.others))
    if not keys:
        return None
    rows = [
        (m.label, score(m), *(_score(*m.others.get(key, (None, None))) for key in keys))
        for m in report.methods
    ]
    for name, scores in report.baselines.items():
        rows.append((name, *(percent(scores.get(key)) for key in (report.metric_key, *keys))))
    return Table(
        title="All metrics",
        header=("Method", *(heading(name) for name in (report.metric, *map(metric_name, keys)))),
        rows=rows,
        notes=tuple(
            note
            for note, is_needed in (
                (f"Learning rates were chosen by {report.metric}.", True),
                ("BLEU is over all items at once; its standard error is bootstrapped.", "bleu" in keys),
                (LEAD_RULE, "lead-3" in report.baselines),
            )
            if is_needed
        ),
    )


def _total(method: Method) -> float | None:
    times = [method.time_s.get(path) for path in method.steps]
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if known and len(known) == len(times) else None


def _times(report: RunReport, method: Method) -> str:
    def name(path: str) -> str:
        step = report.step(path)
        return SHORT_STAGES.get(step.stage if step else "", path)

    return "; ".join(f"{name(path)} {duration(method.time_s.get(path))}" for path in method.steps) or MISSING


def grid_table(report: RunReport) -> Table | None:
    """Validation score by learning rate, where a grid was run."""
    searched = [m for m in report.methods if m.grid]
    rates = sorted({rate for m in searched for rate in m.grid}, key=as_rate)
    if not searched:
        return None

    def cell(m: Method, rate: str) -> str:
        is_chosen = m.learning_rate is not None and as_rate(rate) == m.learning_rate
        return (percent(m.grid[rate]) if rate in m.grid else "") + (" (chosen)" if is_chosen else "")

    return Table(
        title="Learning rates",
        header=("Method", *rates),
        rows=[(m.label, *(cell(m, rate) for rate in rates)) for m in searched],
        notes=(f"Validation {report.metric} on held-out training data, by learning rate.",),
    )


def as_rate(text: str) -> float:
    """A learning rate as a grid writes it; infinite if it is none."""
    try:
        return float(text)
    except ValueError:
        return float("inf")


def weights_table(report: RunReport) -> Table:
    """Trit shares and flip rates after each step of a run."""
    return shares_table(report.steps)


def shares_table(steps: list[StepRecord]) -> Table:
    """Trit shares and flip rates after each of some steps."""
    recorded = [step for step in steps if step.weights]
    absent = [step.path for step in steps if not step.weights]
    rows: list[tuple[str, ...]] = [
        (
            step.path,
            percent(w.minus_frac),
            percent(w.zero_frac),
            percent(w.plus_frac),
            percent(w.near_threshold_frac),
            "-" if w.flip_rate is None else percent(w.flip_rate),
            f"{1000 * sum(flips) / len(flips):.2f}" if (flips := step.curve("quant/flip_rate")[1]) else "-",
        )
        for step in recorded
        if (w := step.weights)
    ]
    return Table(
        title="Trit shares",
        header=("Step", "-1", "0", "+1", "Near threshold", "Flip rate", "Flips per code in 1,000 steps"),
        rows=rows,
        notes=(*SHARE_RULES, f"Not recorded: {', '.join(absent)}.") if absent else SHARE_RULES,
    )


def steps_table(report: RunReport) -> Table:
    """Every step once: stage, who uses it, time, and where its loss ended."""
    return Table(
        title="Steps",
        header=(
            "Step",
            "Stage",
            "Used by",
            "Time",
            "Optimizer steps",
            "Last CE",
            "Last loss",
        ),
        rows=[
            (
                step.path,
                stage_name(step),
                users(step, len(report.methods)),
                duration(step.time_s),
                _last(step, "step", ",.0f"),
                _last(step, "loss/ce", ".4g"),
                _last(step, "loss", ".4g"),
            )
            for step in report.steps
        ],
        num_text=3,
    )


def _last(step: StepRecord, key: str, form: str) -> str:
    value = next((line[key] for line in reversed(step.log) if key in line), None)
    absent = "-" if step.stage == "stage1_refine" else MISSING  # surgery takes no optimizer step
    return absent if value is None else format(value, form)


def facts(report: RunReport) -> list[tuple[str, str]]:
    """Where, when and with what the run was made."""
    meta: dict[str, Any] = report.meta
    versions = meta.get("versions")
    listed = versions if isinstance(versions, dict) else {}
    return [
        ("Task", str(meta.get("task") or MISSING)),
        ("Seed", str(meta.get("seed", MISSING))),
        ("Total time", duration(number(meta.get("total_time_s")))),
        ("Finished", str(meta.get("finished") or MISSING)),
        ("Machine", str(meta.get("machine") or MISSING)),
        ("Git revision", str(meta.get("git_revision") or MISSING)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in listed.items()) or MISSING),
    ]
