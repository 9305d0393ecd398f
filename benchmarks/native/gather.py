"""Records and curves of the study, from its run folder.

    python benchmarks/native/gather.py RUN OUT NAME NAME

Copies the records of the two named models to ``OUT/records``, draws them by the report's code into
``OUT/curves.svg``, and writes the held-out losses of every model of the run to ``OUT/heldout.json``.
"""

import shutil
import sys
from pathlib import Path

from bitdistill.checkpoint import write_json, write_text
from bitdistill.report.collect import collect_pretraining
from bitdistill.report.html import drawing
from bitdistill.report.pretraining import comparison_charts


def main(run: Path, out: Path, names: list[str]) -> None:
    """Write everything; existing files are replaced."""
    steps, _ = collect_pretraining(run)
    for name in names:
        folder = out / "records" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("run.json", "metrics.jsonl", "weights.json"):
            shutil.copy(run / name / file, folder / file)
    write_text(out / "curves.svg", drawing(comparison_charts([step for step in steps if step.path in names])))
    losses = {}
    for step in steps:
        positions, values = step.curve("heldout/loss")
        losses[step.path] = {str(int(x)): round(y, 4) for x, y in zip(positions, values, strict=True)}
    write_json(out / "heldout.json", losses)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
