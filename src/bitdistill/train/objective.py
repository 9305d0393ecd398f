"""What a training step computes: a module around the student whose forward returns the loss and its parts.

    LanguageModelling   CE                                             stage 2, every plain fine-tune
    Distillation        CE + lambda * logits KD + gamma * relation KD    stage 3 (eq. 13)

An encoder's are in ``encoder_objective.py``.

The losses need hidden states and the output head, so they are computed inside this forward: the hooks
of DDP and FSDP around it then see every parameter that is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import DistillConfig
from ..errors import TrainingError
from .head_loss import block_linear, head_loss
from .losses import (
    IGNORE_INDEX,
    cross_entropy,
    label_loss,
    logits_kd,
    relation_kd,
    shifted_labels,
)
from .sharding import shard_frozen
from .taps import States, attention_layers, capture, matched_layers


class Objective(nn.Module):
    """A student and the loss of its training step."""

    count_names: tuple[str, ...] = ("labels",)
    """What a batch is counted in; losses are sums divided by these totals over an optimizer step."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student

    @property
    def _no_split_modules(self) -> list[str]:
        """The decoder layers, by class name, where accelerate looks for what FSDP2 is to shard one by one."""
        return list(self.student._no_split_modules)

    def recompute_layers(self) -> None:
        """Compute each layer of the student again in the backward pass instead of keeping what it made."""
        # transformers is renaming it.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(self.student, name) for name in names if hasattr(self.student, name))()

    def shard_teacher(self) -> None:
        """Shard what runs beside the student over the processes, as FSDP2 shards the student."""

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Totals of one micro-batch, int64 ``[len(count_names)]``."""
        raise NotImplementedError

    def forward(self, totals: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """Loss of one micro-batch.

        Args:
            totals: ``counts`` summed over the optimizer step.
            batch: ``input_ids``, ``labels`` and, where there is padding, ``attention_mask``: ``[B, T]`` int64; labels
                are IGNORE_INDEX where nothing is learnt.

        Returns:
            ``loss`` with a graph, and detached parts named as they are logged.
        """
        loss, parts = self.losses(batch, totals)
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts."""
        raise NotImplementedError


