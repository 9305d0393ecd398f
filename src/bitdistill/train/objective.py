"""What a training step computes: a module around the student whose forward returns the loss and its parts.

    LanguageModelling   CE                                             stage 2, every plain fine-tune
    Distillation        CE + lambda * logits KD + gamma * relation KD    stage 3 (eq. 13), stage 2 with a teacher

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
from .head_loss import head_loss
from .losses import (
    IGNORE_INDEX,
    cross_entropy,
    label_loss,
    relation_kd,
    shifted_labels,
)
from .taps import States, attention_layers, matched_layers, run_tapped
from .teacher import CachedTeacher, LiveTeacher, LogitsKd


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

    The teacher, running beside the student or read from its cache, is no part of this module's parameters or
    checkpoints. In evaluation mode the loss is that of the labels alone.
    """

    count_names: tuple[str, ...] = ("labels", "kd_tokens", "relation_rows")

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | CachedTeacher, config: DistillConfig
    ) -> None:
        super().__init__(student)
        self.distill = config  # not "config": Trainer takes that for the model's
        self.taught_by = (
            teacher
            if isinstance(teacher, CachedTeacher)
            else LiveTeacher(teacher, config.temperature, config.relation_states)
        )
        self.vocab_size = min(student.config.vocab_size, self.taught_by.vocab_size)
        self.layer_pairs = layer_pairs(config, len(attention_layers(student)), self.taught_by.num_layers)

    @property
    def teacher(self) -> PreTrainedModel:
        """The full-precision teacher that runs beside the student; there is none where it is cached."""
        assert isinstance(self.taught_by, LiveTeacher)
        return self.taught_by.model

    def shard_teacher(self) -> None:
        """Give each process a part of the teacher's decoder, where there is one."""
        if isinstance(self.taught_by, LiveTeacher):
            self.taught_by.shard()

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Labelled tokens, tokens of the logits KD, rows of the relation KD; int64 ``[3]``."""
        rows = real_tokens(batch).sum()
        if self.distill.relation_mask == "none":
            rows = torch.tensor(batch["input_ids"].numel(), device=rows.device)
        return torch.stack([super().counts(batch)[0], self._kd_mask(batch).sum(), rows])

    def _kd_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        return kd_mask(self.distill.kd_tokens, batch["labels"], real_tokens(batch))

    def losses(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and its parts, raw and weighted."""
        if not self.training:
            return super().losses(batch, totals)
        config, labels = self.distill, batch["labels"]
        layers_s, layers_t = (tuple(pair[side] for pair in self.layer_pairs) for side in (0, 1))
        hidden_s, states_s = run_tapped(self.student, batch, layers_s, config.relation_states)
        kd_mask_BT = self._kd_mask(batch) if config.lambda_logits else None
        taught = self.taught_by.targets(batch, kd_mask_BT, layers_t)
        if kd_mask_BT is not None and taught.logits_kd is not None:
            loss, ce, kd = self._head_losses(
                hidden_s, shifted_labels(labels), kd_mask_BT, taught.logits_kd, totals
            )
            parts = {
                "loss/ce": ce,
                "loss/logits_kd": kd,
                "loss/logits_kd_weighted": config.lambda_logits * kd,
            }
        else:
            loss = self.label_cross_entropy(hidden_s, labels) / totals[0]
            parts = {"loss/ce": loss}
        if config.gamma_relation:
            real = real_tokens(batch).bool()
            relation = self._relation_kd(states_s, taught.states, real) / totals[2]
            weighted = config.gamma_relation * relation
            loss = loss + weighted
            parts |= {"loss/relation_kd": relation, "loss/relation_kd_weighted": weighted}
        return loss, parts

    def _head_losses(
        self, hidden: Tensor, labels: Tensor, kd_mask_BT: Tensor, taught: LogitsKd, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``CE + lambda * logits KD`` with a graph, CE and logits KD; of logits that are made once for both.

        Args:
            hidden: final hidden states of the student, ``[B, T, E]``.
            labels: what each position predicts, ``[B, T]``.
            kd_mask_BT: positions of the logits KD, in whose order ``taught`` has its rows.
        """
        config = self.distill
        chosen = kd_mask_BT | (labels != IGNORE_INDEX)
        labels_N, kd_N = labels[chosen], kd_mask_BT[chosen]
        # Usually the KD counts all of them; where it does not, a token that it leaves out is shown any row.
        row_N = None if kd_N.all() else (kd_N.cumsum(dim=0) - 1).clamp(min=0)

        def teacher_logits(rows: slice) -> Tensor:
            return taught.logits(rows if row_N is None else row_N[rows])[:, : self.vocab_size]  # type: ignore[misc]

        def losses(logits: Tensor, rows: slice, *teacher: Tensor) -> Tensor:
            student = logits[:, : self.vocab_size]
            if row_N is None:
                kd = taught.loss(student, *teacher, rows=rows, mask_N=None)
            else:
                kd = taught.loss(student, *teacher, rows=row_N[rows], mask_N=kd_N[rows])
            return torch.stack((label_loss(logits, labels_N[rows]), kd))

        factors = (1.0, config.temperature**2 if config.tau_squared else 1.0)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scales = torch.tensor(factors, dtype=wide, device=totals.device) / totals[:2]
        weights = scales * scales.new_tensor((1.0, config.lambda_logits))
        head = self.student.get_output_embeddings()
        beside = teacher_logits if taught.logits is not None else None
        loss, sums = head_loss(hidden[chosen], head, losses, weights, beside)
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


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """1 where a token is no padding, int64 ``[B, T]``; packed sequences have no mask and no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def kd_mask(tokens: str, labels_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The positions of the logits KD, bool ``[B, T]``; ``tokens`` is ``distill.kd_tokens``."""
    if tokens == "all":
        return attention_mask_BT.bool()
    return shifted_labels(labels_BT) != IGNORE_INDEX


def layer_pairs(config: DistillConfig, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Student and teacher layers of the relation KD; none where its weight is 0.

    Raises:
        TrainingError: a layer does not exist.
    """
    try:
        pairs = matched_layers(student_depth, teacher_depth, config.relation_layers, config.teacher_layers)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    return pairs if config.gamma_relation else []


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
