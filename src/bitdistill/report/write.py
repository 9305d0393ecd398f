"""The door of this package: ``write_report``."""

from pathlib import Path

from ..checkpoint import write_text
from ..errors import CheckpointError
from .collect import RESULT_FILE, collect
from .html import render_html
from .markdown import render_markdown
from .pretraining import render_pretraining


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a run folder; returns both paths.

    A folder without ``result.json`` in which models were pre-trained from scratch gets a report of their curves.

    Raises:
        CheckpointError: the folder has neither, ``result.json`` is damaged, or the folder is read-only.
        BitDistillError: matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    pages = None if (run_dir / RESULT_FILE).exists() else render_pretraining(run_dir)
    if pages is None:
        report = collect(run_dir)
        pages = {"report.html": render_html(report), "report.md": render_markdown(report)}
    for name, text in pages.items():
        try:
            write_text(run_dir / name, text)
        except OSError as error:
            raise CheckpointError(f"{run_dir / name}: cannot be written ({error.strerror})") from error
    return run_dir / "report.html", run_dir / "report.md"
