"""The door of this package: ``write_report``."""

from pathlib import Path

from ..checkpoint import write_text
from ..errors import CheckpointError
from .collect import RESULT_FILE, collect
from .html import render_html
from .markdown import render_markdown
from .pretraining import render_pretraining


def write_report(run_dir: Path) -> tuple[Path, ...]:
    """Write ``report.html`` and ``report.md`` into a folder; returns both paths, the page's first.

    A folder with ``result.json`` is a run. One with the records of a study gets their tables and a ``summary.json``
    beside the report; one in which models were pre-trained from scratch, their curves.

    Raises:
        CheckpointError: the folder is none of these, ``result.json`` or all records are damaged, a record has a format
            of another version, or the folder is read-only.
        BitDistillError: matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    for name, text in (pages := _pages(run_dir)).items():
        try:
            write_text(run_dir / name, text)
        except OSError as error:
            raise CheckpointError(f"{run_dir / name}: cannot be written ({error.strerror})") from error
    return tuple(run_dir / name for name in pages)


def _pages(run_dir: Path) -> dict[str, str]:
    """Texts of the report by file name."""
    if (run_dir / RESULT_FILE).exists():
        report = collect(run_dir)
        return {"report.html": render_html(report), "report.md": render_markdown(report)}
    from .study.page import render_study  # brings numpy

    pages, damaged = render_study(run_dir)
    pages = pages or render_pretraining(run_dir)
    if pages is not None:
        return pages
    found = f" Files that are no usable record: {' '.join(damaged)}" if damaged else ""
    raise CheckpointError(
        f"{run_dir / RESULT_FILE}: no such file, and below {run_dir} is neither a model pre-trained from scratch nor a "
        "record of a study. Give the folder of a `bitdistill run` (finish the run first), one with results of "
        f"`bitdistill base`, or the folder above the folders of a `bitdistill sweep`'s records.{found}"
    )
