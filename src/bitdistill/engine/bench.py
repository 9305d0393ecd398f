"""``bitdistill bench``: prefill and decode beside the roofline of the same moment, and in turns with a peer.

    prefill:  roofline_share = tok_s * ternary weights / probed int8 multiply-adds a second
    linears:  the ternary linears of a prefill with what prepares their inputs (BitNet v2); roofline_share as prefill
    decode:   roofline_share = tok_s / batch * bytes read for a token / probed bytes a second
    classify: label logits after a text, as prefill
    load:     first_token_s of a fresh process: opening the file and loading, then LOAD_PROMPT tokens to the first token

Embedding, head, norms and attention are part of the measured time. The machine is probed before and after every sample,
since the bandwidth of a shared machine doubles and halves within seconds; decoding is therefore sampled in slices of
16 tokens. Figures are medians over samples; one whose thread had the CPU for less than 97 % of the time is dropped
while others are left.
"""

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .bench_process import Process
from .bench_worker import DECODE_PROMPT
from .shapes import HEADS, find_shape, write_random

logger = logging.getLogger(__name__)

PHASES = (("prefill", 128, 1), ("prefill", 512, 1), ("decode", 128, 1))
V2_PHASES = (("linears", 512, 1), ("prefill", 512, 1), ("decode", 128, 1))
"""Of a shape with 4-bit activations, beside the same shape with 8 bits."""
LONG_CONTEXT = 4096
"""Tokens before those that are decoded on a four-bit cache beside an fp16 one."""
CLASSIFY_TOKENS = 512
LOAD_PROMPT = 8
DECODE_SLICE = 16
MOST_ROUNDS, LEAST_ROUNDS = 7, 2
BUDGET_S = 200.0
"""Time for all samples of a shape without a peer; loading comes on top."""
UNDISTURBED = 0.97
PROFILE_RUNS = 5
PEER_FORMATS = ("TQ2_0", "BF16")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is measured; ``head`` and ``vocabulary`` are for a shape."""

    head: str = "int8"
    kv: str = "auto"
    screening: bool = False
    vocabulary: int | None = None
    batches: tuple[int, ...] = ()
    labels: int | None = None
    load: bool = False
    profile: bool = False

    def phases(self) -> tuple[tuple[str, int, int], ...]:
        """Phase, tokens and sequences of each record."""
        if self.labels is not None:
            return (("classify", CLASSIFY_TOKENS, 1),)
        return PHASES + tuple(("decode", 128, batch) for batch in self.batches)


def run_bench(
    model: Path | None,
    shape: str | None,
    threads: Sequence[int] = (),
    measured: Measured = Measured(),
    *,
    versus: str | None = None,
    formats: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measure a model or a shape at each number of threads; one record per phase, and per format of the peer.

    Raises:
        ConfigError: not exactly one of ``model`` and ``shape``, an unknown shape or peer, impossible numbers.
        EngineError: a measuring process failed.
    """
    if (model is None) == (shape is None):
        raise ConfigError("name an exported model or a --shape, not both and not neither")
    if shape is not None:
        find_shape(shape)
    elif measured.vocabulary is not None:
        raise ConfigError("--vocabulary is for a --shape; a model has its own")
    if measured.screening and shape is not None and measured.head != "bf16":
        raise ConfigError(
            f"--screening spares reading most of a bf16 head, not of --head {measured.head}; leave one out"
        )
    if measured.head not in HEADS:
        raise ConfigError(f"--head {measured.head}: use one of {', '.join(HEADS)}")
    if measured.labels is not None and (versus or measured.batches or measured.profile):
        raise ConfigError("--labels measures classification alone; leave out --versus, --batch and --profile")
    if measured.vocabulary is not None and versus:
        raise ConfigError("--versus has the whole vocabulary of the shape; leave --vocabulary out")
    for option, values, most in (
        ("--threads", threads, 1024),
        ("--batch", measured.batches, 256),
        ("--labels", [1 if measured.labels is None else measured.labels], 1024),
        ("--vocabulary", [1 if measured.vocabulary is None else measured.vocabulary], 1 << 20),
    ):
        if any(not 1 <= value <= most for value in values):
            raise ConfigError(f"{option} {min(values)}: use 1 to {most}")
    if versus is not None:
        _check_peer(versus, shape)
    unknown = [form for form in formats if form not in PEER_FORMATS or versus is None]
    if unknown:
        raise ConfigError(f"--format {unknown[0]}: use {' or '.join(PEER_FORMATS)}, with --versus")
    is_v2 = shape is not None and find_shape(shape)["packed"]["activation_bits"] == 4
    if is_v2 and (
        versus or measured.labels is not None or measured.batches or measured.kv not in ("auto", "fp16")
    ):
        raise ConfigError(
            f"--shape {shape} is measured with 4 beside 8 bits of activations, and int4 beside fp16 keys and values; "
            "leave out --versus, --labels, --batch and --kv-cache"
        )
    counts = list(threads) or _all_threads()
    budget = BUDGET_S / (len(counts) * len(PHASES))
    records: list[dict[str, Any]] = []
    for count in counts:
        for form in (formats or PEER_FORMATS) if versus else (None,):
            with ExitStack() as processes:
                if is_v2 and shape is not None:
                    records += _measure_v2(shape, count, measured, budget, processes)
                else:
                    records += _measure(model, shape, count, measured, form, budget, processes)
        if measured.load:
            records.append(_load(model, shape, count, measured))
    if not records:
        raise ConfigError(f"{model}: its context is too short for anything that is measured")
    return records


