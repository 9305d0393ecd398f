"""The door of this package: ``write_report``."""

from pathlib import Path

from ..checkpoint import write_text
from ..errors import CheckpointError
from .collect import collect
from .html import render_html
from .markdown import render_markdown


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a run folder; returns both paths.

    Raises:
        CheckpointError: the folder has no ``result.json``, it is damaged, or the folder is read-only.
        BitDistillError: matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    report = collect(run_dir)
    pages = {"report.html": render_html(report), "report.md": render_markdown(report)}
    for name, text in pages.items():
        try:
            write_text(run_dir / name, text)
        except OSError as error:
            raise CheckpointError(f"{run_dir / name}: cannot be written ({error.strerror})") from error
    return run_dir / "report.html", run_dir / "report.md"
