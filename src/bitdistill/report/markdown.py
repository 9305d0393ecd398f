"""The report as Markdown: the same summary and tables, no images."""

import json
import re

from .records import RunReport, clean
from .summary import summary
from .tables import Table, accuracy_table, facts, grid_table, metrics_table, steps_table, weights_table
from .words import MISSING


def render_markdown(report: RunReport) -> str:
    """The whole file."""
    tables = [
        table(report) for table in (accuracy_table, metrics_table, grid_table, weights_table, steps_table)
    ]
    recipe = report.meta.get("recipe")
    surgery = [(step.path, step.surgery) for step in report.steps if step.surgery]
    parts = [
        f"# {escaped(report.name)}",
        escaped(summary(report)),
        *(table_section(table) for table in tables if table),
        *(f"## Surgery: {escaped(path)}\n\n{fence(text)}" for path, text in surgery),
        "## Recipe",
        fence(json.dumps(recipe, indent=2, ensure_ascii=False), "json")
        if recipe
        else f"{MISSING.capitalize()}.",
        "## Where the numbers come from",
        "\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in facts(report)),
        "\n".join(f"- {escaped(note)}" for note in report.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(value: object) -> str:
    """Text that Markdown shows as it is: no HTML, no emphasis, no new line."""
    text = " ".join(clean(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def table_section(table: Table) -> str:
    """A heading, its table and its remarks."""
    notes = "\n".join(f"- {escaped(note)}" for note in table.notes)
    return f"## {escaped(table.title)}\n\n" + "\n\n".join(
        part for part in (table_text(table) if table.rows else "", notes) if part
    )


def table_text(table: Table) -> str:
    """The table alone."""
    rule = ["---"] * table.num_text + ["---:"] * (len(table.header) - table.num_text)
    lines = [[escaped(cell) for cell in row] for row in (table.header, *table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def fence(text: str, language: str = "") -> str:
    """Text as a code block."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{clean(text)}\n{fence}"
