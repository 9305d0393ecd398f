"""GPTQ (Frantar et al., arXiv 2210.17323) on the ternary grid, and latents that a student can start from.

The grid is that of the student: codes -1, 0, +1 times the absmean of the weights that share a scale. Of the original
weights where that is a tensor or a row; a block's is fixed when its first column is reached, from the weights as errors
before it have moved them, as GPTQ does with groups.
"""

import torch
from torch import Tensor

from ..model import TernarySpec
from ..model.quant import ternarize, weight_scale

LAZY_COLUMNS = 128
"""Columns whose errors reach the columns behind them together (section 3.3, step 2)."""

MARGIN = 1e-3
"""Least distance of a shifted latent from a threshold, in scales: more than a mean in fp32 can be off."""


@torch.no_grad()
def gptq(
    weight: Tensor, gram: Tensor, spec: TernarySpec, *, damping: float = 0.01, act_order: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix column by column, each column's error fed back into those that follow (Algorithm 1).

    Args:
        weight: ``[N, K]``, any float dtype.
        gram: ``X X^T`` of the calibration inputs, ``[K, K]``. The paper's Hessian is twice that; the factor cancels.
        damping: what is added to the diagonal, as a share of its mean (section 3.3, step 3).
        act_order: take columns in the order of falling diagonal; not with scales per block.

    Returns:
        The weights as they were when they were rounded, ``[N, K]`` fp32; their codes ``[N, K]`` fp32; and the scale,
        shaped as ``weight_scale`` shapes it, fp32: ``ternarize(latent, scale=scale)`` gives exactly these codes.

    A column without inputs is rounded to nearest and feeds nothing back. The reference implementation sets it to zero,
    which costs its output nothing either, but a student that is trained on would lose those weights.

    Raises:
        torch.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    granularity, block_size = spec.granularity, spec.block_size
    scale = weight_scale(weight, granularity, block_size)
    columns = weight.shape[1]
    group = block_size if granularity == "block" else columns
    rest, gram = weight.double(), gram.double()
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    rest, factor = rest[:, order], inverse_factor(gram[order][:, order], damping)
    latent, codes = torch.empty_like(rest, dtype=torch.float32), torch.empty_like(rest, dtype=torch.float32)
    for start in range(0, columns, group):
        if granularity == "block":
            scale[:, start // group] = weight_scale(rest[:, start : start + group], "channel")[:, 0]
        step = scale[:, start // group][:, None]
        for begin in range(start, min(start + group, columns), LAZY_COLUMNS):
            end = min(begin + LAZY_COLUMNS, start + group, columns)
            errors = torch.zeros_like(rest[:, begin:end])
            for column in range(begin, end):
                one = slice(column, column + 1)
                latent[:, one] = rest[:, one]
                codes[:, one], _ = ternarize(latent[:, one], scale=step)
                error = (rest[:, one] - codes[:, one] * step) / factor[column, column]
                rest[:, column + 1 : end] -= error * factor[column, column + 1 : end]
                errors[:, column - begin] = error[:, 0]
            rest[:, end:] -= errors @ factor[begin:end, end:]
    back = order.argsort()
    return latent[:, back], codes[:, back], scale


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, ``[K, K]`` fp64.

    Its row j is what Gaussian elimination leaves of the inverse for column j once the columns before it are fixed,
    over the square root of its diagonal (section 3.3, step 3).
    """
    diagonal = gram.diagonal()
    damped = gram + torch.diag(damping * diagonal.mean() + (diagonal == 0))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


@torch.no_grad()
def with_absmean(latent: Tensor, codes: Tensor, scale: Tensor, spec: TernarySpec) -> Tensor:
    """The latents nearest to ``latent`` that have these codes and, as their absmean, this scale.

    A code leaves its latent a cell: a magnitude above half the scale s, or below it for 0. Of all magnitudes in their
    cells with mean s the nearest are ``clip(|latent| + t, cell)``, with one t for the weights that share s (the
    conditions of Karush, Kuhn and Tucker). Their mean grows with t, from at most s / 2 beyond any bound as long as one
    code is not 0, so t is found by bisection. Where all codes of a scale are 0 there is no such t, for the mean of what
    is below s / 2 is not s: those latents become 0, which multiply as they did.

    Args:
        latent, codes, scale: as ``gptq`` returns them.

    Returns:
        ``[N, K]`` fp32; the absmean is exact up to the rounding of a mean in fp32, the codes are exact.
    """
    if spec.granularity == "tensor":
        parts = [(latent.reshape(1, -1), codes.reshape(1, -1), scale)]
    elif spec.granularity == "channel":
        parts = [(latent, codes, scale)]
    else:
        width = spec.block_size
        parts = list(
            zip(latent.split(width, dim=1), codes.split(width, dim=1), scale.split(1, dim=1), strict=True)
        )
    return torch.cat([_shifted(*part) for part in parts], dim=1).reshape(latent.shape)


def _shifted(latent: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``with_absmean`` where every row of ``[groups, weights]`` shares one scale of ``[groups, 1]``."""
    magnitude, step, used = latent.double().abs(), scale.double(), codes != 0
    lower = used * step * (0.5 + MARGIN)
    upper = torch.where(used, torch.inf, step * (0.5 - MARGIN))
    count = used.sum(dim=1, keepdim=True)
    low = -magnitude.amax(dim=1, keepdim=True)
    high = step * latent.shape[1] / count.clamp(min=1)
    for _ in range(64):  # halvings: to the last bit of fp64
        middle = (low + high) / 2
        too_large = torch.clamp(magnitude + middle, lower, upper).mean(dim=1, keepdim=True) > step
        low, high = torch.where(too_large, low, middle), torch.where(too_large, middle, high)
    shifted = torch.clamp(magnitude + high, lower, upper) * (count > 0)
    return torch.where(latent < 0, -shifted, shifted).float()