def _measure(
    model: Path | None,
    shape: str | None,
    threads: int,
    measured: Measured,
    form: str | None,
    budget: float,
    processes: ExitStack,
) -> Iterator[dict[str, Any]]:
    """The records of one number of threads beside one format of the peer."""
    name = shape or str(model)
    probe = processes.enter_context(Process("bench_probe", {"threads": threads}))
    own = processes.enter_context(Process("bench_worker", _options(model, shape, threads, measured)))
    logger.info("%s, %d threads: loaded in %.2f s", name, threads, own.facts["load_s"])
    peer = None
    if form is not None:
        peer_options = {"shape": shape, "threads": threads, "form": form}
        peer = Side("llama.cpp", form, processes.enter_context(Process("bench_peer", peer_options)))
    for phase, tokens, batch in measured.phases():
        if DECODE_PROMPT + 1 + tokens > own.facts["max_context"]:
            continue
        rival = peer if batch == 1 else Side("batch 1", None, own)
        samples = list(_samples(own, rival, probe, phase, tokens, batch, budget))
        record = _record(own, phase, tokens, batch, samples)
        if measured.profile and batch == 1 and phase != "classify":
            record["profile"] = _profile(own, probe, phase, tokens)
        if rival is not None:
            record["versus"] = _versus(rival, batch, samples)
        yield {"shape": name, "threads": threads} | record


def _measure_v2(
    shape: str, threads: int, measured: Measured, budget: float, processes: ExitStack
) -> Iterator[dict[str, Any]]:
    """The records of a shape with 4-bit activations beside 8-bit ones, and of a four-bit cache beside fp16."""

    def worker(bits: int, kv: str) -> Process:
        changed = {"activation_bits": bits, "kv": kv}
        return processes.enter_context(
            Process("bench_worker", _options(None, shape, threads, measured) | changed)
        )

    probe = processes.enter_context(Process("bench_probe", {"threads": threads}))
    own, eight_bits = worker(4, "fp16"), Side("A8", None, worker(8, "fp16"))
    for phase, tokens, batch in V2_PHASES:
        samples = list(_samples(own, eight_bits, probe, phase, tokens, batch, budget))
        record = _record(own, phase, tokens, batch, samples)
        if measured.profile and phase != "linears":
            record["profile"] = _profile(own, probe, phase, tokens)
        yield {"shape": shape, "threads": threads} | record | {"versus": _versus(eight_bits, batch, samples)}
    low_bits, fp16 = worker(4, "int4"), Side("kv fp16", None, own)
    samples = list(_samples(low_bits, fp16, probe, "decode", 64, 1, budget, LONG_CONTEXT))
    low_bits.facts |= low_bits.ask(decode_bytes=LONG_CONTEXT)
    against = _versus(fp16, 1, samples) | {"kv_bytes": own.ask(memory=True)["kv_bytes"]}
    record = _record(low_bits, "decode", 64, 1, samples) | {"context": LONG_CONTEXT, "versus": against}
    yield {"shape": shape, "threads": threads} | record


def _options(model: Path | None, shape: str | None, threads: int, measured: Measured) -> dict[str, Any]:
    return {
        "model": str(model) if model else None,
        "shape": shape,
        "threads": threads,
        "head": measured.head,
        "kv": measured.kv,
        "screening": measured.screening,
        "vocabulary": measured.vocabulary,
        "labels": measured.labels,
    }


def _load(model: Path | None, shape: str | None, threads: int, measured: Measured) -> dict[str, Any]:
    """The record of loading: a process of its own each time, the file in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = model
        if path is None:
            assert shape is not None
            settings = find_shape(shape)
            if measured.vocabulary:
                settings = settings | {"vocab_size": measured.vocabulary}
            path = write_random(Path(folder) / "model", settings, measured.head)
        seconds = []
        for _ in range(MOST_ROUNDS + 1):
            with Process("bench_worker", _options(path, None, threads, measured)) as own:
                seconds.append(own.facts["load_s"] + own.ask(prefill=LOAD_PROMPT)["first_token_s"])
                facts, memory = own.facts, own.ask(memory=True)
    first_token_s = statistics.median(seconds[1:])  # the first round fills the page cache
    return {
        "shape": shape or str(model),
        "threads": threads,
        "phase": "load",
        "tokens": LOAD_PROMPT,
        "batch": 1,
        "tok_s": LOAD_PROMPT / first_token_s,
        "roofline_share": None,
        "head_bits": facts["head_bits"],
        "kv": facts["kv"],
        "activation_bits": facts["activation_bits"],
        "weight_bits": facts["weight_bits"],
        **memory,
        "first_token_s": first_token_s,
        "versus": None,
    }


def _all_threads() -> list[int]:
    """1..n; on big machines the powers of two and n, so that a shape stays within its time."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [t for t in range(1, n + 1) if n <= 4 or t == n or t & (t - 1) == 0]


