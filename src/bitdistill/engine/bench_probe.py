"""What the machine can do at this moment; see ``bench_process`` for the protocol. In a process of its own: its buffers
would count as the model's memory.
"""

from typing import Any

from .. import _core
from .bench_process import serve

READ_S, COUNT_S = 0.1, 0.05


class Probe:
    """``{}`` -> ``{"gb_s", "gmac_s"}``: memory read, and int8 multiply-adds on registers, by all threads together."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def facts(self) -> dict[str, Any]:
        """Nothing that stays."""
        return {}

    def answer(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Probe both."""
        return {
            "gb_s": _core.probe_bandwidth(self.threads, READ_S),
            "gmac_s": _core.probe_int8(self.threads, COUNT_S),
        }


if __name__ == "__main__":
    serve(Probe)
