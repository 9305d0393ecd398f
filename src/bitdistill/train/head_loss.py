"""Losses of an output head's logits, in the memory of one block of tokens.

    loss = sum_p w_p L_p,   L_p = sum over tokens of l_p(z),   z = h W^T + b

Logits are tokens x vocabulary, by far the largest tensor of a step, and autograd would keep several of that size until
the backward pass. Here each block of tokens makes its logits, its losses and at once its gradients

    D = d loss / d z,   dh = D W,   dW += D^T h,   db += sum_N D

so that only ``dh`` and ``dW``, as large as h and W, outlive it, and nothing is computed twice. The losses
see a few rows of the block at a time, and D takes the place of z: what they keep for their own backward pass stays
small, so the block can be large enough for fast products.

Letters: N tokens, E hidden size, V vocabulary, P losses.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK_TOKENS = 512
"""Tokens whose logits exist together; fewer would read W and write dW more often than products hide."""

ROWS_LOGITS = 1 << 22
"""Logits that the losses see together. Their temporaries are several times as large."""

ROWS_LOGITS_CPU = 1 << 20
"""The same on a CPU, whose cache has room for them."""

BLOCK_WEIGHTS = 1 << 24
"""Elements of dW whose bf16 product exists before it is added in fp32."""

Losses = Callable[..., Tensor]
"""``(logits [n, V], rows) -> [P]``: sums over the n tokens ``rows``, differentiable in the logits. With
``beside`` there is a third argument, its rows."""


def head_loss(
    hidden_NE: Tensor,
    head: nn.Module,
    losses: Losses,
    weights_P: Tensor,
    beside: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses that are sums over tokens.

    Args:
        hidden_NE: final hidden states of the tokens.
        head: the output head, ``[n, E] -> [n, V]``. A plain ``nn.Linear`` goes the way above, in the dtype of autocast
            where that is on. Any other is called as a module, in checkpointed blocks that make their logits twice: an
            adapter's, one with hooks, one whose weight is a DTensor. FSDP2's root holds its parameters whole during its
            forward, so a head in the root's group is plain there; one that is a group of its own is not.
        losses: the losses of some tokens; their gradient goes to ``hidden_NE`` and the parameters of ``head`` only.
        weights_P: their weights, without a gradient.
        beside: what the logits are held against, such as a teacher's logits, made once for each block of rows,
            ``[n, ...]``.

    Returns:
        The weighted sum, and the P sums by themselves, detached; fp32, or fp64 for fp64 logits.

        The gradient of the sum exists before the backward pass, which multiplies it in place by the one it is given.
        Where that is not 1, another backward pass through the same graph (``retain_graph``) is autograd's RuntimeError.
    """
    way = _fused if _is_plain_linear(head) else _checkpointed
    return way(hidden_NE, head, losses, weights_P, beside)


def block_linear(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """``head`` without gradients, for many blocks: autocast would cast its weight again for each."""
    if not _is_plain_linear(head):
        return head
    weight, bias = _autocast(head.weight.detach()), head.bias if head.bias is None else _autocast(head.bias)
    return lambda hidden: F.linear(_autocast(hidden), weight, bias)


def _fused(
    hidden_NE: Tensor, head: nn.Module, losses: Losses, weights_P: Tensor, beside: Callable | None
) -> tuple[Tensor, Tensor]:
    inputs = (hidden_NE, head.weight, head.bias)
    gradients = d_hidden, d_weight, d_bias = tuple(_gradient_like(x) for x in inputs)
    values_P = weights_P.new_zeros(len(weights_P), dtype=_wide_dtype(hidden_NE))
    with torch.no_grad():
        # Cast once: without gradients autocast caches nothing and would cast W for every block.
        weight, bias = (None if x is None else _autocast(x) for x in inputs[1:])
        for rows, block in _blocks(hidden_NE):
            hidden = _autocast(block)
            logits = F.linear(hidden, weight, bias)
            others = () if beside is None else (beside(rows),)
            if all(gradient is None for gradient in gradients):
                values_P += losses(logits, rows, *others)
                continue
            values_P += _into_gradient(logits, losses, rows, weights_P, others)
            if d_hidden is not None:
                d_hidden[rows] = logits @ weight
            if d_weight is not None:
                _add_product(d_weight, logits, hidden)
            if d_bias is not None:
                d_bias += logits.sum(dim=0, dtype=d_bias.dtype)
            del logits, others  # or they would stay while the next block makes its own
        gradients = tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)
        )
    return _KnownGradients.apply(_weighted(values_P, weights_P), gradients, *inputs), values_P


