"""A process that holds one model and measures it on request, so that a peak of memory is one model's own.

One JSON request a line on standard input, one JSON answer a line on standard output:

    {"phase": "prefill" | "decode", "tokens": n}  ->  {"seconds", "first_token_s", "cpu_share"}
    {"probe": true}                               ->  {"gb_s", "gmac_s"}
    {"memory": true}                              ->  {"peak_rss_bytes"}
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from .loading import PackedModel
from .shapes import find_shape, random_model, ternary_weights

DECODE_PROMPT = 16
"""Tokens before the decoded ones."""


class OwnModel:
    """This package's engine as the benchmark drives it."""

    def __init__(self, model: str | None, shape: str | None, threads: int, head: str) -> None:
        started = time.perf_counter()
        if model is not None:
            packed = PackedModel.open(Path(model))
            self.shape = packed.config
            self.shape.setdefault("head_dim", self.shape["hidden_size"] // self.shape["num_attention_heads"])
            self.core = packed.load(threads=threads)
        else:
            assert shape is not None
            self.shape = find_shape(shape)
            self.core = random_model(self.shape, head, threads=threads)
        self.load_s = time.perf_counter() - started
        self.rng = np.random.default_rng(0)

    def facts(self) -> dict[str, Any]:
        """What does not change from sample to sample."""
        weights, memory = ternary_weights(self.shape), self.core.memory()
        table = memory["head"] or memory["embedding"]
        bits = 8 * table / (self.shape["vocab_size"] * self.shape["hidden_size"])
        return {
            "load_s": self.load_s,
            "isa": self.core.isa,
            "max_context": self.shape["max_position_embeddings"],
            "ternary_weights": weights,
            "weight_bits": round(8 * memory["ternary"] / weights, 3),
            "head_bits": int(2 ** round(np.log2(bits))),
            "decode_bytes": self.core.decode_bytes(DECODE_PROMPT + 64),
        }

    def measure(self, phase: str, tokens: int) -> dict[str, float]:
        """Seconds of one prefill of ``tokens``, or of decoding ``tokens``."""
        session = _core.Session(self.core)
        length = tokens if phase == "prefill" else DECODE_PROMPT
        prompt = self.rng.integers(0, self.shape["vocab_size"], length).astype(np.int32)
        started, cpu = time.perf_counter(), time.thread_time()
        session.forward(prompt)
        read = time.perf_counter() - started
        sampler = _core.Sampler()
        session.decode(sampler, 1)
        first = time.perf_counter() - started
        seconds = read
        if phase == "decode":
            started, cpu = time.perf_counter(), time.thread_time()
            session.decode(sampler, tokens)
            seconds = time.perf_counter() - started
        share = (time.thread_time() - cpu) / max(1e-9, time.perf_counter() - started)
        return {"seconds": seconds, "first_token_s": first, "cpu_share": share}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request of the protocol."""
        if request.get("probe"):
            return {
                "gb_s": _core.probe_bandwidth(self.core.threads, 0.2),
                "gmac_s": _core.probe_int8(self.core.threads, 0.15),
            }
        if request.get("memory"):
            return {"peak_rss_bytes": _core.memory_usage()["peak_resident"]}
        return self.measure(request["phase"], request["tokens"])


def serve(worker: Any) -> None:
    """Answer requests until standard input ends."""
    print(json.dumps(worker.facts()), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    from ..errors import BitDistillError

    try:
        serve(OwnModel(**json.loads(sys.argv[1])))
    except (BitDistillError, ValueError, RuntimeError, MemoryError) as error:
        print(json.dumps({"error": str(error) or "not enough memory"}), flush=True)
