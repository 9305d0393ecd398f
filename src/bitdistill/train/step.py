"""Run the work of one step once, on one process or many, and keep its record."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoint import Step


def num_processes() -> int:
    """Processes that train together (1 without a launcher)."""
    return int(PartialState().num_processes)


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return bool(PartialState().is_main_process)


def wait_for_everyone() -> None:
    """Barrier; returns at once with one process."""
    PartialState().wait_for_everyone()


def run_step(output_dir: Path, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> Path:
    """Call ``work(folder)`` unless the step is done already; returns the finished folder.

    ``work`` runs on every process; the folder and its record are the main process's business.

    Raises:
        CheckpointError: the folder holds this step made with other settings.
    """
    state = PartialState()
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
