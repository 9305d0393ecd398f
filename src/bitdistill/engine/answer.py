"""What a model is asked to write, and what it wrote."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .. import _core
from ..errors import EngineError

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """What a model wrote, and how long it took."""

    text: str
    tokens: list[int]
    """Ids of the text; the token that ended it is not among them."""
    finish_reason: FinishReason
    """``stop``: an end-of-text token or a stop text; ``length``: max_new_tokens; ``context``: the context is full."""
    prompt_tokens: int
    prefill_s: float
    """From the call to the first token's logits."""
    decode_s: float

    def __str__(self) -> str:
        return self.text

    @property
    def decode_tok_s(self) -> float:
        return len(self.tokens) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is written; see ``Engine.stream``.

    Raises:
        EngineError: an impossible value.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or not 1 <= self.max_new_tokens < 2**31:
            raise EngineError(f"max_new_tokens = {self.max_new_tokens!r}: use a positive whole number")
        if not all(isinstance(s, str) and s for s in self.stops):
            raise EngineError("stop: a stop text must not be empty")
        self.sampler()

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampler(self) -> _core.Sampler:
        """A fresh sampler: the same seed, the same choices."""
        try:
            return _core.Sampler(
                temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
            )
        except ValueError as error:
            raise EngineError(str(error)) from error
        except TypeError as error:
            raise EngineError(
                f"temperature = {self.temperature!r}, top_k = {self.top_k!r}, top_p = {self.top_p!r}, "
                f"seed = {self.seed!r}: expected a number, a whole number, a number, and a whole number from 0 to "
                "2^64 - 1"
            ) from error


@dataclass
class Answer:
    """An answer in the making."""

    prompt_tokens: int
    started: float
    prefilled: float
    text: str = ""
    reason: FinishReason = "length"

    def finished(self, tokens: list[int]) -> Generation:
        return Generation(
            text=self.text,
            tokens=tokens,
            finish_reason=self.reason,
            prompt_tokens=self.prompt_tokens,
            prefill_s=self.prefilled - self.started,
            decode_s=time.perf_counter() - self.prefilled,
        )


def until_stop(pieces: Iterator[str], stops: tuple[str, ...], answer: Answer) -> Iterator[str]:
    """``pieces`` up to the first stop text; what may be the beginning of one is held back until that is known."""
    pending = ""
    for piece in pieces:
        pending += piece
        found = [at for at in (pending.find(stop) for stop in stops) if at >= 0]
        if found:
            answer.reason = "stop"
            pending = pending[: min(found)]
            break
        kept = max((_overlap(pending, stop) for stop in stops), default=0)
        ready, pending = pending[: len(pending) - kept], pending[len(pending) - kept :]
        if ready:
            yield ready
    if pending:
        yield pending


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