class LanguageModelling(Objective):
    """Next-token cross-entropy over the labelled tokens: stage 2 and every plain fine-tune."""

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Labelled tokens, int64 ``[1]``."""
        return (shifted_labels(batch["labels"]) != IGNORE_INDEX).sum().reshape(1)

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts."""
        hidden = self.student.base_model(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")
        ).last_hidden_state
        ce = self.label_cross_entropy(hidden, batch["labels"]) / totals[0]
        return ce, {"loss/ce": ce}

    def label_cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross-entropies of the labelled tokens of ``hidden`` ``[B, T, E]``."""
        targets = shifted_labels(labels)
        chosen = targets != IGNORE_INDEX
        return cross_entropy(hidden[chosen], self.student.get_output_embeddings(), targets[chosen])


class Distillation(LanguageModelling):
    """Stage 3: the student learns the labels, the teacher's distribution and its attention relations.

    The teacher runs without gradients and is no part of this module's parameters or checkpoints.
    """

    count_names: tuple[str, ...] = ("labels", "kd_tokens", "relation_rows")

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, config: DistillConfig) -> None:
        super().__init__(student)
        self.distill = config  # not "config": Trainer takes that for the model's
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: hidden from nn.Module
        self.vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)
        try:
            self.layer_pairs = matched_layers(
                len(attention_layers(student)),
                len(attention_layers(teacher)),
                config.relation_layers,
                config.teacher_layers,
            )
        except ValueError as error:
            raise TrainingError(str(error)) from error
        if not config.gamma_relation:
            self.layer_pairs = []

    @property
    def teacher(self) -> PreTrainedModel:
        """The full-precision teacher."""
        return self._teacher[0]

    def shard_teacher(self) -> None:
        """Give each process a part of the teacher's decoder; the head, read in blocks, stays whole."""
        names = self.teacher._no_split_modules
        layers = [module for module in self.teacher.modules() if type(module).__name__ in names]
        shard_frozen(self.teacher, layers)

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Labelled tokens, tokens of the logits KD, rows of the relation KD; int64 ``[3]``."""
        kd_tokens = self._kd_mask(batch["labels"], batch["attention_mask"]).sum()
        rows = batch["attention_mask"].sum()
        if self.distill.relation_mask == "none":
            rows = torch.tensor(batch["attention_mask"].numel(), device=rows.device)
        return torch.stack([super().counts(batch)[0], kd_tokens, rows])

    def _kd_mask(self, labels: Tensor, attention_mask: Tensor) -> Tensor:
        if self.distill.kd_tokens == "all":
            return attention_mask.bool()
        return shifted_labels(labels) != IGNORE_INDEX

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its parts, raw and weighted."""
        config = self.distill
        labels, attention_mask = batch["labels"], batch["attention_mask"]
        teacher = self.teacher
        if teacher.device != labels.device:
            teacher.to(labels.device)
        hidden_s, states_s = self._run(self.student, batch, 0)
        with torch.no_grad():
            hidden_t, states_t = self._run(teacher, batch, 1)
        if config.lambda_logits:
            kd_mask = self._kd_mask(labels, attention_mask)
            loss, ce, kd = self._head_losses(hidden_s, hidden_t, shifted_labels(labels), kd_mask, totals)
            parts = {
                "loss/ce": ce,
                "loss/logits_kd": kd,
                "loss/logits_kd_weighted": config.lambda_logits * kd,
            }
        else:
            loss = self.label_cross_entropy(hidden_s, labels) / totals[0]
            parts = {"loss/ce": loss}
        if config.gamma_relation:
            relation = self._relation_kd(states_s, states_t, attention_mask.bool()) / totals[2]
            weighted = config.gamma_relation * relation
            loss = loss + weighted
            parts |= {"loss/relation_kd": relation, "loss/relation_kd_weighted": weighted}
        return loss, parts

    def _run(
        self, model: PreTrainedModel, batch: Mapping[str, Tensor], side: int
    ) -> tuple[Tensor, dict[int, States]]:
        """Final hidden states and the tapped states of one model; ``side`` 0 is the student's, 1 the teacher's."""
        layers = tuple(pair[side] for pair in self.layer_pairs)
        with capture(model, layers, self.distill.relation_states) as states:
            hidden = model.base_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
        return hidden, states

    def _head_losses(
        self, hidden_s: Tensor, hidden_t: Tensor, labels: Tensor, kd_mask: Tensor, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``CE + lambda * logits KD`` with a graph, CE and logits KD; of logits that are made once for both.

        Args:
            hidden_s, hidden_t: final hidden states of student and teacher, ``[B, T, E]`` each.
            labels: what each position predicts, ``[B, T]``.
            kd_mask: positions of the logits KD, bool ``[B, T]``.
        """
        config = self.distill
        chosen = kd_mask | (labels != IGNORE_INDEX)
        labels_N, kd_N, hidden_t = labels[chosen], kd_mask[chosen], hidden_t[chosen]
        head_t = block_linear(self.teacher.get_output_embeddings())

        @torch.no_grad()
        def teacher_logits(rows: slice) -> Tensor:
            return head_t(hidden_t[rows])[:, : self.vocab_size]

        def losses(logits: Tensor, rows: slice, teacher: Tensor) -> Tensor:
            student = logits[:, : self.vocab_size]
            kd = logits_kd(student, teacher, temperature=config.temperature, mask_N=kd_N[rows])
            return torch.stack((label_loss(logits, labels_N[rows]), kd))

        factors = (1.0, config.temperature**2 if config.tau_squared else 1.0)
        wide = torch.promote_types(hidden_s.dtype, torch.float32)
        scales = torch.tensor(factors, dtype=wide, device=totals.device) / totals[:2]
        weights = scales * scales.new_tensor((1.0, config.lambda_logits))
        head_s = self.student.get_output_embeddings()
        loss, sums = head_loss(hidden_s[chosen], head_s, losses, weights, beside=teacher_logits)
        ce, kd = sums * scales
        return loss, ce, kd

    def _relation_kd(
        self, states_s: dict[int, States], states_t: dict[int, States], real_BT: Tensor
    ) -> Tensor:
        """Sum over rows, mean over the distilled layers."""
        masked = self.distill.relation_mask != "none"
        try:
            losses = [
                relation_kd(
                    states_s[layer_s],
                    states_t[layer_t],
                    heads=self.distill.relation_heads,
                    form=self.distill.relation_form,
                    temperature=self.distill.relation_temperature,
                    query_mask_BT=real_BT if masked else None,
                    key_mask_BT=real_BT if masked else None,
                    causal=self.distill.relation_mask == "causal",
                )
                for layer_s, layer_t in self.layer_pairs
            ]
        except ValueError as error:
            raise TrainingError(str(error)) from error
        return torch.stack(losses).mean()


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Compute dtype of ``precision`` on this machine, None for plain fp32. Latents stay fp32 either way."""
    if precision == "fp32":
        return None
    if precision == "bf16" or _device_has_bf16():
        return torch.bfloat16
    return None


def _device_has_bf16() -> bool:
    """Hardware bf16 products; emulated ones are slower than fp32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
