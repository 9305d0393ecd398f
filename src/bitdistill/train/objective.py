"""What a training step computes: a module around the student whose forward returns the loss and its parts.

The losses need hidden states and the output head, so they are computed inside this forward: the hooks
of DDP and FSDP around it then see every parameter that is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .losses import IGNORE_INDEX, cross_entropy, shifted_labels


class LanguageModelling(nn.Module):
    """Next-token cross-entropy over the labelled tokens: stage 2 and every plain fine-tune."""

    count_names: tuple[str, ...] = ("labels",)
    """What a batch is counted in; losses are sums divided by these totals over an optimizer step."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Totals of one micro-batch, int64 ``[len(count_names)]``."""
        return (shifted_labels(batch["labels"]) != IGNORE_INDEX).sum().reshape(1)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        totals: Tensor,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of one micro-batch.

        Args:
            input_ids, labels, attention_mask: ``[B, T]`` int64; labels are IGNORE_INDEX where nothing is learnt.
            totals: ``counts`` summed over the optimizer step.

        Returns:
            ``loss`` with a graph, and detached parts named as they are logged.
        """
        hidden = self.student.base_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        loss = self.label_cross_entropy(hidden, labels) / totals[0]
        return {"loss": loss, "loss/ce": loss.detach()}

    def label_cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies of the labelled tokens of ``hidden`` ``[B, T, E]``."""
        targets = shifted_labels(labels)
        chosen = targets != IGNORE_INDEX
        return cross_entropy(hidden[chosen], self.student.get_output_embeddings(), targets[chosen])


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Compute dtype of ``precision`` on a device, None for plain fp32. Latents stay fp32 either way."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else None
    return None


def _cpu_has_bf16() -> bool:
    """Hardware bf16 dot products; without them bf16 on a CPU is slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
