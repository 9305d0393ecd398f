"""The processes that work together under ``accelerate launch`` or ``torchrun``; one without a launcher."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .errors import ConfigError

T = TypeVar("T")

WAIT = timedelta(hours=12)
"""How long a process waits for the others: the main one tokenises and evaluates while they do."""


def process_state() -> PartialState:
    """The processes and this one's device. The first call decides the time-out of all that follow.

    Raises:
        ConfigError: accelerate was asked for a kind of sharding that would be ignored or go wrong.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _check_sharding()
        # Without an accelerator accelerate must be told to use the CPU, or it takes each process for the only one.
        return PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)
    return PartialState()


_SHARDING = (
    ("FSDP_VERSION", "1", "2", "FSDP1 flattens the latents whose scales are needed"),
    ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "SHARDED_STATE_DICT", "checkpoints are written in shards"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false", "false", "it would leave the teacher without weights"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "false", "false", "set gradient_checkpointing = true in the recipe"),
)
"""What accelerate reads, its default, the one value that works here, and why."""


def _check_sharding() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if not torch.accelerator.is_available():
        raise ConfigError("accelerate shards on accelerators only, and there is none: start without FSDP")
    for name, default, wanted, reason in _SHARDING:
        value = os.environ.get(name, default)
        if value.lower() != wanted.lower():
            raise ConfigError(
                f"{name.lower()} = {value}: {reason}. Set {name.lower()}: {wanted} (docs/scaling.md has a whole file)"
            )


def num_processes() -> int:
    """Processes that train together."""
    return int(process_state().num_processes)


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return bool(process_state().is_main_process)


def wait_for_everyone() -> None:
    """Barrier; returns at once with one process."""
    process_state().wait_for_everyone()


def on_main_process(work: Callable[[], object]) -> None:
    """Call ``work`` on the main process while the others wait; failures as in ``from_main_process``."""

    def call() -> None:
        work()

    from_main_process(call)


def from_main_process(work: Callable[[], T]) -> T:
    """What ``work`` returns on the main process, on every process; the value is pickled on the way.

    If it fails, the main process raises and the others leave with status 0: the failure is reported once, and
    the launcher has no cause to stop the main process before it has done so.
    """
    error: BaseException | None = None
    outcome: list[Any] = [False, None]
    if is_main_process():
        try:
            outcome = [True, work()]
        except BaseException as caught:
            error = caught
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if not outcome[0]:
        sys.exit(0)
    return cast("T", outcome[1])
