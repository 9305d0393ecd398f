"""Measuring processes: each holds one model or probe, so that a peak of memory is one model's own.

Both ends of the protocol: one JSON request a line on standard input, one JSON answer a line on standard output. The
first line a process writes is its facts; ``{"error": ...}`` ends it.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from ..errors import BitDistillError, EngineError


class Measurer(Protocol):
    """What a process offers."""

    def facts(self) -> dict[str, Any]:
        """What does not change from sample to sample."""

    def answer(self, request: dict[str, Any], /) -> dict[str, Any]:
        """One request of the protocol."""


def serve(make: Callable[..., Measurer]) -> None:
    """Answer requests until standard input ends; ``make`` takes the options of the command line."""
    try:
        measurer = make(**json.loads(sys.argv[1]))
        print(json.dumps(measurer.facts()), flush=True)
        for line in sys.stdin:
            print(json.dumps(measurer.answer(json.loads(line))), flush=True)
    except Exception as error:  # whatever it is, the process that asked reports it
        kind = "" if isinstance(error, BitDistillError) else f"{type(error).__name__}: "
        print(json.dumps({"error": f"{kind}{error}"}), flush=True)
        sys.exit(1)


class Process:
    """A module of this package that serves, as seen by the one who asks."""

    def __init__(self, module: str, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            EngineError: the process failed; with what it said.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before is read below
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(
                f"the measuring process ended with status {self._process.wait()}; is there memory enough?"
            )
        found = dict(json.loads(line))
        if "error" in found:
            raise EngineError(found["error"])
        return found

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
