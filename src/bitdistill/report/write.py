"""The door of this package: ``write_report``."""

import os
from pathlib import Path

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
        _replace(run_dir / name, text)
    return run_dir / "report.html", run_dir / "report.md"


def _replace(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that no reader sees half a page."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
