"""Run the work of one step once, on one process or many, and keep its record."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..checkpoint import Step, digest_of
from ..errors import CheckpointError
from ..locks import locked
from ..processes import on_main_process, wait_for_everyone


def run_step(
    output_dir: Path,
    settings: dict[str, Any],
    work: Callable[[Path], dict[str, Any]],
    *,
    progress: str = Step.progress,
    shared: Path | None = None,
) -> Path:
    """Call ``work(folder)`` unless the step is done already; returns the finished folder.

    ``work`` runs on every process; the folder and its record are the main process's business. ``progress`` matches the
    files that an unfinished step can go on from. With ``shared`` the step lies in that folder under a name that its
    settings decide, and ``output_dir`` is a link to it: whoever needs the same step finds it there, and of several
    runs that need it at once one makes it.

    Raises:
        CheckpointError: the folder holds this step made with other settings.
    """
    if shared is None:
        return _run(Step(output_dir, settings, progress), work)
    step = Step(shared / f"{settings['stage']}-{digest_of(settings)}", settings, progress)
    with ExitStack() as held:
        on_main_process(lambda: held.enter_context(locked(step.output.with_suffix(".lock"))))
        _run(step, work)
    on_main_process(lambda: _link(output_dir, step.output))
    return output_dir


def _run(step: Step, work: Callable[[Path], dict[str, Any]]) -> Path:
    on_main_process(step.begin)
    if step.is_done:
        return step.output
    started = time.monotonic()
    metrics = work(step.partial)
    wait_for_everyone()
    on_main_process(lambda: step.finish(metrics, time.monotonic() - started))
    return step.output


def _link(name: Path, target: Path) -> None:
    """Make ``name`` a relative link to ``target``."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.is_symlink():
        name.unlink()
    elif name.exists():
        raise CheckpointError(
            f"{name} is a folder of its own, where a link to {target} belongs (steps_dir is set). Nothing was changed. "
            "Use another name or output_dir, or delete that folder"
        )
    name.symlink_to(os.path.relpath(target.resolve(), name.parent.resolve()), target_is_directory=True)
