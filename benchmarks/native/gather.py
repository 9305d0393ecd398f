"""Records and curves of the study, from its run folder.

    python benchmarks/native/gather.py RUN OUT NAME NAME

Copies the records of the two named models to ``OUT/records``, draws them by the report's code into
``OUT/curves.svg``, and writes the held-out losses of every model of the run to ``OUT/heldout.json``.
"""

import re
import shutil
import sys
from pathlib import Path

from bitdistill.checkpoint import write_json, write_text
from bitdistill.report.collect import collect_pretraining
from bitdistill.report.html import STYLE
from bitdistill.report.pretraining import comparison_charts
from bitdistill.report.records import StepRecord

WIDTH, HEIGHT, TITLE = 400, 240, 24
"""Of one chart and the line above it, in pixels."""


def main(run: Path, out: Path, names: list[str]) -> None:
    """Write everything; existing files are replaced."""
    steps, _ = collect_pretraining(run)
    for name in names:
        folder = out / "records" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("run.json", "metrics.jsonl", "weights.json"):
            shutil.copy(run / name / file, folder / file)
    write_text(out / "curves.svg", drawing([step for step in steps if step.path in names]))
    losses = {}
    for step in steps:
        positions, values = step.curve("heldout/loss")
        losses[step.path] = {str(int(x)): round(y, 4) for x, y in zip(positions, values, strict=True)}
    write_json(out / "heldout.json", losses)


def drawing(steps: list[StepRecord]) -> str:
    """The charts side by side as one SVG; colours follow the reader's light or dark page."""
    colours = STYLE[: STYLE.index("* {")].replace("color-scheme: light dark;", "")
    charts = comparison_charts(steps)
    parts = [
        f'<text x="{WIDTH * i + 8}" y="16" font-size="13">{chart.title}</text>'
        + re.sub(r"^<svg", f'<svg x="{WIDTH * i}" y="{TITLE}" width="{WIDTH}" height="{HEIGHT}"', chart.svg)
        for i, chart in enumerate(charts)
    ]
    style = f"{colours} text {{ font-family: system-ui, sans-serif; fill: var(--ink); }}"
    size = f'width="{WIDTH * len(charts)}" height="{HEIGHT + TITLE}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{body}\n</svg>\n'


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
