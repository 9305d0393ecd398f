"""What a batch is taught by: the teacher's body beside the student, or what its cache says of the batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TrainingError
from .head_loss import block_linear
from .losses import logits_kd, top_k_kd
from .sharding import shard_frozen
from .taps import States, attention_layers, run_tapped

Rows: TypeAlias = slice | Tensor
"""Some of the tokens of the logits KD of a batch: a run of them, or their indices."""


@dataclass(frozen=True)
class LogitsKd:
    """The logits KD of a batch, for some of its tokens at a time."""

    loss: Callable[..., Tensor]
    """``(student's logits [n, V], rows=Rows, mask_N=bool [n] or None) -> sum``; the teacher's logits come second if
    they are made."""
    logits: Callable[[Rows], Tensor] | None = None
    """The teacher's logits of some rows ``[n, V]``; None if the loss does without."""


class Targets(NamedTuple):
    """What the teacher gives for one batch."""

    logits_kd: LogitsKd | None
    """None where it was not asked for."""
    states: dict[int, States]


class LiveTeacher:
    """The teacher runs on every batch, without gradients."""

    def __init__(
        self, model: PreTrainedModel, temperature: float, states: Literal["post_rope", "pre_rope"]
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.temperature, self.states = temperature, states
        self.vocab_size = int(model.config.vocab_size)
        self.num_layers = len(attention_layers(model))

    @torch.no_grad()
    def targets(
        self, batch: Mapping[str, Tensor], kd_mask_BT: Tensor | None, layers: tuple[int, ...]
    ) -> Targets:
        """The logits KD of the tokens ``kd_mask_BT``, bool ``[B, T]``, and the states of ``layers``."""
        model = self.model
        if model.device != batch["input_ids"].device:
            model.to(batch["input_ids"].device)
        hidden, states = run_tapped(model, batch, layers, self.states)
        if kd_mask_BT is None:
            return Targets(None, states)
        head = model.get_output_embeddings()
        return Targets(_kd_of_hidden(head, hidden[kd_mask_BT], self.temperature), states)

    def shard(self) -> None:
        """Give each process a part of the decoder; the head, read in blocks, stays whole."""
        names = self.model._no_split_modules
        layers = [module for module in self.model.modules() if type(module).__name__ in names]
        shard_frozen(self.model, layers)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise TrainingError where the logits of the two would be over different tokens."""
    if student.get_vocab() != teacher.get_vocab():
        raise TrainingError(
            f"teacher and student have different tokenizers ({len(teacher)} and {len(student)} entries): their logits "
            "are over different tokens. Use a teacher fine-tuned from the same model family and tokenizer"
        )


class CachedTeacher:
    """What the teacher said comes with the batch, under the names of ``data/teacher_rows.py``.

    Args:
        head: the teacher's output head, where hidden states are kept.
        vocab_size, num_layers: the teacher's.
        temperature: of the logits KD.
    """

    def __init__(self, head: nn.Linear | None, vocab_size: int, num_layers: int, temperature: float) -> None:
        self.head = head
        self.vocab_size, self.num_layers, self.temperature = vocab_size, num_layers, temperature

    def targets(
        self, batch: Mapping[str, Tensor], kd_mask_BT: Tensor | None, layers: tuple[int, ...]
    ) -> Targets:
        """As a live teacher's; the tokens ``kd_mask_BT`` are those that the cache holds."""
        states: dict[int, States] = {
            layer: (
                batch[f"teacher_q.{layer}"],
                batch[f"teacher_k.{layer}"],
                batch[f"teacher_v.{layer}"],
            )
            for layer in layers
        }
        if kd_mask_BT is None:
            return Targets(None, states)
        if self.head is not None:
            head = self.head.to(kd_mask_BT.device)
            hidden = batch["teacher_hidden"].to(head.weight.dtype)
            return Targets(_kd_of_hidden(head, hidden, self.temperature), states)

        top, top_log_p, rest_log_p = (batch[f"teacher_{name}"] for name in ("top", "top_log_p", "rest_log_p"))

        def loss(student: Tensor, *, rows: Rows, mask_N: Tensor | None) -> Tensor:
            kept = top[rows].long(), top_log_p[rows], rest_log_p[rows]
            return top_k_kd(student, *kept, temperature=self.temperature, mask_N=mask_N)

        return Targets(LogitsKd(loss), states)


def _kd_of_hidden(head: nn.Module, hidden_NE: Tensor, temperature: float) -> LogitsKd:
    logits_of = block_linear(head)

    @torch.no_grad()
    def logits(rows: Rows) -> Tensor:
        return logits_of(hidden_NE[rows])

    def loss(student: Tensor, teacher: Tensor, *, rows: Rows, mask_N: Tensor | None) -> Tensor:
        del rows
        return logits_kd(student, teacher, temperature=temperature, mask_N=mask_N)

    return LogitsKd(loss, logits)
