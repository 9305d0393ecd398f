"""The loss on text that no training step reads, while training goes on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from ..data.corpus import collate_packed
from .objective import Objective

EVAL_TOKENS = 4096
"""Tokens of a batch."""


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices below ``count`` at equal distances, or all of them where there are fewer."""
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


@torch.no_grad()
def heldout_loss(objective: Objective, sequences: Any, length: int, indices: Sequence[int]) -> float:
    """Mean cross-entropy, in nats, of packed sequences of ``length``; in the model's own dtype, fully quantised."""
    device = objective.student.device
    was_training = objective.training
    objective.eval()
    total, tokens = 0.0, 0
    per_batch = max(1, EVAL_TOKENS // length)
    for start in range(0, len(indices), per_batch):
        items = [sequences[i] for i in indices[start : start + per_batch]]
        batch = {key: value.to(device) for key, value in collate_packed(items).items()}
        ones = torch.ones(len(objective.count_names), dtype=torch.int64, device=device)
        total += float(objective(totals=ones, **batch)["loss/ce"])
        tokens += int(objective.counts(batch)[0])
    objective.train(was_training)
    return total / tokens


class HeldoutLoss(TrainerCallback):
    """Held-out loss every few steps and at the last one: a function of the weights, so a resumed run has the same.

    Every process computes all of it: sharded weights need them all, and the sum keeps its order.
    """

    def __init__(self, objective: Objective, sequences: Any, length: int, every: int, count: int) -> None:
        self.objective, self.sequences = objective, sequences
        self.length, self.every = length, every
        self.indices = spread(len(sequences), count)
        self.last: float | None = None
        self.judged: Callable[[], AbstractContextManager[None]] = nullcontext
        """Puts what is judged in the student's place, where that is not the student as it is."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Compute the loss that is due, and have the step logged."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            with self.judged():
                self.last = heldout_loss(self.objective, self.sequences, self.length, self.indices)
            control.should_log = True

    def take(self) -> dict[str, float]:
        """The loss of the step that is logged, if it has one."""
        found = {} if self.last is None else {"heldout/loss": self.last}
        self.last = None
        return found
