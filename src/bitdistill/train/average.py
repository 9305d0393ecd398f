"""An exponential moving average of the weights, kept beside their training and put in their place at its end.

After step n the average is ``sum_i d^(n - i) w_i / sum_i d^(n - i)``, i = 1 ... n: without a share of the weights that
training started from, however short it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from ..errors import ConfigError

AVERAGE_FILE = "average.pt"
"""Inside a checkpoint: the average and the number of steps in it."""


class WeightAverage(TrainerCallback):
    """The average of a student's parameters, in their dtype, which is fp32."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.student, self.decay = student, decay
        self.averaged = AveragedModel(student, multi_avg_fn=self._update)

    @torch.no_grad()
    def _update(self, averages: list[Tensor], weights: list[Tensor], steps: Tensor | int) -> None:
        newest = (1 - self.decay) / (1 - self.decay ** (int(steps) + 1))
        torch._foreach_lerp_(averages, weights, newest)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the weights of the step that has ended."""
        self.averaged.update_parameters(self.student)

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint."""
        torch.save(self.averaged.state_dict(), checkpoint / AVERAGE_FILE)

    def load(self, checkpoint: Path) -> None:
        """Go on with the average of a checkpoint."""
        state = torch.load(checkpoint / AVERAGE_FILE, map_location="cpu", weights_only=True)
        self.averaged.load_state_dict(state)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The student has the averaged weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def finish(self) -> None:
        """Give the student the averaged weights."""
        for weight, average in self._pairs():
            weight.copy_(average)

    def _swap(self) -> None:
        for weight, average in self._pairs():
            weight.data, average.data = average.data, weight.data

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.student.parameters(), self.averaged.module.parameters(), strict=True)


def weight_average(student: nn.Module, decay: float, *, sharded: bool) -> WeightAverage | None:
    """The average of a student that is about to be trained; None where none is kept.

    Args:
        sharded: whether FSDP2 will shard the student.

    Raises:
        ConfigError: it will be.
    """
    if not decay:
        return None
    if sharded:
        raise ConfigError(
            f"ema_decay = {decay}: FSDP2 shards the weights, and their average is kept whole; start without FSDP, or "
            "set ema_decay = 0"
        )
    return WeightAverage(student, decay)
