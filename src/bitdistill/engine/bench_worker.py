"""This package's engine as the benchmark drives it; see ``bench_process`` for the protocol.

{"prefill": n, "batch": b}  ->  {"seconds", "first_token_s", "cpu_share"}   b new texts of n random tokens
{"decode": n, "batch": b}   ->  {"seconds", "cpu_share"}                    n more tokens of them, or of one beside them
{"classify": n}   ->  {"seconds", "first_token_s", "cpu_share"}   label logits after a text of n random tokens
{"linears": n}    ->  {"seconds", "cpu_share"}   prefill of n tokens: ternary linears and what prepares their inputs
{"decode_bytes": context}  ->  {"decode_bytes"}
{"memory": true}  ->  {"peak_rss_bytes", "weight_bytes", "kv_bytes"}
{"profile": "prefill" or "decode", "tokens": n}  ->  {"seconds": {phase: s}, "work": {phase: multiply-adds or bytes}}
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..layout import packed_shape
from .bench_process import serve
from .loading import KV_FORMS, PackedModel, linear_shapes
from .shapes import find_shape, random_model, ternary_weights

DECODE_PROMPT = 16
"""Tokens before the decoded ones."""


class OwnModel:
    """A model and the texts it is at."""

    def __init__(
        self,
        model: str | None,
        shape: str | None,
        threads: int,
        head: str,
        kv: str,
        screening: bool = False,
        vocabulary: int | None = None,
        labels: int | None = None,
        activation_bits: int | None = None,
    ) -> None:
        started = time.perf_counter()
        if model is not None:
            packed = PackedModel.open(Path(model))
            self.shape = packed.config
            self.core = packed.load(threads=threads, screened=screening)
        else:
            assert shape is not None
            self.shape = find_shape(shape, activation_bits) | (
                {"vocab_size": vocabulary} if vocabulary else {}
            )
            self.core = random_model(self.shape, head, threads=threads, screened=screening)
        self.load_s = time.perf_counter() - started
        self.rng = np.random.default_rng(0)
        self.kv = kv if kv != "auto" else KV_FORMS[self.shape["packed"].get("kv_bits", 16)]
        self.sessions: list[_core.Session] = []
        self.alone = _core.Session(self.core, kv=self.kv)
        """What is decoded beside a batch."""
        self.labels = None if labels is None else _core.LabelHead(self.core, list(range(labels)), kv=self.kv)

    def facts(self) -> dict[str, Any]:
        """What does not change from sample to sample."""
        weights, memory = ternary_weights(self.shape), self.core.memory()
        table = memory["head"] or memory["embedding"]
        bits = 8 * table / (self.shape["vocab_size"] * self.shape["hidden_size"])
        return {
            "load_s": self.load_s,
            "isa": self.core.isa,
            "kv": self.kv,
            "activation_bits": self.shape["packed"]["activation_bits"],
            "screening": self.core.memory()["screen"] > 0,
            "max_context": self.shape["max_position_embeddings"],
            "ternary_weights": weights,
            "weight_bits": round(8 * memory["ternary"] / weights, 3),
            "head_bits": int(2 ** round(np.log2(bits))),
            "decode_bytes": self.core.decode_bytes(DECODE_PROMPT + 64, self.kv),
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request of the protocol."""
        if "memory" in request:
            parts = self.core.memory()
            return {
                "peak_rss_bytes": _core.memory_usage()["peak_resident"],
                "weight_bytes": sum(parts.values()) - parts["mapped"],
                "kv_bytes": sum(session.memory()["kv_cache"] for session in self.sessions),
            }
        if "profile" in request:
            return self._profile(request["profile"], request["tokens"])
        if "linears" in request:
            return self._linears(request["linears"])
        if "decode_bytes" in request:
            return {"decode_bytes": self.core.decode_bytes(request["decode_bytes"], self.kv)}
        if "classify" in request:
            assert self.labels is not None
            text = self._text(request["classify"])
            with Stopwatch() as watch:
                self.labels.logits([text])
            return watch.figures() | {"first_token_s": watch.seconds}
        batch = request.get("batch", 1)
        if "prefill" in request:
            return self._prefill(request["prefill"], batch)
        texts = self.sessions if batch == len(self.sessions) else [self.alone]
        with Stopwatch() as watch:
            self._decode(texts, request["decode"])
        return watch.figures()

    def _text(self, tokens: int) -> NDArray[np.int32]:
        return self.rng.integers(0, self.shape["vocab_size"], tokens).astype(np.int32)

    def _prefill(self, tokens: int, batch: int) -> dict[str, Any]:
        if len(self.sessions) != batch:
            self.sessions = [_core.Session(self.core, kv=self.kv) for _ in range(batch)]
        for session in self.sessions:
            session.truncate(0)  # pages stay, as in the peer's context
        prompts = [self._text(tokens) for _ in self.sessions]
        with Stopwatch() as watch:
            if batch == 1:
                self.sessions[0].forward(prompts[0])
            else:
                _core.forward_together(self.sessions, prompts)
        with Stopwatch() as after:
            self._decode(self.sessions, 1)
        if batch > 1:
            self.alone.truncate(0)
            self.alone.forward(prompts[0])
        return watch.figures() | {"first_token_s": watch.seconds + after.seconds}

    def _decode(self, sessions: list[_core.Session], tokens: int) -> None:
        if len(sessions) == 1:
            sessions[0].decode(_core.Sampler(), tokens)
        else:
            _core.decode_together(sessions, [_core.Sampler() for _ in sessions], tokens)

    def _profile(self, phase: str, tokens: int) -> dict[str, Any]:
        """Seconds by phase, and the bytes (decode) or multiply-adds (prefill) that a phase cannot do without."""
        session = _core.Session(self.core, kv=self.kv)
        if phase == "decode":
            session.forward(self._text(DECODE_PROMPT))
            session.decode(_core.Sampler(), 1)
        session.start_profile()
        started = time.perf_counter()
        if phase == "decode":
            session.decode(_core.Sampler(), tokens)
        else:
            session.forward(self._text(tokens))
        total = time.perf_counter() - started
        seconds = session.profile
        seconds["other"] = total - sum(seconds.values())
        return {"seconds": seconds, "work": self._work(phase, tokens)}

    def _linears(self, tokens: int) -> dict[str, float]:
        session = _core.Session(self.core, kv=self.kv)
        session.start_profile()
        with Stopwatch() as watch:
            session.forward(self._text(tokens))
        seconds = sum(session.profile[phase] for phase in ("norm", *dict.fromkeys(_PHASE_OF.values())))
        return watch.figures() | {"seconds": seconds}

    def _work(self, phase: str, tokens: int) -> dict[str, float]:
        layers = self.shape["num_hidden_layers"]
        work = dict.fromkeys(("qkv", "o_proj", "gate_up", "down_proj"), 0.0)
        for path, (rows, columns) in linear_shapes(self.shape).items():
            size = math.prod(packed_shape(rows, columns)) if phase == "decode" else rows * columns
            work[_PHASE_OF[path.rpartition(".")[2]]] += layers * tokens * size
        if phase == "decode":
            memory = self.core.memory()
            work["head"] = tokens * (memory["screen"] or memory["head"] or memory["embedding"])
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
