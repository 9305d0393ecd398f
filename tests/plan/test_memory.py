"""Traced memory is that of the step on the CPU: what autograd keeps to the byte, the peak as its allocator saw it."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import families
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, Qwen3Config

from bitdistill.config import DistillConfig
from bitdistill.model import TernarySpec
from bitdistill.plan.memory import TrainingStep, step_memory
from bitdistill.plan.models import Blueprint, config_text, make
from bitdistill.plan.tracing import META, MetaStep
from bitdistill.train.objective import Distillation, LanguageModelling
from bitdistill.train.surgery import refine

BATCH, LENGTH, LABELLED = 4, 24, 2
SUBLN = TernarySpec(norm_sites="subln")
AUTHORS = DistillConfig(kd_tokens="all", relation_heads=4, relation_mask="none", relation_layers=(0, -1))
REAL_TOKENS = BATCH * LENGTH - 1  # one is padding

STEPS = {
    # kind: what the student is, the distillation if there is one, whether sequences are padded, selected tokens
    "full precision": (None, None, False, BATCH * (LENGTH - 1)),
    "stage 2": (SUBLN, None, False, BATCH * (LENGTH - 1)),
    "learned scales": (
        TernarySpec(scale="learned", granularity="block", block_size=20),
        None,
        False,
        BATCH * (LENGTH - 1),
    ),
    "Hadamard transforms": (
        TernarySpec(activation_bits=4, hadamard={"o_proj": 0, "down_proj": 0}),
        None,
        False,
        BATCH * (LENGTH - 1),
    ),
    "task": (TernarySpec(norm_sites="none"), None, True, BATCH * LABELLED),
    "stage 3": (SUBLN, DistillConfig(), True, BATCH * LABELLED),
    "stage 3 of the authors": (TernarySpec(norm_sites="all"), AUTHORS, True, REAL_TOKENS),
    "stage 3 before RoPE": (SUBLN, DistillConfig(relation_states="pre_rope"), True, BATCH * LABELLED),
}
steps = pytest.mark.parametrize("kind", STEPS)
precisions = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def batch_of(padded: bool) -> dict[str, Tensor]:
    """A batch with labels; on whatever device is the default."""
    ids = torch.full((BATCH, LENGTH), 7)
    if not padded:
        return {"input_ids": ids, "labels": ids.clone()}
    labels = torch.full((BATCH, LENGTH), -100)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    labels[:, -LABELLED:] = 7
    mask[0, 0] = 0  # one that is all true would not be used
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def objective_of(
    build: Callable[[TernarySpec | None], PreTrainedModel],
    spec: TernarySpec | None,
    distill: DistillConfig | None,
) -> LanguageModelling:
    student = build(spec).train()
    return LanguageModelling(student) if distill is None else Distillation(student, build(None), distill)


def forward(objective: LanguageModelling, padded: bool, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    batch = batch_of(padded)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return objective(torch.ones(3), **batch)["loss"], batch


def saved_bytes(objective: LanguageModelling, padded: bool, bf16: bool) -> dict[str, int]:
    """Bytes that autograd keeps between the passes, beside parameters and the batch, by element type."""
    storages: dict[int, tuple[str, torch.UntypedStorage]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = str(tensor.dtype), storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, batch = forward(objective, padded, bf16)
    for tensor in (*objective.parameters(), *batch.values()):
        storages.pop(tensor.untyped_storage()._cdata, None)
    found: dict[str, int] = {}
    for dtype, storage in storages.values():
        found[dtype] = found.get(dtype, 0) + storage.nbytes()
    del loss
    return found


def both(make_model: Callable[..., PreTrainedModel], family: str) -> tuple[Callable, Callable]:
    """Builders of the same model: real, and on the meta device from its config alone."""

    def real(spec: TernarySpec | None) -> PreTrainedModel:
        model = make_model(family)
        return model if spec is None else refine(model, spec)[0]

    config = config_text(make_model(family).config)
    return real, lambda spec: make(Blueprint(config, spec))


def check_saved(make_model: Callable[..., PreTrainedModel], family: str, kind: str, bf16: bool) -> None:
    spec, distill, padded, selected = STEPS[kind]
    real, meta = both(make_model, family)
    expected = saved_bytes(objective_of(real, spec, distill), padded, bf16)
    with torch.device(META), MetaStep(selected):
        assert saved_bytes(objective_of(meta, spec, distill), padded, bf16) == expected


@precisions
@steps
def test_autograd_keeps_on_the_meta_device_what_it_keeps_on_the_cpu(make_model, kind, bf16):
    check_saved(make_model, "qwen3", kind, bf16)


@families
def test_autograd_keeps_the_same_for_every_family(make_model, family):
    check_saved(make_model, family, "stage 3", True)


def allocator_peak(objective: LanguageModelling, padded: bool, bf16: bool, folder: Path) -> int:
    """Most bytes that a forward and a backward pass hold on the CPU at a time, as torch's profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        forward(objective, padded, bf16)[0].backward()
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


