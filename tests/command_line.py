"""``bitdistill`` as a user starts it: in this process, or in processes of its own."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


def run_cli(*arguments: object) -> Outcome:
    """``bitdistill ARGUMENTS`` through its entry point; what main() lets escape fails the test."""
    from bitdistill import cli

    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["bitdistill", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
    return Outcome(status, out.getvalue(), err.getvalue())


def run_python(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``, or as many processes of it as asked, that torchrun starts to work together."""
    command = [sys.executable, *map(str, arguments)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(processes), *command]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
