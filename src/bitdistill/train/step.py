"""Run the work of one step once, on one process or many, and keep its record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import Step
from ..processes import process_state


def run_step(output_dir: Path, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> Path:
    """Call ``work(folder)`` unless the step is done already; returns the finished folder.

    ``work`` runs on every process; the folder and its record are the main process's business.

    Raises:
        CheckpointError: the folder holds this step made with other settings.
    """
    state = process_state()
    step = Step(output_dir, settings)
    if state.is_main_process:
        step.begin()
    state.wait_for_everyone()
    if step.is_done:
        return step.output
    started = time.monotonic()
    metrics = work(step.partial)
    state.wait_for_everyone()
    if state.is_main_process:
        step.finish(metrics, time.monotonic() - started)
    state.wait_for_everyone()
    return step.output
