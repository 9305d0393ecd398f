"""Memory of a training step on one device, itemised: the step is traced on the meta device and its storages counted.

Planned as if ``gradient_checkpointing`` were off, which keeps more. Not counted: what the device's libraries hold for
themselves (a CUDA context and workspaces, about a gigabyte), and what an allocator loses to fragments.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..config import DistillConfig
from ..model import BitLinear
from ..train.objective import Distillation, LanguageModelling
from ..train.schedule import SOFTEST
from .models import Blueprint, make
from .tracing import DEVICE, META, LiveBytes, MetaStep


@dataclass(frozen=True)
class TrainingStep:
    """What decides the memory of a step."""

    student: Blueprint
    batch_size: int
    length: int
    """Tokens of the longest sequence."""
    labelled: int
    """Tokens of a sequence that have a label."""
    padded: bool
    """Whether sequences differ in length, so that a batch has an attention mask."""
    bf16: bool
    accumulation: int
    soft: bool = False
    """Whether a part of the steps has soft codes, which keep their slopes."""
    averaged: bool = False
    """Whether an average of the weights is kept."""
    teacher: Blueprint | None = None
    distill: DistillConfig | None = None


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device, of one process by itself."""

    weights: int
    """Latents in fp32, and buffers."""
    gradients: int
    optimizer: int
    """AdamW's two moments in fp32, and the average of the weights where one is kept."""
    teacher: int
    activations: int
    """What the student's decoder keeps for the backward pass."""
    losses: int
    """The most that the teacher's pass and the losses take on top: blocks of logits, the head's gradient, relations."""
    peak: int
    """The most at any moment of a step. Less than the sum: gradients grow while activations go."""
    unsharded: int
    """Largest group that FSDP2 makes whole: what is outside the layers, and two layers (one is fetched ahead)."""

    def replicated(self, processes: int) -> int:
        """With DDP, whose buckets hold the gradients once more."""
        return self.peak + (self.gradients if processes > 1 else 0)

    def sharded(self, processes: int) -> int:
        """With FSDP2, an estimate: parts of latents, gradients and moments; whole groups with their gradients."""
        if processes == 1:
            return self.peak
        parts = (self.weights + self.gradients + self.optimizer) // processes
        return parts + self.teacher + self.activations + self.losses + 2 * self.unsharded


def step_memory(step: TrainingStep) -> StepMemory:
    """Trace a step; one that differs only in what memory does not depend on is not traced again."""
    if step.distill is not None:
        neutral = DistillConfig()
        distill = replace(
            step.distill,
            learning_rate=neutral.learning_rate,
            teacher="",
            teacher_revision=None,
            teacher_cache="none",  # a cache spares the teacher's body; planned is the most that a step can take
            teacher_cache_dir="",
            cache_top_k=neutral.cache_top_k,
        )
        step = replace(step, distill=distill)
    return _traced(step)


@functools.lru_cache(maxsize=64)
def _traced(step: TrainingStep) -> StepMemory:
    student = make(step.student).train()
    for layer in (m for m in student.modules() if step.soft and isinstance(m, BitLinear)):
        layer.soft_temperature = SOFTEST
    teacher = None
    objective = LanguageModelling(student)
    if step.distill is not None:
        assert step.teacher is not None
        teacher = make(step.teacher)
        objective = Distillation(student, teacher, step.distill)
    models = [student] if teacher is None else [student, teacher]
    live = LiveBytes(t for model in models for t in _tensors(model))
    decoded: list[int] = []
    student.base_model.register_forward_hook(lambda *_: decoded.append(live.now))
    with torch.device(META), MetaStep(_selected(step)), live:
        if step.accumulation > 1:  # the gradients of earlier micro-batches are there
            for parameter in student.parameters():
                parameter.grad = torch.empty_like(parameter)
        before = live.peak = live.now
        losses = _forward(objective, step)
        losses_peak = live.peak
        torch.autograd.backward(get_gradient_edge(losses["loss"]), torch.ones(()))
    trained = [p for p in student.parameters() if p.requires_grad]
    weights, gradients = _bytes(student), sum(p.numel() * p.itemsize for p in trained)
    fixed = {
        "weights": weights,
        "optimizer": 2 * gradients + (weights if step.averaged else 0),
        "teacher": 0 if teacher is None else _bytes(teacher),
    }
    # When the optimizer moves the latents nothing of the step is left but gradients.
    peak = sum(fixed.values()) + max(live.peak, gradients)
    return StepMemory(
        **fixed,
        gradients=gradients,
        activations=decoded[0] - before,
        losses=losses_peak - decoded[0],
        peak=peak,
        unsharded=_largest_group(student),
    )


def _forward(objective: LanguageModelling, step: TrainingStep) -> dict[str, Tensor]:
    keys = ("input_ids", "labels", *(["attention_mask"] if step.padded else []))
    batch = {key: torch.zeros(step.batch_size, step.length, dtype=torch.int64) for key in keys}
    totals = torch.ones(len(objective.count_names))
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=step.bf16):
        return objective(totals, **batch)  # type: ignore[no-any-return]


def _selected(step: TrainingStep) -> int:
    """Tokens of a batch whose logits are made."""
    everything = step.distill is not None and step.distill.lambda_logits and step.distill.kd_tokens == "all"
    return step.batch_size * (step.length if everything else step.labelled)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers; tied ones once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in _tensors(module))


def _largest_group(student: nn.Module) -> int:
    layers = max((m for m in student.modules() if isinstance(m, nn.ModuleList)), key=len)
    largest = max(map(_bytes, layers))
    return _bytes(student) - sum(map(_bytes, layers)) + 2 * largest
