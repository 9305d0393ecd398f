"""``bitdistill bench``: prefill and decode beside the roofline of the same moment, and in turns with a peer.

    prefill:  roofline_share = tok_s * ternary weights / probed int8 multiply-adds a second
    decode:   roofline_share = tok_s * bytes read for a token / probed bytes a second

Embedding, head, norms and attention are part of the measured time. The machine is probed before and after every sample,
since the bandwidth of a shared machine doubles and halves within seconds; decoding is therefore sampled in slices of
16 tokens. Figures are medians over samples; one whose thread had the CPU for less than 97 % of the time is dropped
while others are left.
"""

import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .bench_process import Process
from .bench_worker import DECODE_PROMPT
from .shapes import HEADS, find_shape

logger = logging.getLogger(__name__)

PHASES = (("prefill", 128), ("prefill", 512), ("decode", 128))
DECODE_SLICE = 16
MOST_ROUNDS, LEAST_ROUNDS = 7, 2
BUDGET_S = 200.0
"""Time for all samples of a shape without a peer; loading comes on top."""
UNDISTURBED = 0.97
PROFILE_RUNS = 5
PEER_FORMATS = ("TQ2_0", "BF16")


def run_bench(
    model: Path | None,
    shape: str | None,
    threads: Sequence[int] = (),
    *,
    head: str = "int8",
    kv: str = "fp16",
    profile: bool = False,
    versus: str | None = None,
) -> list[dict[str, Any]]:
    """Measure a model or a shape at each number of threads; one record per phase, and per format of the peer.

    ``head`` is for a shape; ``kv`` the form of the cache; ``profile`` adds where the time of a phase goes.

    Raises:
        ConfigError: not exactly one of ``model`` and ``shape``, an unknown shape or peer, impossible threads.
        EngineError: a measuring process failed.
    """
    if (model is None) == (shape is None):
        raise ConfigError("name an exported model or a --shape, not both and not neither")
    if shape is not None:
        find_shape(shape)
    if head not in HEADS:
        raise ConfigError(f"--head {head}: use one of {', '.join(HEADS)}")
    if any(count < 1 or count > 1024 for count in threads):
        raise ConfigError(f"--threads {min(threads)}: use 1 to 1024")
    if versus is not None:
        _check_peer(versus, shape)
    counts = list(threads) or _all_threads()
    name = shape or str(model)
    records = []
    budget = BUDGET_S / (len(counts) * len(PHASES))
    for count in counts:
        options = {"model": str(model) if model else None, "shape": shape, "threads": count}
        options |= {"head": head, "kv": kv}
        for form in PEER_FORMATS if versus else (None,):
            with ExitStack() as processes:
                probe = processes.enter_context(Process("bench_probe", {"threads": count}))
                own = processes.enter_context(Process("bench_worker", options))
                logger.info("%s, %d threads: loaded in %.2f s", name, count, own.facts["load_s"])
                peer = None
                if form is not None:
                    peer_options = {"shape": shape, "threads": count, "form": form}
                    peer = processes.enter_context(Process("bench_peer", peer_options))
                for phase, tokens in PHASES:
                    if tokens >= own.facts["max_context"] - DECODE_PROMPT:
                        continue
                    samples = list(_samples(own, peer, probe, phase, tokens, budget))
                    record = _record(own, phase, tokens, samples)
                    if profile:
                        record["profile"] = _profile(own, probe, phase, tokens)
                    if peer is not None:
                        record["versus"] = _versus(form, record["tok_s"], samples)
                    records.append({"shape": name, "threads": count} | record)
    return records


def _all_threads() -> list[int]:
    """1..n; on big machines the powers of two and n, so that a shape stays within its time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [t for t in range(1, n + 1) if n <= 4 or t == n or t & (t - 1) == 0]


@dataclass(frozen=True)
class _Sample:
    """One measurement of ``tokens`` tokens, beside the peer's of the same moment."""

    tokens: int
    own: dict[str, Any]
    peer: dict[str, Any] | None
    gb_s: float
    gmac_s: float
    first_token_s: float


