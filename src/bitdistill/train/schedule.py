"""Learning-rate, weight-decay and quantisation warm-up as plain functions of the step.

Being functions of the step alone, they need no state in a checkpoint and resume exactly.
"""

import math

from ..config import TrainingConfig

SOFTEST = 0.5
"""First temperature of soft codes: weights nearly as they are, clipped to one scale (0.04 scales off, RMS of
Gaussian ones), with slopes of 0.85 to 1.08 within half a scale. Colder, the gradient dies around 0 (0.44 at 0.3)."""

HARDEST = 0.02
"""Last temperature of soft codes. Colder, the few weights within T of a threshold, whose slope is 1 / (2 T), would own
the gradient's norm; the step to hard codes moves weights by 0.05 scales (root mean square)."""


def learning_rate_factor(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate at optimizer step ``step`` (0-based) of ``total_steps``.

    ``two_stage`` follows the b1.58 training tips: linear decay to 0 after the warm-up, its line multiplied by
    ``two_stage_drop`` in the second half of the run. ``two_stage_cosine`` follows BitNet b1.58 2B4T (arXiv 2504.12285):
    a cosine that would reach 0 at the end, left in the middle of the run for another that falls from
    ``two_stage_drop`` to 0. The report gives no numbers and does not say how far the first cosine reaches.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    is_second = _in_second_stage(step, total_steps)
    if config.schedule == "two_stage_cosine" and is_second:
        return config.two_stage_drop * _cosine(min(1.0, 2 * step / total_steps - 1))
    if config.schedule in ("cosine", "two_stage_cosine"):
        return _cosine(progress)
    decay = 1.0 - progress
    return decay * config.two_stage_drop if config.schedule == "two_stage" and is_second else decay


def weight_decay_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Weight decay at optimizer step ``step`` of ``total_steps``.

    ``half_then_zero``: the training tips; ``cosine_then_zero``: 2B4T, whose first stage has a cosine with a peak of
    0.1, taken here as that of the learning rate.
    """
    if config.weight_decay_schedule == "constant":
        return config.weight_decay
    if _in_second_stage(step, total_steps):
        return 0.0
    is_cosine = config.weight_decay_schedule == "cosine_then_zero"
    return config.weight_decay * (_cosine(step / total_steps) if is_cosine else 1.0)


def _in_second_stage(step: int, total_steps: int) -> bool:
    """Learning rate and weight decay change at the same step."""
    return step >= total_steps / 2


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def share_of_steps(ratio: float, total_steps: int) -> int:
    """``ratio * total_steps``, rounded up; the product of 0.07 and 100, which is 7.000000000000001, is seven."""
    return math.ceil(ratio * total_steps - 1e-9)


def quant_lambda_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Share of quantisation in the forward pass: rises linearly to 1 over the quantisation warm-up."""
    warmup_steps = share_of_steps(config.quant_warmup_ratio, total_steps)
    return 1.0 if step >= warmup_steps else step / warmup_steps


def soft_temperature_at(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Temperature of the soft codes (``quant.soft_ternarize``) at optimizer step ``step``; 0 where they are hard.

    It falls linearly over the warm-up, from SOFTEST to HARDEST, so that weights come closer to their codes at an even
    rate: for Gaussian weights their mean distance is about 0.4 T scales.
    """
    quant_lambda = quant_lambda_at(config, step, total_steps)
    if config.quant_warmup_form == "mix" or quant_lambda == 1.0:
        return 0.0
    return SOFTEST + (HARDEST - SOFTEST) * quant_lambda


def activations_are_int4(config: TrainingConfig, step: int, total_steps: int) -> bool:
    """Whether optimizer step ``step`` (0-based) belongs to the tail in which activations have 4 bits."""
    return step >= total_steps - share_of_steps(config.int4_activations_ratio, total_steps)


def codes_are_frozen(config: TrainingConfig, step: int, total_steps: int) -> bool:
    """Whether optimizer step ``step`` (0-based) belongs to the tail in which the latents of ternary weights stay."""
    return step >= total_steps - share_of_steps(config.freeze_codes_ratio, total_steps)
