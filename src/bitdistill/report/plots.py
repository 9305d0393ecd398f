"""The charts, drawn by matplotlib without pyplot: no display and no global state is involved."""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint import digest_of
from ..errors import BitDistillError
from .records import RunReport, StepRecord, Weights, number
from .svg import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, inline_svg
from .words import heading, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD_COLOURS = {"bitnet_sft": ORANGE, "bitdistill": BLUE}
PART_COLOURS = {"ce": BLUE, "logits_kd": ORANGE, "relation_kd": GREEN}
PART_NAMES = {"ce": "CE", "logits_kd": "logits KD", "relation_kd": "relation KD"}
LOG_RATIO = 20
"""Largest over smallest value from which a loss axis turns logarithmic."""
WIDE_RATIO = 500
"""The same, from which a logarithmic axis is labelled at powers of ten only."""

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a method's label is a dollar
    "path.simplify_threshold": 0.4,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.2,
}
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart, ready for the page."""

    title: str
    svg: str


def accuracy_chart(report: RunReport) -> Chart | None:
    """Bars from zero with error bars of one standard error; None if no method has a score."""
    rows = [m for m in report.methods if m.score is not None]
    majority = number(report.meta.get("majority_accuracy"))

    def paint(axes: "Axes") -> None:
        for y, m in enumerate(rows):
            value, error = 100 * (m.score or 0.0), 100 * (m.stderr or 0.0)
            name, _, ablation = m.key.partition(":")
            bar = axes.barh(y, value, 0.42, color=METHOD_COLOURS.get(name, MUTED))
            bar.patches[0].set_alpha(0.45 if ablation else 0.85)
            if error:
                axes.errorbar(value, y, xerr=error, color=INK, linewidth=1.5)
            label = axes.text(0, y - 0.27, textwrap.shorten(m.label, 52, placeholder=" ..."), va="bottom")
            label.set_in_layout(False)  # a long label must not shrink the bars
            axes.text(value + error + 1, y, f"{value:.1f}", va="center")
        legend = "whiskers: ± 1 standard error"
        if majority is not None:
            axes.axvline(100 * majority, color=INK, linewidth=1, linestyle="--")
            legend += "; dashed: majority class"
        axes.set(xlim=(0, 114), ylim=(len(rows) - 0.5, -0.75), yticks=[], xticks=range(0, 101, 20))
        axes.set_xlabel(f"{report.metric}, %\n{legend}")

    title = f"{heading(report.metric)} by method"
    return draw(report.name, title, paint, height=0.8 + 0.42 * len(rows)) if rows else None


def step_charts(step: StepRecord, parent: StepRecord | None) -> list[Chart]:
    """Losses, learning rate, code statistics during training, and the weight histogram of one step."""
    charts = loss_charts(step)
    rate = step.curve("optim/lr")
    if rate[0]:
        charts.append(compare(step.path, "Learning rate", {"": rate}, is_log=False))
    codes = {"flip rate": step.curve("quant/flip_rate"), "zero share": step.curve("quant/zero_frac")}
    codes = {name: curve for name, curve in codes.items() if curve[0]}
    if codes:
        charts.append(compare(step.path, "Codes during training", codes, is_log=False))
    if step.weights:
        charts.append(histogram(step, step.weights, parent.weights if parent else None))
    return charts


def loss_charts(step: StepRecord) -> list[Chart]:
    """The cross-entropy, or with distillation the parts of the loss, raw and weighted."""
    keys = sorted({key for line in step.log for key in line if key.startswith("loss/")})
    curves = {key.removeprefix("loss/"): step.curve(key) for key in keys}
    curves = {name: curve for name, curve in curves.items() if any(curve[1])}  # a part may be off
    raw = {name: curve for name, curve in curves.items() if not name.endswith("_weighted")}
    weighted = {name.removesuffix("_weighted"): curves[name] for name in curves.keys() - raw.keys()}
    total = step.curve("loss")
    charts = [_loss_chart(step, "Loss parts, raw", raw)] if raw.keys() - {"ce"} else []
    if weighted:  # the weight of CE is 1
        parts = {
            name: weighted.get(name) or raw[name] for name in sorted(weighted.keys() | raw.keys() & {"ce"})
        }
        charts.append(_loss_chart(step, "Loss parts, weighted", parts | {"total": total}))
    if charts:
        return charts
    if raw:
        heldout = step.curve("heldout/loss")
        return [_loss_chart(step, "Cross-entropy", raw | ({"held out": heldout} if heldout[0] else {}))]
    return [_loss_chart(step, "Loss", {"": total})] if any(total[1]) else []


def _loss_chart(step: StepRecord, title: str, curves: dict[str, Curve]) -> Chart:
    values = [value for _, ys in curves.values() for value in ys]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    return compare(step.path, f"{title}{' (log scale)' if is_log else ''}", curves, is_log=is_log)


def compare(
    owner: str, title: str, curves: dict[str, Curve], *, is_log: bool, marks: Sequence[float] = ()
) -> Chart:
    """Curves over the optimizer step in one chart, with dashed lines at the steps ``marks``."""

    def paint(axes: "Axes") -> None:
        spare = product("-:", [PURPLE, ORANGE, GREEN, BLUE, INK])
        for name, (xs, ys) in curves.items():
            dash, colour = "-", INK if name == "total" else PART_COLOURS.get(name)
            if colour is None:
                dash, colour = ("-", BLUE) if len(curves) == 1 else next(spare, (":", MUTED))
            marker = "." if len(xs) < 12 else ""
            dash = "--" if name == "total" else dash  # often covers its largest part
            label = PART_NAMES.get(name, name.replace("_", " "))
            axes.plot(xs, ys, color=colour, marker=marker, linestyle=dash, label=label)
        for mark in marks:
            axes.axvline(mark, color=MUTED, linewidth=1, linestyle="--")
        axes.set_xlabel("optimizer step")
        if is_log:
            axes.set_yscale("log")
            locator: Any = axes.yaxis.get_major_locator()
            values = [y for _, ys in curves.values() for y in ys]
            is_wide = max(values) / min(values) > WIDE_RATIO
            locator.set_params(subs=(1,) if is_wide else (1, 2, 5), numticks=7)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda *_: "")
        elif title == "Learning rate":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if len(curves) > 1:
            axes.figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2)

    return draw(owner, title, paint)


def histogram(step: StepRecord, after: Weights, before: Weights | None) -> Chart:
    """Latents after a step, over those before it, with the thresholds of the codes."""

    def paint(axes: "Axes") -> None:
        axes.stairs(_density(after), after.edges, fill=True, color=BLUE, alpha=0.6, label="after")
        if before:
            axes.stairs(_density(before), before.edges, color=INK, linewidth=1.1, label="before")
        for threshold in (-0.5, 0.5):
            axes.axvline(threshold, color=ORANGE, linewidth=1.1, linestyle="--")
        places: tuple[Literal["left", "center", "right"], ...] = ("left", "center", "right")
        shares = (("-1", after.minus_frac), ("0", after.zero_frac), ("+1", after.plus_frac))
        for place, (code, share) in zip(places, shares, strict=True):
            if share is not None:
                axes.set_title(f"{code}: {percent(share, 1)}", loc=place, size=9)
        axes.set(yticks=[], xlabel="latent weight / its absmean scale")
        if before:
            axes.legend(loc="upper right")

    title = "Weights before and after" if before else "Weights after (before: not recorded)"
    return draw(step.path, title, paint)


def _density(weights: Weights) -> list[float]:
    total = sum(weights.counts)
    pairs = zip(weights.edges, weights.edges[1:], weights.counts, strict=False)
    return [count / total / (right - left) for left, right, count in pairs]


def draw(owner: str, title: str, paint: "Callable[[Axes], None]", *, height: float = 2.4) -> Chart:
    """One chart 4 inches wide and ``height`` high; owner and title together must be unique on a page.

    Raises:
        BitDistillError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BitDistillError(
            "a report needs matplotlib, which is not installed: pip install 'bitdistill[report]'"
        ) from error
    prefix = f"c{digest_of([owner, title])}"
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style file must not reach the page
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": prefix})
        figure = Figure(figsize=(4, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        paint(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg")
    return Chart(title=title, svg=inline_svg(stream.getvalue(), prefix, title))
