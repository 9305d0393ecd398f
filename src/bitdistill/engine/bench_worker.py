"""This package's engine as the benchmark drives it; see ``bench_process`` for the protocol.

{"prefill": n}    ->  {"seconds", "first_token_s", "cpu_share"}   a new text of n random tokens
{"decode": n}     ->  {"seconds", "cpu_share"}                    n more tokens of it
{"memory": true}  ->  {"peak_rss_bytes"}
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from .bench_process import serve
from .loading import PackedModel
from .shapes import find_shape, random_model, ternary_weights

DECODE_PROMPT = 16
"""Tokens before the decoded ones."""


class OwnModel:
    """A model and the text it is at."""

    def __init__(self, model: str | None, shape: str | None, threads: int, head: str) -> None:
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
        self.session = _core.Session(self.core)

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

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request of the protocol."""
        if "memory" in request:
            return {"peak_rss_bytes": _core.memory_usage()["peak_resident"]}
        if "prefill" in request:
            return self._prefill(request["prefill"])
        with Stopwatch() as watch:
            self.session.decode(self.sampler, request["decode"])
        return watch.figures()

    def _prefill(self, tokens: int) -> dict[str, Any]:
        self.session = _core.Session(self.core)
        prompt = self.rng.integers(0, self.shape["vocab_size"], tokens).astype(np.int32)
        with Stopwatch() as watch:
            self.session.forward(prompt)
        with Stopwatch() as after:
            self.session.decode(self.sampler, 1)
        return watch.figures() | {"first_token_s": watch.seconds + after.seconds}


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
