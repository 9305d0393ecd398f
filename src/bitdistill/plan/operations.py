"""Floating-point operations of training, by the count that is usual.

For a sequence of T tokens, of which K have a label, N weights in the decoder's linears, A = layers x query heads x head
width, H weights in the head, W the widths of Q, K and V together:

    student      6 N T + 12 A T^2 + 6 H K   two operations a weight forward, four backward
    teacher      2 N T +  4 A T^2 + 2 H K   K: the tokens of the logits KD
    relations    12 W T^2 a layer           six products: both models, both again in the backward pass, and its own two

Attention counts whole, not halved for causality or cut to windows. Norms, quantisers, Hadamard transforms (K log2
block additions of an input of K features), softmax and the optimizer are not in it; nor is evaluation.
"""

import time

import torch

from ..config import DistillConfig
from ..processes import process_state
from .models import Geometry


def student_flops(model: Geometry, length: float, labelled: float) -> float:
    """Forward and backward of one sequence."""
    return 6 * model.linear * length + 12 * model.attention * length**2 + 6 * model.head * labelled


def distillation_flops(
    student: Geometry, teacher: Geometry, config: DistillConfig, length: float, labelled: float
) -> float:
    """What the teacher and the losses held against it add for one sequence."""
    flops = 2 * teacher.linear * length + 4 * teacher.attention * length**2
    if config.lambda_logits:
        kd_tokens = length if config.kd_tokens == "all" else labelled
        flops += 2 * teacher.head * kd_tokens + 6 * student.head * (kd_tokens - labelled)
    if config.gamma_relation:
        flops += sum(12 * student.states[layer] * length**2 for layer in config.relation_layers)
    return flops


def measured_throughput(precision: str, seconds: float = 0.3) -> float:
    """Operations a second of a square matrix product on this process's device; ``fp32`` or ``bf16``."""
    device = process_state().device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type != "cpu" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()  # the first call sets libraries up
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            product = a @ a
        product[0, 0].item()  # waits for the device
        done += 4
    return float(f"{2 * size**3 * done / (time.perf_counter() - started):.3g}")