def _checkpointed(
    hidden_NE: Tensor, head: nn.Module, losses: Losses, weights_P: Tensor, beside: Callable | None
) -> tuple[Tensor, Tensor]:
    def block_loss(hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        others = () if beside is None else (beside(rows),)
        values = losses(head(hidden), rows, *others)
        return _weighted(values, weights_P), values.detach()

    blocks = [checkpoint(block_loss, block, rows, use_reentrant=False) for rows, block in _blocks(hidden_NE)]
    loss, values_P = (torch.stack(parts).sum(dim=0) for parts in zip(*blocks, strict=True))
    return loss, values_P


class _KnownGradients(torch.autograd.Function):
    """A value whose gradients in its inputs were computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None
    ) -> Tensor:
        del inputs
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if upstream != 1:
            # In place: a second dW would be the largest tensor of the step.
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return None, None, *gradients


def _into_gradient(
    logits: Tensor, losses: Losses, rows: slice, weights_P: Tensor, others: tuple[Tensor, ...]
) -> Tensor:
    """The losses of a block; its logits are overwritten by the gradient of their weighted sum."""
    values_P = weights_P.new_zeros(len(weights_P), dtype=_wide_dtype(logits))
    most = ROWS_LOGITS_CPU if logits.device.type == "cpu" else ROWS_LOGITS
    step = max(1, most // logits.shape[1])
    for start in range(0, max(1, len(logits)), step):
        part = slice(start, start + step)
        here = slice(rows.start + start, min(rows.start + start + step, rows.stop))
        values, logits[part] = _with_gradient(
            logits[part], losses, here, weights_P, [other[part] for other in others]
        )
        values_P += values
    return values_P


def _with_gradient(
    logits: Tensor, losses: Losses, rows: slice, weights_P: Tensor, others: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The losses of some rows and the gradient of their weighted sum in their logits."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        values = losses(leaf, rows, *others)
        (gradient,) = torch.autograd.grad(_weighted(values, weights_P), leaf)
    return values.detach(), gradient


def _weighted(values_P: Tensor, weights_P: Tensor) -> Tensor:
    return (values_P * weights_P.to(values_P.dtype)).sum()  # autocast would round a product by @ to bf16


def _add_product(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``dW += D^T h``, summed over blocks in the dtype of dW."""
    if d_weight.dtype == d_logits.dtype:
        d_weight.addmm_(d_logits.T, hidden)
        return
    columns = max(1, BLOCK_WEIGHTS // d_weight.shape[1])
    for part, d_part in zip(d_weight.split(columns), d_logits.split(columns, dim=1), strict=True):
        part += d_part.T @ hidden


def _blocks(hidden_NE: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of tokens with the rows they are; one empty block of no tokens, so that there is a graph."""
    start = 0
    for block in hidden_NE.split(BLOCK_TOKENS):
        yield slice(start, start + len(block)), block
        start += len(block)


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether calling ``head`` is its product with a weight at hand and nothing else.

    Adapters, parametrizations and FSDP2 change the class, offloading the instance's forward.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)
        and "forward" not in vars(head)
        and not any(
            hooks for name, hooks in vars(head).items() if name.startswith(("_forward_", "_backward_"))
        )
    )


def _gradient_like(x: Tensor | None) -> Tensor | None:
    """Zeros to add gradients of ``x`` up in, fp32 at least; None if it wants none."""
    if x is None or not (x.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.zeros_like(x, dtype=_wide_dtype(x))


def _autocast(x: Tensor) -> Tensor:
    """What autocast makes of an operand of a matrix product."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
