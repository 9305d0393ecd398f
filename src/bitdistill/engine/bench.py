"""``bitdistill bench``: prefill and decode beside the roofline of the same moment, and in turns with a peer.

    prefill:  roofline_share = tok_s * ternary weights / probed int8 multiply-adds a second
    decode:   roofline_share = tok_s * bytes read for a token / probed bytes a second

Embedding, head, norms and attention are part of the measured time. Figures are medians; a sample whose thread had the
CPU for less than 97 % of the time is dropped while others are left.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ConfigError, EngineError
from .bench_worker import DECODE_PROMPT
from .shapes import find_shape

logger = logging.getLogger(__name__)

PHASES = (("prefill", 128), ("prefill", 512), ("decode", 128))
MOST_SAMPLES, LEAST_SAMPLES = 7, 2
BUDGET_S = 200.0
"""Time for all samples of a shape without a peer; loading and probing come on top."""
UNDISTURBED = 0.97
PEER_FORMATS = ("TQ2_0", "BF16")


class Worker:
    """A measuring process; see ``bench_worker``."""

    def __init__(self, module: str, options: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(options)],
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
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before is read below
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(
                f"the measuring process ended with status {self.process.wait()}; is there memory enough?"
            )
        found = dict(json.loads(line))
        if "error" in found:
            raise EngineError(found["error"])
        return found

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.stdout.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_bench(
    model: Path | None,
    shape: str | None,
    threads: Sequence[int] = (),
    *,
    head: str = "int8",
    versus: str | None = None,
) -> list[dict[str, Any]]:
    """Measure a model or a shape at each number of threads; one record per phase, and per format of the peer.

    Raises:
        ConfigError: not exactly one of ``model`` and ``shape``, an unknown shape or peer, impossible threads.
        EngineError: a measuring process failed.
    """
    if (model is None) == (shape is None):
        raise ConfigError("name an exported model or a --shape, not both and not neither")
    if shape is not None:
        find_shape(shape)
    if head not in ("bf16", "int8"):
        raise ConfigError(f"--head {head}: use bf16 or int8")
    if any(count < 1 or count > 1024 for count in threads):
        raise ConfigError(f"--threads {min(threads)}: use 1 to 1024")
    if versus is not None:
        _check_peer(versus, shape)
    counts = list(threads) or _all_threads()
    name = shape or str(model)
    records = []
    budget = BUDGET_S / (len(counts) * len(PHASES))
    for count in counts:
        options = {"model": str(model) if model else None, "shape": shape, "threads": count, "head": head}
        for peer_format in PEER_FORMATS if versus else (None,):
            with Worker("bitdistill.engine.bench_worker", options) as own:
                logger.info("%s, %d threads: loaded in %.2f s", name, count, own.facts["load_s"])
                peer = _peer(shape, count, peer_format)
                try:
                    records += [
                        _record(name, count, own, peer, peer_format, phase, tokens, budget)
                        for phase, tokens in PHASES
                        if tokens < own.facts["max_context"] - DECODE_PROMPT
                    ]
                finally:
                    if peer is not None:
                        peer.__exit__(None, None, None)
    return records


def _all_threads() -> list[int]:
    """1..n; on big machines the powers of two and n, so that a shape stays within its time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [t for t in range(1, n + 1) if n <= 4 or t == n or t & (t - 1) == 0]


def _record(
    name: str,
    threads: int,
    own: Worker,
    peer: Worker | None,
    peer_format: str | None,
    phase: str,
    tokens: int,
    budget: float,
) -> dict[str, Any]:
    own.ask(phase=phase, tokens=min(tokens, 16))  # pages and clocks wake up
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    probes = []
    started = time.monotonic()
    while len(ours) < MOST_SAMPLES and (
        len(ours) < LEAST_SAMPLES or time.monotonic() - started < budget
    ):  # A B A B, each beside a probe
        probes.append(own.ask(probe=True))
        ours.append(own.ask(phase=phase, tokens=tokens))
        if peer is not None:
            theirs.append(peer.ask(phase=phase, tokens=tokens))
    seconds = _median(ours, "seconds")
    tok_s = tokens / seconds
    gb_s, gmac_s = (statistics.median(p[key] for p in probes) for key in ("gb_s", "gmac_s"))
    facts = own.facts
    if phase == "prefill":
        share = tok_s * facts["ternary_weights"] / (gmac_s * 1e9)
    else:
        share = tok_s * facts["decode_bytes"] / (gb_s * 1e9)
    record: dict[str, Any] = {
        "shape": name,
        "threads": threads,
        "phase": phase,
        "tokens": tokens,
        "batch": 1,
        "tok_s": tok_s,
        "roofline_share": share,
        "probe_gb_s": gb_s,
        "probe_gmac_s": gmac_s,
        "head_bits": facts["head_bits"],
        "weight_bits": facts["weight_bits"],
        "peak_rss_bytes": own.ask(memory=True)["peak_rss_bytes"],
        "first_token_s": _median(ours, "first_token_s"),
        "versus": None,
    }
    if peer is not None:
        peer_tok_s = tokens / _median(theirs, "seconds")
        record["versus"] = {
            "name": "llama.cpp",
            "format": peer_format,
            "tok_s": peer_tok_s,
            "ratio": tok_s / peer_tok_s,
        }
    return record


def _median(samples: list[dict[str, Any]], key: str) -> float:
    clean = [s for s in samples if s.get("cpu_share", 1.0) >= UNDISTURBED]
    if not clean:
        logger.warning("the machine was busy during every sample; the figures say little")
    return float(statistics.median(s[key] for s in clean or samples))


def _check_peer(versus: str, shape: str | None) -> None:
    if versus != "llama.cpp":
        raise ConfigError(f"--versus {versus}: the one peer is llama.cpp")
    if shape is None:
        raise ConfigError("--versus measures a --shape with random weights on both sides; name one")
    import importlib.util

    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"--versus llama.cpp needs {package}, which is built from source; install it with: "
                "pip install 'bitdistill[peer]'"
            )


def _peer(shape: str | None, threads: int, peer_format: str | None) -> Worker | None:
    if peer_format is None:
        return None
    return Worker("bitdistill.engine.bench_peer", {"shape": shape, "threads": threads, "form": peer_format})