@dataclass(frozen=True)
class Side:
    """What a measurement is held against: a peer, or the same model on one sequence."""

    name: str
    form: str | None
    process: Process


@dataclass(frozen=True)
class _Sample:
    """One measurement of ``tokens`` tokens, beside the other side's of the same moment."""

    tokens: int
    own: dict[str, Any]
    other: dict[str, Any] | None
    gb_s: float
    gmac_s: float
    first_token_s: float | None


def _samples(
    own: Process,
    rival: Side | None,
    probe: Process,
    phase: str,
    tokens: int,
    batch: int,
    budget: float,
    prompt: int = DECODE_PROMPT,
) -> Iterator[_Sample]:
    """Rounds of all ``tokens``, A B A B, until the budget is spent; ``prompt`` tokens come before what is decoded."""
    together = {"batch": batch} if batch > 1 else {}
    first = {"classify": DECODE_PROMPT} if phase == "classify" else {"prefill": DECODE_PROMPT}
    for side in [own] + ([rival.process] if rival else []):  # pages and clocks wake up
        side.ask(**first)
    started = time.monotonic()
    before = probe.ask()
    rounds = 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.monotonic() - started < budget):
        rounds += 1
        request, sizes = {phase: tokens}, [tokens]
        if phase == "decode":
            read = own.ask(prefill=prompt, **together)
            if rival and rival.process is not own:
                rival.process.ask(prefill=prompt)
            request, sizes = {"decode": DECODE_SLICE}, [DECODE_SLICE] * (tokens // DECODE_SLICE)
        for size in sizes:
            ours = own.ask(**request, **together)
            after = probe.ask()
            theirs = rival.process.ask(**request) if rival is not None else None
            yield _Sample(
                size,
                ours,
                theirs,
                gb_s=(before["gb_s"] + after["gb_s"]) / 2,
                gmac_s=(before["gmac_s"] + after["gmac_s"]) / 2,
                first_token_s=(read if phase == "decode" else ours).get("first_token_s"),
            )
            before = probe.ask() if rival is not None else after


def _record(own: Process, phase: str, tokens: int, batch: int, samples: list[_Sample]) -> dict[str, Any]:
    facts = own.facts
    clean = [s for s in samples if s.own["cpu_share"] >= UNDISTURBED]
    if not clean:
        logger.warning("the machine was busy during every sample; the figures say little")
        clean = samples

    firsts = [s.first_token_s for s in clean if s.first_token_s is not None]

    def share(sample: _Sample) -> float:
        steps_s = sample.tokens / sample.own["seconds"]
        if phase == "decode":
            return float(steps_s * facts["decode_bytes"] / (sample.gb_s * 1e9))
        return float(steps_s * facts["ternary_weights"] / (sample.gmac_s * 1e9))

    return {
        "phase": phase,
        "tokens": tokens,
        "batch": batch,
        "tok_s": statistics.median(batch * s.tokens / s.own["seconds"] for s in clean),
        "roofline_share": statistics.median(map(share, clean)),
        "probe_gb_s": statistics.median(s.gb_s for s in clean),
        "probe_gmac_s": statistics.median(s.gmac_s for s in clean),
        "samples": len(clean),
        "disturbed_samples": len(samples) - len(clean),
        "head_bits": facts["head_bits"],
        "kv": facts["kv"],
        "activation_bits": facts["activation_bits"],
        "weight_bits": facts["weight_bits"],
        "screening": facts["screening"],
        **own.ask(memory=True),
        "first_token_s": statistics.median(firsts) if firsts else None,
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


def _versus(rival: Side, batch: int, samples: list[_Sample]) -> dict[str, Any]:
    """Median speed of the other side, and the median ratio of neighbouring samples."""
    pairs = [(s, s.other) for s in samples if s.other is not None]
    clean = [(s, o) for s, o in pairs if min(s.own["cpu_share"], o["cpu_share"]) >= UNDISTURBED] or pairs
    return {
        "name": rival.name,
        "format": rival.form,
        "tok_s": statistics.median(s.tokens / o["seconds"] for s, o in clean),
        "ratio": statistics.median(batch * o["seconds"] / s.own["seconds"] for s, o in clean),
        "pairs": len(clean),
    }


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
