"""Which samples an optimizer step takes, and how the processes share them.

The samples of a step are a function of (seed, step, global batch) alone, so that any number of processes takes the same
ones, and a step that was begun on some continues on others.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from ..config import TrainingConfig
from ..errors import TrainingError

LENGTH_WINDOW = 32
"""Optimizer steps that are sorted by length together: short sequences then share steps, order stays random."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The sequences of one optimizer step: ``batch_size x accumulation x processes``."""

    batch_size: int
    """Sequences per micro-batch and process."""
    accumulation: int
    """Micro-batches per optimizer step."""
    processes: int

    @property
    def size(self) -> int:
        return self.batch_size * self.accumulation * self.processes


def global_batch(config: TrainingConfig, begun_with: int, processes: int) -> GlobalBatch:
    """The recipe's global batch on ``begun_with`` processes, shared by ``processes``.

    Micro-batches are as large as they can be, ``config.batch_size`` at most.

    Raises:
        TrainingError: it cannot be shared equally.
    """
    begun = GlobalBatch(
        batch_size=config.batch_size, accumulation=config.gradient_accumulation_steps, processes=begun_with
    )
    share, rest = divmod(begun.size, processes)
    if rest:
        fitting = [n for n in range(1, begun.size + 1) if begun.size % n == 0]
        near = [max(n for n in fitting if n < processes), *(n for n in fitting if n > processes)][:2]
        raise TrainingError(
            f"{processes} processes cannot share a global batch of {begun.size} sequences (batch_size "
            f"{begun.batch_size} x gradient_accumulation_steps {begun.accumulation} x {begun_with} processes that this "
            f"began with). Start {' or '.join(map(str, near))} to continue it, or use another name to begin anew"
        )
    batch_size = next(size for size in range(min(config.batch_size, share), 0, -1) if share % size == 0)
    return GlobalBatch(batch_size=batch_size, accumulation=share // batch_size, processes=processes)


class SeededOrder(Sampler[int]):
    """Samples of ``steps`` optimizer steps of ``batch_size``, one after the other.

    Epoch follows epoch without a gap, so every step is full: the one in which an epoch ends goes on with the next.
    Each epoch is a permutation that (seed, epoch) decides. With lengths, a step holds sequences of similar length.
    Where samples are numbered, those of epoch n count from ``n * size``: for data that change with the epoch.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        batch_size: int,
        steps: int,
        lengths: list[int] | None = None,
        numbered: bool = False,
    ) -> None:
        self.size, self.seed, self.batch_size, self.steps = size, seed, batch_size, steps
        self.lengths, self.numbered = lengths, numbered

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        samples = (
            index + number * self.size * self.numbered
            for number in itertools.count()
            for index in self.epoch(number)
        )
        return itertools.islice(samples, len(self))

    def epoch(self, number: int) -> list[int]:
        """The samples of one epoch, in their order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        if self.lengths is None:
            return order
        # What completes the last step of the epoch before comes first; then whole steps, one short one at the end.
        begun = -(number * self.size) % self.batch_size
        order, rest = order[:begun], order[begun:]
        steps = []
        window = self.batch_size * LENGTH_WINDOW
        for start in range(0, len(rest), window):
            indices = sorted(rest[start : start + window], key=self.lengths.__getitem__)
            steps += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        last = steps.pop() if steps and len(steps[-1]) < self.batch_size else []
        for index in torch.randperm(len(steps), generator=generator).tolist():
            order += steps[index]
        return order + last
