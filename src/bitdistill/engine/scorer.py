"""An engine as evaluation wants a model: the counterpart of ``TorchScorer`` in ``bitdistill.evaluate``."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .. import _core
from .engine import Engine


class EngineScorer:
    """An ``Engine`` as a ``Scorer``. Requests with the same context share one reading of it."""

    def __init__(self, engine: Engine, end_id: int | None = None) -> None:
        """``end_id``: the end-of-text token; None for the model's own stop tokens."""
        self.engine = engine
        self.end_ids = engine.stop_tokens if end_id is None else (end_id,)

    def log_likelihoods(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """``log p(continuation | context)`` for every ``(context ids, continuation ids)``."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(index)
        scores = [0.0] * len(requests)
        for ids, indices in by_context.items():
            found = self.engine.log_likelihoods(list(ids), [requests[i][1] for i in indices])
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

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of every prompt, up to and without the end-of-text token."""
        answers = []
        for ids in prompts:
            session = self.engine.session()
            session.forward(np.array(self.engine.checked(ids), np.int32))
            answers.append(session.decode(_core.Sampler(), max_new_tokens, self.end_ids)[0])
        return answers
