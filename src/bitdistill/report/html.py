"""The report as one HTML page: inline CSS and SVG, no script, no network, light and dark."""

import json
import re
from collections.abc import Sequence
from html import escape

from .plots import Chart, accuracy_chart, step_charts
from .records import RunReport, StepRecord, clean
from .summary import summary
from .tables import Table, accuracy_table, facts, grid_table, metrics_table, steps_table, weights_table
from .words import MISSING, duration, stage_name, users

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --muted: #5b6470;
  --grid: #d9dde3; --blue: #1f6fb2; --orange: #c2570c; --green: #1a8a5f; --purple: #8a4fa3; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1c2026; --ink: #e6e9ed; --muted: #9aa4b0; --grid: #343b45;
    --blue: #5aa9e6; --orange: #f0904a; --green: #46c598; --purple: #c491dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.75rem 0 .15rem; }
p { max-width: 48rem; margin: .5rem 0; }
.summary { font-size: 1.06rem; margin-top: 1rem; }
.quiet, figcaption, .notes { color: var(--muted); font-size: .875rem; }
.notes { padding-left: 1.1rem; max-width: 48rem; margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
.text { text-align: left; white-space: normal; min-width: 7rem; overflow-wrap: anywhere; }
.charts { display: grid; gap: 1rem; margin-top: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: 6px; min-width: 0; }
figcaption { margin-bottom: .35rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { max-width: 28rem; margin: 1rem 0; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: .875rem; }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border-radius: 6px; font-size: .8rem;
  line-height: 1.45; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
"""

HISTOGRAMS = (
    "Weight histograms: latents over their own absmean scale; the dashed lines at ±0.5 are where "
    "a code turns from 0 to ±1. The shares above them are those after the step; "
    "latents beyond the range are counted in its outer bins."
)


def render_html(report: RunReport) -> str:
    """The whole page; it is well-formed XML too."""
    recipe = report.meta.get("recipe")
    known = facts(report)
    headline = ", ".join(f"{key.lower()} {value}" for key, value in known[:4])
    optional = [table for table in (metrics_table(report), grid_table(report)) if table]
    body = [
        paragraph(summary(report), "summary"),
        section(accuracy_table(report), accuracy_chart(report)),
        *map(section, optional),
        section(weights_table(report)),
        section(steps_table(report)),
        "<h2>Curves and weights</h2>",
        paragraph(HISTOGRAMS),
        *(_step(report, step) for step in report.steps),
        "<h2>Recipe</h2>",
        details("The resolved recipe", recipe) if recipe else f"<p>{MISSING.capitalize()}.</p>",
        "<h2>Where the numbers come from</h2>",
        "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in known) + "</dl>",
        notes(tuple(report.notes)),
    ]
    return document(report.name, headline, body)


def drawing(charts: Sequence[Chart]) -> str:
    """Charts side by side as one SVG file; its colours follow the reader's light or dark page."""
    width, height, title = 400, 240, 24  # of one chart and the line above it, in pixels
    colours = STYLE[: STYLE.index("* {")].replace("color-scheme: light dark;", "")
    parts = [
        f'<text x="{width * i + 8}" y="16" font-size="13">{_e(chart.title)}</text>'
        + re.sub(r"^<svg", f'<svg x="{width * i}" y="{title}" width="{width}" height="{height}"', chart.svg)
        for i, chart in enumerate(charts)
    ]
    style = f"{colours} text {{ font-family: system-ui, sans-serif; fill: var(--ink); }}"
    size = f'width="{width * len(charts)}" height="{height + title}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{body}\n</svg>\n'


def document(name: str, headline: str, body: list[str]) -> str:
    """A page of a name, a line below it, and parts that are HTML."""
    title = _e(name)
    parts = [f"<h1>{title}</h1>", f'<p class="quiet">bitdistill report · {_e(headline)}</p>', *body]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title} - bitdistill report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _e(value: object) -> str:
    return escape(clean(value))


def section(table: Table, chart: Chart | None = None) -> str:
    """A heading, its table, and a chart below it."""
    rows = _table(table) if table.rows else ""
    drawn = f'<div class="wide">{figure(chart)}</div>' if chart else ""
    return f"<h2>{_e(table.title)}</h2>\n{rows}{notes(table.notes)}{drawn}"


def _table(table: Table) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="text"' if column < table.num_text else ""
        lines = "<br/>".join(_e(part) for part in text.split("; ")) if column >= table.num_text else _e(text)
        return f"<{tag}{kind}>{lines}</{tag}>"

    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(cell(tag, column, text) for column, text in enumerate(cells)) + "</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    return (
        f'<div class="scroll"><table>\n<thead>{line("th", table.header)}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>\n"
    )


def notes(lines: tuple[str, ...]) -> str:
    """Remarks below a table or a page."""
    return f'<ul class="notes">{"".join(f"<li>{_e(note)}</li>" for note in lines)}</ul>\n' if lines else ""


def paragraph(text: str, kind: str = "quiet") -> str:
    """Text in one of the page's styles."""
    return f'<p class="{kind}">{_e(text)}</p>'


def gallery(charts: Sequence[Chart]) -> str:
    """Charts side by side; nothing where there are none."""
    return f'<div class="charts">{"".join(map(figure, charts))}</div>' if charts else ""


def step_section(title: str, lines: Sequence[str], parts: Sequence[str]) -> str:
    """A section of one step: its name, quiet lines, and parts that are HTML."""
    body = [f"<section>\n<h3>{_e(title)}</h3>", *map(paragraph, filter(None, lines)), *parts, "</section>"]
    return "\n".join(part for part in body if part)


def figure(chart: Chart) -> str:
    """A chart with its title."""
    return f"<figure><figcaption>{_e(chart.title)}</figcaption>{chart.svg}</figure>"


def details(title: str, value: object) -> str:
    """A text, or a JSON value, that opens on request."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return f"<details><summary>{_e(title)}</summary><pre>{_e(text)}</pre></details>"


def _step(report: RunReport, step: StepRecord) -> str:
    line = (stage_name(step), duration(step.time_s), f"used by {users(step, len(report.methods))}")
    charts = step_charts(step, report.step(step.parent))
    found = {"run.json": step.run, "loss curve": step.log, "weight histogram": step.weights}
    if step.stage == "stage1_refine":
        del found["loss curve"]  # surgery trains nothing
    absent = ", ".join(what for what, is_there in found.items() if not is_there)
    parts = [
        gallery(charts),
        details("What stage 1 changed", step.surgery) if step.surgery else "",
        details("Settings and metrics", step.run) if step.run else "",
    ]
    missing = f"{MISSING.capitalize()}: {absent}." if absent else ""
    return step_section(step.path, (" · ".join(line), missing), parts)
