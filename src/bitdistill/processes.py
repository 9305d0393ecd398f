"""The processes that work together under ``accelerate launch`` or ``torchrun``; one without a launcher."""

import os
from datetime import timedelta

from accelerate import PartialState

WAIT = timedelta(hours=12)
"""How long a process waits for the others: the main one tokenises and evaluates while they do."""


def process_state() -> PartialState:
    """The processes and this one's device. The first call decides the time-out of all that follow."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return PartialState(timeout=WAIT)
    return PartialState()


def num_processes() -> int:
    """Processes that train together."""
    return int(process_state().num_processes)


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return bool(process_state().is_main_process)


def wait_for_everyone() -> None:
    """Barrier; returns at once with one process."""
    process_state().wait_for_everyone()
