"""An engine as evaluation wants a model: the counterpart of ``TorchScorer`` in ``bitdistill.evaluate``."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .. import _core
from .engine import Engine

LABEL_PIECE = 64
"""Prompts between two looks at signals."""

STOP_PIECE = 8
"""Tokens between two looks for a stop text."""


class EngineScorer:
    """An ``Engine`` as a ``Scorer``. Requests with the same context share one reading of it."""

    def __init__(self, engine: Engine, end_id: int | None = None) -> None:
        """``end_id``: the end-of-text token; None for the model's own stop tokens."""
        self.engine = engine
        self.end_ids = engine.stop_tokens if end_id is None else (end_id,)

    def log_likelihoods(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """``log p(continuation | context)`` for every ``(context ids, continuation ids)``."""
        return [score for score, _ in self.scored(requests, greedy=False)]

    def label_scores(
        self, prompts: Sequence[list[int]], labels: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See ``Engine.label_scores``; a piece of the prompts at a time, so that Ctrl-C is heard."""
        pieces = [prompts[i : i + LABEL_PIECE] for i in range(0, len(prompts), LABEL_PIECE)]
        return [row for piece in pieces for row in self.engine.label_scores(piece, labels)]

    def scored(
        self, requests: Sequence[tuple[list[int], list[int]]], *, greedy: bool = True
    ) -> list[tuple[float, bool]]:
        """``log_likelihoods``; with ``greedy`` also whether greedy decoding would write the continuation."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(index)
        scores = [(0.0, False)] * len(requests)
        for ids, indices in by_context.items():
            found = self.engine.scored(list(ids), [requests[i][1] for i in indices], greedy=greedy)
            for index, score in zip(indices, found, strict=True):
                scores[index] = score
        return scores

    def perplexity(self, sequences: Iterable[Sequence[int]]) -> float:
        """``exp`` of the mean next-token cross-entropy over sequences of at least two ids."""
        total, tokens = 0.0, 0
        for ids in sequences:
            found = self.engine.session().score(np.array(self.engine.checked(ids), np.int32), 1)
            total -= float(found.astype(np.float64).sum())
            tokens += found.size
        return math.exp(total / tokens)

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[int]]:
        """Greedy continuation of every prompt, up to and without the end-of-text token.

        ``stop``: texts that end an answer; it may go on a few tokens behind one.
        """
        return [self._answer(ids, max_new_tokens, stop) for ids in prompts]

    def _answer(self, prompt: list[int], max_new_tokens: int, stop: Sequence[str]) -> list[int]:
        session = self.engine.session()
        session.forward(np.array(self.engine.checked(prompt), np.int32))
        piece = STOP_PIECE if stop else max_new_tokens
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            found, reason = session.decode(
                _core.Sampler(), min(piece, max_new_tokens - len(answer)), self.end_ids
            )
            answer += found
            if reason != "length" or any(s in self.engine.text.decode(answer) for s in stop):
                break
        return answer
