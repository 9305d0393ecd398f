"""Latents of ternary weights as a parameter group of their own, which a tail of the training leaves where they are.

Latents that do not move keep their codes and their absmean scale. A learned scale stays with them: a code is its latent
over the scale, rounded, and would not survive the scale's moves. Both stay parameters with a gradient, so that DDP and
FSDP2 see in every step what they saw in the first; the gradient counts in ``max_grad_norm``.
"""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from ..config import TrainingConfig
from ..model import BitLinear
from .schedule import codes_are_frozen, learning_rate_factor


def split_latents(optimizer: Optimizer, model: nn.Module) -> None:
    """Move latents and learned scales from their groups to ones behind all others, which have the key ``latents``."""
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    latents = {id(p) for layer in layers for p in (layer.weight, layer.weight_scale)}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in latents]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in latents]
            optimizer.add_param_group(group | {"params": own, "latents": True})


def group_factors(
    optimizer: Optimizer, config: TrainingConfig, total_steps: int
) -> list[Callable[[int], float]]:
    """Factor on the peak learning rate as a function of the step, for each parameter group.

    A model without a group of latents has no tail.
    """
    has_tail = any("latents" in group for group in optimizer.param_groups)

    def schedule(tail: float) -> Callable[[int], float]:
        def factor(step: int) -> float:
            rate = learning_rate_factor(config, step, total_steps)
            return rate * tail if has_tail and codes_are_frozen(config, step, total_steps) else rate

        return factor

    return [schedule(0.0 if "latents" in g else config.freeze_codes_lr) for g in optimizer.param_groups]