@precisions
@pytest.mark.parametrize("kind", ["stage 2", "stage 3"])
def test_the_peak_is_the_allocators(make_model, tmp_path, kind, bf16):
    spec, distill, padded, _ = STEPS[kind]
    real, _ = both(make_model, "qwen3")
    objective = objective_of(real, spec, distill)
    measured = allocator_peak(objective, padded, bf16, tmp_path)
    base = config_text(make_model("qwen3").config)
    traced = step_memory(
        TrainingStep(
            student=Blueprint(base, spec),
            batch_size=BATCH,
            length=LENGTH,
            labelled=LABELLED if padded else LENGTH - 1,
            padded=padded,
            bf16=bf16,
            accumulation=1,
            teacher=distill and Blueprint(base),
            distill=distill,
        )
    )
    step = traced.peak - traced.weights - traced.optimizer - traced.teacher
    assert step == pytest.approx(measured, rel=0.01)
    assert traced.activations + traced.losses < step + traced.gradients


def test_weights_gradients_and_moments_are_four_bytes_a_parameter_each(make_model):
    model = make_model("llama")
    parameters = sum(p.numel() for p in model.parameters())
    memory = step_memory(plain_step(config_text(model.config)))
    assert memory.gradients == 4 * parameters
    assert memory.optimizer == 8 * parameters
    assert memory.weights == 4 * parameters + sum(b.numel() * b.itemsize for b in model.buffers())
    assert memory.replicated(1) == memory.sharded(1) == memory.peak
    assert memory.replicated(4) == memory.peak + memory.gradients
    assert memory.teacher == 0


def plain_step(config: str, **changes: int) -> TrainingStep:
    values = {"batch_size": 2, "length": 16, "labelled": 16, "accumulation": 1} | changes
    return TrainingStep(student=Blueprint(config), padded=False, bf16=False, **values)


def test_accumulated_gradients_stay_while_the_next_micro_batch_runs(make_model):
    config = config_text(make_model("llama").config)
    once, often = (step_memory(plain_step(config, accumulation=n)) for n in (1, 4))
    # A forward pass needs next to nothing but what it keeps, so all gradients come on top of it.
    assert 0.5 * once.gradients < often.peak - once.peak <= once.gradients
    assert often.activations == once.activations


def test_activations_grow_with_the_batch_and_nothing_else_does(make_model):
    config = config_text(make_model("llama").config)
    small, large = (step_memory(plain_step(config, batch_size=n)) for n in (3, 6))
    # Rotary tables and positions are the same for all sequences.
    assert large.activations == pytest.approx(2 * small.activations, rel=0.02)
    assert (large.weights, large.gradients, large.optimizer) == (
        small.weights,
        small.gradients,
        small.optimizer,
    )


def test_a_trace_of_a_large_model_takes_no_memory():
    """Two layers as wide as a model of 70B: 8 GB of weights, 200 GB of activations."""
    config = Qwen3Config(hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, vocab_size=128256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = step_memory(plain_step(config_text(config), batch_size=256, length=512, labelled=4))
    assert memory.peak > 1e11
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
