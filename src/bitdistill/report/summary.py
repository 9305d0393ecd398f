"""One paragraph in plain words, computed from the numbers and from nothing else."""

import math

from .records import Method, RunReport, number
from .words import human_bytes, percent

MIN_GAP_POINTS = 4.0
"""A smaller gap between BitNet-SFT and full precision is too near to noise to divide by."""
MIN_OVER_MAJORITY_POINTS = 5.0
"""A full-precision row nearer to the majority class has learned too little for rows to be compared."""


def better_full_precision(report: RunReport) -> Method | None:
    """The better of FP16-SFT and FP16-CT-SFT, which gaps are quoted against."""
    rows = [m for key in ("fp16_sft", "fp16_ct_sft") if (m := report.method(key))]
    return max(rows, key=lambda m: m.score or 0.0, default=None)


def summary(report: RunReport) -> str:
    """The paragraph at the top of the report."""
    student, direct = report.method("bitdistill"), report.method("bitnet_sft")
    full = better_full_precision(report)
    sentences = []
    if student is None:
        sentences.append("This run has no BitDistill row; the table shows what was measured.")
    else:
        sentences.append(_opening(report, student, full))
        if direct:
            sentences.append(
                f"It is {_distance(student, direct)} {direct.label} ({percent(direct.score, 1)}), "
                f"the direct ternary fine-tune{_noise(student, direct)}."
            )
    if full and direct:
        sentences.append(_closure(student, direct, full))
    if full and student and full.size_bytes and student.size_bytes:
        sentences.append(_size(full, student))
    sentences += _warnings(report, full)
    return " ".join(sentences)


def _opening(report: RunReport, student: Method, full: Method | None) -> str:
    items = number(report.meta.get("eval_items"))
    on = f"{report.meta.get('task') or 'the task'}" + (f" ({items:,.0f} evaluation items)" if items else "")
    reached = f"On {on}, {student.label} reaches {percent(student.score, 1)} {report.metric}"
    if full is None:
        return f"{reached}; there is no full-precision row to hold it against."
    which = "the better full-precision row" if _has_both(report) else "the full-precision row"
    against = f"{full.label} ({percent(full.score, 1)}), {which}{_noise(student, full)}"
    return f"{reached}, {_distance(student, full)} {against}."


def _has_both(report: RunReport) -> bool:
    return bool(report.method("fp16_sft") and report.method("fp16_ct_sft"))


def points(a: Method, b: Method) -> float:
    """Score of ``a`` minus score of ``b`` in percentage points; rounded, so that 0.92 - 0.88 is 4."""
    return round(100 * ((a.score or 0.0) - (b.score or 0.0)), 6)


def _distance(a: Method, b: Method) -> str:
    difference = points(a, b)
    if f"{abs(difference):.1f}" == "0.0":
        return "level with"
    return f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'}"


def _noise(a: Method, b: Method) -> str:
    if a.stderr is None or b.stderr is None or points(a, b) == 0:
        return ""
    # Both rows answer the same items, so the unpaired error is, if anything, too large.
    is_noise = abs(points(a, b)) <= 200 * math.hypot(a.stderr, b.stderr)
    return ", and within two standard errors of it" if is_noise else ""


def _closure(student: Method | None, direct: Method, full: Method) -> str:
    gap = points(full, direct)
    if gap <= 0:
        return f"{direct.label} is not below {full.label}, so there is no gap to close."
    if gap < MIN_GAP_POINTS:
        return (
            f"{direct.label} is only {gap:.1f} points below {full.label}: "
            "the gap is too small to speak of gap closure."
        )
    if student is None:
        return f"{direct.label} is {gap:.1f} points below {full.label}."
    closed = points(student, direct) / gap
    share = f"{100 * closed:.0f}%" if closed > 0 else "none"
    return f"It closes {share} of the {gap:.1f} points between {direct.label} and {full.label}."


def _size(full: Method, student: Method) -> str:
    large, small = full.size_bytes or 1.0, student.size_bytes or 1.0
    ratio = f"{large / small:.1f} times smaller" if large >= small else f"{small / large:.1f} times larger"
    return (
        f"Packed, embeddings included, the student takes {human_bytes(small)} against "
        f"{human_bytes(large)} for {full.label}: {ratio}."
    )


def _warnings(report: RunReport, full: Method | None) -> list[str]:
    lead = report.baselines.get("lead-3", {}).get(report.metric_key)
    if full is not None and lead is not None:
        where = "above" if (full.score or 0.0) > lead else "not above"
        return [
            f"{full.label} is {where} lead-3 ({percent(lead, 1)}), which copies the first three sentences."
        ]
    majority = number(report.meta.get("majority_accuracy"))
    if full is None or majority is None:
        return []
    above = round(100 * ((full.score or 0.0) - majority), 6)
    if above >= MIN_OVER_MAJORITY_POINTS:
        return []
    where = f"only {above:.1f} points above" if above > 0 else "not above"
    baseline = f"always answering the majority class ({percent(majority, 1)})"
    return [f"{full.label} itself is {where} {baseline}, so this comparison is uninformative."]
