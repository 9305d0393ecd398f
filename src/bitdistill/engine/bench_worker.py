"""This package's engine as the benchmark drives it; see ``bench_process`` for the protocol.

{"prefill": n}    ->  {"seconds", "first_token_s", "cpu_share"}   a new text of n random tokens
{"decode": n}     ->  {"seconds", "cpu_share"}                    n more tokens of it
{"memory": true}  ->  {"peak_rss_bytes"}
{"profile": "prefill" or "decode", "tokens": n}  ->  {"seconds": {phase: s}, "work": {phase: multiply-adds or bytes}}
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..layout import packed_shape
from .bench_process import serve
from .loading import PackedModel, linear_shapes
from .shapes import find_shape, random_model, ternary_weights

DECODE_PROMPT = 16
"""Tokens before the decoded ones."""


class OwnModel:
    """A model and the text it is at."""

    def __init__(self, model: str | None, shape: str | None, threads: int, head: str, kv: str) -> None:
        started = time.perf_counter()
        if model is not None:
            packed = PackedModel.open(Path(model))
            self.shape = packed.config
            self.core = packed.load(threads=threads)
        else:
            assert shape is not None
            self.shape = find_shape(shape)
            self.core = random_model(self.shape, head, threads=threads)
        self.load_s = time.perf_counter() - started
        self.rng = np.random.default_rng(0)
        self.sampler = _core.Sampler()
        self.kv = kv
        self.session = _core.Session(self.core, kv=kv)

    def facts(self) -> dict[str, Any]:
        """What does not change from sample to sample."""
        weights, memory = ternary_weights(self.shape), self.core.memory()
        table = memory["head"] or memory["embedding"]
        bits = 8 * table / (self.shape["vocab_size"] * self.shape["hidden_size"])
        return {
            "load_s": self.load_s,
            "isa": self.core.isa,
            "kv": self.kv,
            "max_context": self.shape["max_position_embeddings"],
            "ternary_weights": weights,
            "weight_bits": round(8 * memory["ternary"] / weights, 3),
            "head_bits": int(2 ** round(np.log2(bits))),
            "decode_bytes": self.core.decode_bytes(DECODE_PROMPT + 64, self.kv),
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request of the protocol."""
        if "memory" in request:
            return {"peak_rss_bytes": _core.memory_usage()["peak_resident"]}
        if "profile" in request:
            return self._profile(request["profile"], request["tokens"])
        if "prefill" in request:
            return self._prefill(request["prefill"])
        with Stopwatch() as watch:
            self.session.decode(self.sampler, request["decode"])
        return watch.figures()

    def _prefill(self, tokens: int) -> dict[str, Any]:
        self.session = _core.Session(self.core, kv=self.kv)
        prompt = self.rng.integers(0, self.shape["vocab_size"], tokens).astype(np.int32)
        with Stopwatch() as watch:
            self.session.forward(prompt)
        with Stopwatch() as after:
            self.session.decode(self.sampler, 1)
        return watch.figures() | {"first_token_s": watch.seconds + after.seconds}

    def _profile(self, phase: str, tokens: int) -> dict[str, Any]:
        """Seconds by phase, and the bytes (decode) or multiply-adds (prefill) that a phase cannot do without."""
        self.session = _core.Session(self.core, kv=self.kv)
        prompt = self.rng.integers(0, self.shape["vocab_size"], DECODE_PROMPT).astype(np.int32)
        if phase == "decode":
            self.session.forward(prompt)
            self.session.decode(self.sampler, 1)
        self.session.start_profile()
        started = time.perf_counter()
        if phase == "decode":
            self.session.decode(self.sampler, tokens)
        else:
            self.session.forward(self.rng.integers(0, self.shape["vocab_size"], tokens).astype(np.int32))
        total = time.perf_counter() - started
        seconds = self.session.profile
        seconds["other"] = total - sum(seconds.values())
        return {"seconds": seconds, "work": self._work(phase, tokens)}

    def _work(self, phase: str, tokens: int) -> dict[str, float]:
        layers = self.shape["num_hidden_layers"]
        work = dict.fromkeys(("qkv", "o_proj", "gate_up", "down_proj"), 0.0)
        for path, (rows, columns) in linear_shapes(self.shape).items():
            size = math.prod(packed_shape(rows, columns)) if phase == "decode" else rows * columns
            work[_PHASE_OF[path.rpartition(".")[2]]] += layers * tokens * size
        if phase == "decode":
            memory = self.core.memory()
            work["head"] = tokens * (memory["head"] or memory["embedding"])
        return work


_PHASE_OF = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o_proj",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down_proj",
}


class Stopwatch:
    """Seconds of a block, and the share of them that its thread had a CPU."""

    def __enter__(self) -> "Stopwatch":
        self._started, self._cpu = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.cpu_s = time.thread_time() - self._cpu

    def figures(self) -> dict[str, float]:
        """As the protocol names them."""
        return {"seconds": self.seconds, "cpu_share": self.cpu_s / max(1e-9, self.seconds)}


if __name__ == "__main__":
    serve(OwnModel)
