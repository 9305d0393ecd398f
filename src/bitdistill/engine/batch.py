"""Several prompts at once: one pass over the weights writes a token of each."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from .. import _core
from .answer import Answer, Generation, Sampling, until_stop
from .text import TextCodec


class Batch:
    """Sequences of one engine that write together.

    Each is pulled as if it were alone: whichever asks for a token that is not there yet makes all that still write
    advance by one.
    """

    def __init__(
        self,
        sessions: list[_core.Session],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        text: TextCodec,
        stop_tokens: tuple[int, ...],
    ) -> None:
        started = time.perf_counter()
        self.sessions, self.sampling, self.text, self.stop_tokens = sessions, sampling, text, stop_tokens
        self.samplers = [sampling.sampler() for _ in prompts]
        _core.forward_together(self.sessions, [np.array(ids, np.int32) for ids in prompts])
        prefilled = time.perf_counter()
        self.answers = [Answer(len(ids), started, prefilled) for ids in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.writing = set(range(len(prompts)))

    def generate(self) -> list[Generation]:
        """The answers, in the order of the prompts."""
        texts = [
            until_stop(self.text.stream(self._arriving(i)), self.sampling.stops, answer)
            for i, answer in enumerate(self.answers)
        ]
        found: list[Generation | None] = [None] * len(texts)
        while None in found:
            for i, pieces in enumerate(texts):
                if found[i] is not None:
                    continue
                piece = next(pieces, None)
                if piece is None:
                    self.writing.discard(i)  # a stop text ends it here, the others by themselves
                    found[i] = self.answers[i].finished(self.tokens[i])
                else:
                    self.answers[i].text += piece
        return [generation for generation in found if generation is not None]

    def _arriving(self, i: int) -> Iterator[int]:
        given = 0
        while True:
            if given == len(self.tokens[i]):
                if i not in self.writing:
                    return
                self._advance()
                continue
            yield self.tokens[i][given]
            given += 1

    def _advance(self) -> None:
        """One token for every sequence that still writes."""
        active = sorted(self.writing)
        results = _core.decode_together(
            [self.sessions[i] for i in active],
            [self.samplers[i] for i in active],
            1,
            self.stop_tokens,
        )
        for i, (tokens, reason) in zip(active, results, strict=True):
            self.tokens[i] += tokens
            if reason != "length":
                self.answers[i].reason = reason
            if reason != "length" or len(self.tokens[i]) == self.sampling.max_new_tokens:
                self.writing.discard(i)
