"""The curves of models pre-trained in one run folder as one SVG, drawn by the report's code.

python benchmarks/native/plot.py RUN OUT.svg
"""

import re
import sys
from pathlib import Path

from bitdistill.checkpoint import write_text
from bitdistill.report.collect import collect_pretraining
from bitdistill.report.html import STYLE
from bitdistill.report.pretraining import comparison_charts

WIDTH, HEIGHT, TITLE = 400, 240, 24
"""Of one chart and the line above it, in pixels."""


def main(run: Path, out: Path) -> None:
    """Write the charts side by side; colours follow the reader's light or dark page."""
    steps, _ = collect_pretraining(run)
    colours = STYLE[: STYLE.index("* {")].replace("color-scheme: light dark;", "")
    charts = comparison_charts(steps)
    parts = [
        f'<text x="{WIDTH * i + 8}" y="16" font-size="13">{chart.title}</text>'
        + re.sub(r"^<svg", f'<svg x="{WIDTH * i}" y="{TITLE}" width="{WIDTH}" height="{HEIGHT}"', chart.svg)
        for i, chart in enumerate(charts)
    ]
    style = f"{colours} text {{ font-family: system-ui, sans-serif; fill: var(--ink); }}"
    size = f'width="{WIDTH * len(charts)}" height="{HEIGHT + TITLE}"'
    write_text(
        out,
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n",
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