def _samples(
    own: Process, peer: Process | None, probe: Process, phase: str, tokens: int, budget: float
) -> Iterator[_Sample]:
    """Rounds of all ``tokens``, A B A B, until the budget is spent."""
    sides = [side for side in (own, peer) if side is not None]
    for side in sides:  # pages and clocks wake up
        side.ask(prefill=min(tokens, DECODE_PROMPT))
    started = time.monotonic()
    before = probe.ask()
    rounds = 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.monotonic() - started < budget):
        rounds += 1
        request, sizes = {"prefill": tokens}, [tokens]
        if phase == "decode":
            read = [side.ask(prefill=DECODE_PROMPT) for side in sides]
            request, sizes = {"decode": DECODE_SLICE}, [DECODE_SLICE] * (tokens // DECODE_SLICE)
        for size in sizes:
            ours = own.ask(**request)
            after = probe.ask()
            theirs = peer.ask(**request) if peer is not None else None
            yield _Sample(
                size,
                ours,
                theirs,
                gb_s=(before["gb_s"] + after["gb_s"]) / 2,
                gmac_s=(before["gmac_s"] + after["gmac_s"]) / 2,
                first_token_s=(read[0] if phase == "decode" else ours)["first_token_s"],
            )
            before = probe.ask() if peer is not None else after


def _record(own: Process, phase: str, tokens: int, samples: list[_Sample]) -> dict[str, Any]:
    facts = own.facts
    clean = [s for s in samples if s.own["cpu_share"] >= UNDISTURBED]
    if not clean:
        logger.warning("the machine was busy during every sample; the figures say little")
        clean = samples

    def share(sample: _Sample) -> float:
        tok_s = sample.tokens / sample.own["seconds"]
        if phase == "prefill":
            return float(tok_s * facts["ternary_weights"] / (sample.gmac_s * 1e9))
        return float(tok_s * facts["decode_bytes"] / (sample.gb_s * 1e9))

    return {
        "phase": phase,
        "tokens": tokens,
        "batch": 1,
        "tok_s": statistics.median(s.tokens / s.own["seconds"] for s in clean),
        "roofline_share": statistics.median(map(share, clean)),
        "probe_gb_s": statistics.median(s.gb_s for s in clean),
        "probe_gmac_s": statistics.median(s.gmac_s for s in clean),
        "head_bits": facts["head_bits"],
        "kv": facts["kv"],
        "weight_bits": facts["weight_bits"],
        "peak_rss_bytes": own.ask(memory=True)["peak_rss_bytes"],
        "first_token_s": statistics.median(s.first_token_s for s in clean),
        "versus": None,
    }


def _profile(own: Process, probe: Process, phase: str, tokens: int) -> dict[str, dict[str, float | None]]:
    """Of each phase of the decoder: milliseconds a token, share of the time, and of its own roofline where it has one.

    The median of a few runs by total time; the roofline of linears is the int8 peak in prefill, in decode memory.
    """
    runs = []
    before = probe.ask()
    for _ in range(PROFILE_RUNS):
        found = own.ask(profile=phase, tokens=tokens)
        after = probe.ask()
        key = "gmac_s" if phase == "prefill" else "gb_s"
        runs.append((sum(found["seconds"].values()), (before[key] + after[key]) / 2 * 1e9, found))
        before = after
    total, peak, found = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    return {
        name: {
            "ms_per_token": 1e3 * seconds / tokens,
            "time_share": seconds / total,
            "roofline_share": found["work"][name] / seconds / peak if name in found["work"] else None,
        }
        for name, seconds in found["seconds"].items()
    }


def _versus(form: str | None, tok_s: float, samples: list[_Sample]) -> dict[str, Any]:
    theirs = [(s.tokens, s.peer) for s in samples if s.peer is not None]
    clean = [(n, p) for n, p in theirs if p["cpu_share"] >= UNDISTURBED] or theirs
    peer_tok_s = statistics.median(n / p["seconds"] for n, p in clean)
    return {"name": "llama.cpp", "format": form, "tok_s": peer_tok_s, "ratio": tok_s / peer_tok_s}


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
