"""Learning-rate, weight-decay and quantisation warm-up as plain functions of the step.

Being functions of the step alone, they need no state in a checkpoint and resume exactly.
"""

import math

from ..config import TrainingConfig


def learning_rate_factor(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate at optimizer step ``step`` (0-based) of ``total_steps``.

    ``two_stage`` follows the b1.58 training tips: linear decay to 0 after the warm-up, its line multiplied by
    ``two_stage_drop`` from the middle of that decay on.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    decay = 1.0 - progress
    if config.schedule == "two_stage" and progress >= 0.5:
        return decay * config.two_stage_drop
    return decay


def weight_decay_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Weight decay at optimizer step ``step`` of ``total_steps``."""
    if config.weight_decay_schedule == "half_then_zero" and step >= total_steps / 2:
        return 0.0
    return config.weight_decay


def quant_lambda_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Share of quantisation in the forward pass: rises linearly to 1 over the quantisation warm-up."""
    warmup_steps = math.ceil(config.quant_warmup_ratio * total_steps)
    return 1.0 if step >= warmup_steps else step / warmup_steps
