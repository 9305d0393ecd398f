"""The Hadamard transform of BitNet v2 (arXiv 2504.18415, section 2.2), in blocks, and the rule of their size.

    y = H x / sqrt(n),  H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]]

The matrix is symmetric and, so scaled, its own inverse: the gradient and the way back are the same transform. The
paper's dimensions are powers of two. Any other is cut into consecutive blocks of one size, each transformed by itself.

Every sum is a tree of single fp32 additions in a fixed order and one multiplication ends it, so that whatever computes
it by the same butterflies has the same bits.
"""

import math
from typing import Any

import torch
from torch import Tensor

HADAMARD_SITES = ("o_proj", "down_proj")
"""Linears of a layer whose input BitNet v2 transforms (H-BitLinear), by the decoders' names: the projection that ends
attention and the one that ends the feed-forward."""


def default_block(dim: int) -> int:
    """The largest power of two that divides ``dim``."""
    return dim & -dim


def resolve_block(dim: int, block: int = 0, what: str = "the input") -> int:
    """Size of the blocks that ``dim`` features are cut into: ``block``, or with 0 the default.

    Raises:
        ValueError: ``block`` is no power of two, or does not divide ``dim``; the message calls the features ``what``.
    """
    if block == 0:
        return default_block(dim)
    if block < 0 or block & (block - 1):
        raise ValueError(
            f"Hadamard block {block}: use a power of two, or 0 for the largest that divides {what}"
        )
    if dim % block:
        raise ValueError(
            f"Hadamard block {block} does not divide {what}, which has {dim} features: use {default_block(dim)} or a "
            "smaller power of two, or 0"
        )
    return block


def hadamard_transform(x: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform, natural (Sylvester) order, of every run of ``block`` features.

    Shapes: ``[..., K] -> [..., K]``, in fp32, or float64 where ``x`` is. ``O(K log block)``; differentiable. A weight
    ``[N, K]`` so transformed is ``W H^T``, which undoes the transform of its input.

    Raises:
        ValueError: ``block`` is no power of two, or does not divide ``K``.
    """
    if block < 1:
        raise ValueError(f"Hadamard block {block}: use a power of two")
    resolve_block(x.shape[-1], block)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _Hadamard.apply(x.to(wide), block)  # type: ignore[no-any-return]


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        ctx.block = block
        y = x.clone(memory_format=torch.contiguous_format)
        half = 1
        while half < block:
            low, high = y.view(-1, 2, half).unbind(1)
            total = low + high
            torch.sub(low, high, out=high)
            low.copy_(total)
            half *= 2
        return y.mul_(1 / math.sqrt(block))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return hadamard_transform(grad, ctx.block), None
