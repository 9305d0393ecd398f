"""Run the work of one step once, on one process or many, and keep its record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import Step
from ..processes import on_main_process, wait_for_everyone


def run_step(
    output_dir: Path,
    settings: dict[str, Any],
    work: Callable[[Path], dict[str, Any]],
    *,
    progress: str = Step.progress,
) -> Path:
    """Call ``work(folder)`` unless the step is done already; returns the finished folder.

    ``work`` runs on every process; the folder and its record are the main process's business. ``progress`` matches the
    files that an unfinished step can go on from.

    Raises:
        CheckpointError: the folder holds this step made with other settings.
    """
    step = Step(output_dir, settings, progress)
    on_main_process(step.begin)
    if step.is_done:
        return step.output
    started = time.monotonic()
    metrics = work(step.partial)
    wait_for_everyone()
    on_main_process(lambda: step.finish(metrics, time.monotonic() - started))
    return step.output
