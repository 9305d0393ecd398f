"""The losses of BitDistill as functions of tensors.

    L = CE + lambda * logits KD + gamma * relation KD                                    (eq. 13)

Every function returns a *sum*, and the caller divides by a count taken over the whole optimizer step. So
the loss does not depend on batch size, sequence length, head count, or on how a batch is split by
gradient accumulation or over processes.

Letters: B batch, T tokens, V vocabulary, H heads, E width of a head, N selected tokens.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..data.prompts import IGNORE_INDEX
from .head_loss import head_loss

BLOCK_RELATIONS = 1 << 22
"""Relations (heads x rows x columns) that exist at the same time."""

NO_MASS = -1e30
"""Log of no mass at all: finite, because the difference of two empty rests must not be NaN."""


def shifted_labels(labels_BT: Tensor) -> Tensor:
    """Labels moved so that position t holds the token that position t predicts; the last predicts nothing."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def cross_entropy(hidden_NE: Tensor, head: torch.nn.Module, labels_N: Tensor) -> Tensor:
    """Sum of next-token cross-entropies, ``-log softmax(head(h))[label]``, in fp32 at least.

    Args:
        hidden_NE: final hidden states of the tokens that predict, ``[N, E]``.
        head: the output head, ``[N, E] -> [N, V]``; see `head_loss`.
        labels_N: the tokens they should predict, ``[N]`` int64; IGNORE_INDEX adds nothing.
    """

    def losses(logits: Tensor, rows: slice) -> Tensor:
        return label_loss(logits, labels_N[rows]).reshape(1)

    return head_loss(hidden_NE, head, losses, hidden_NE.new_ones(1))[0]


def label_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of the cross-entropies of some tokens' logits, in fp32 at least."""
    return F.cross_entropy(_wide(logits_NV), labels_N, ignore_index=IGNORE_INDEX, reduction="sum")


def logits_kd(
    student_NV: Tensor, teacher_NV: Tensor, *, temperature: float, mask_N: Tensor | None = None
) -> Tensor:
    """Sum over tokens of ``KL(softmax(teacher / tau) || softmax(student / tau))`` (eq. 8-9), no tau^2.

    Args:
        student_NV, teacher_NV: logits ``[N, V]``; computed in fp32 (fp64 stays fp64). The teacher's are
            constants: they get no gradient.
        mask_N: tokens that count, bool ``[N]``; all if None.
    """
    return _Kl.apply(student_NV, teacher_NV.detach(), temperature, mask_N)


class _Kl(torch.autograd.Function):
    """``logits_kd`` with its gradient, ``(q - p) / tau``, written out: autograd would go over N x V twice as often."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float, mask_N: Tensor | None
    ) -> Tensor:
        log_q, log_p = (F.log_softmax(_wide(x) / temperature, dim=-1) for x in (student_NV, teacher_NV))
        p = log_p.exp()
        kl_N = log_p.sub_(log_q).mul_(p).sum(dim=-1)
        difference = log_q.exp_().sub_(p)
        if mask_N is not None:
            kl_N = kl_N.masked_fill(~mask_N, 0.0)
            difference.masked_fill_(~mask_N[:, None], 0.0)
        ctx.save_for_backward(difference)
        ctx.temperature, ctx.dtype = temperature, student_NV.dtype
        return kl_N.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return (difference * (upstream / ctx.temperature)).to(ctx.dtype), None, None, None


def top_k_log_p(logits_NV: Tensor, k: int, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at a temperature of the k likeliest tokens, and of all others together.

    Returns:
        The k entries ``[N, k]`` int64, their ``log softmax(logits / tau)`` ``[N, k]``, and the log of the mass of the
        rest ``[N]``, very low if nothing is left; fp32, or fp64 for fp64 logits.
    """
    log_p = F.log_softmax(_wide(logits_NV) / temperature, dim=-1)
    top = log_p.topk(k, dim=-1)
    return top.indices, top.values, log_p.scatter(-1, top.indices, NO_MASS).logsumexp(dim=-1)


def top_k_kd(
    student_NV: Tensor,
    top_NK: Tensor,
    top_log_p_NK: Tensor,
    rest_log_p_N: Tensor,
    *,
    temperature: float,
    mask_N: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of a KL over k + 1 buckets: k entries of the vocabulary and all others as one.

        sum_{i in top} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest),   q = softmax(student / tau)

    With k = V it is ``logits_kd``. Merging the others can only lower it (log-sum inequality): how the student spreads
    the mass of the rest costs nothing.

    Args:
        student_NV: logits ``[N, V]``.
        top_NK, top_log_p_NK, rest_log_p_N: of the teacher, as `top_k_log_p` gives them at the same temperature; rounded
            ones are normalised again.
        mask_N: tokens that count, bool ``[N]``; all if None.
    """
    teacher = torch.cat((_wide(top_log_p_NK), _wide(rest_log_p_N)[:, None]), dim=-1)
    return _MergedKl.apply(student_NV, top_NK, F.log_softmax(teacher, dim=-1), temperature, mask_N)


class _MergedKl(torch.autograd.Function):
    """``top_k_kd`` with its gradient written out, as `_Kl`.

    d KL / d z_i = (q_i - p_i) / tau of the top,   q_j / q_rest (q_rest - p_rest) / tau of the rest
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        top_NK: Tensor,
        log_p_NB: Tensor,
        temperature: float,
        mask_N: Tensor | None,
    ) -> Tensor:
        x = _wide(student_NV) / temperature
        top = x.gather(-1, top_NK)
        rest = x.scatter_(-1, top_NK, NO_MASS).logsumexp(dim=-1, keepdim=True)
        # Both are logits of the k + 1 buckets: the normaliser over the buckets is that over the vocabulary.
        log_q_NB = F.log_softmax(torch.cat((top, rest), dim=-1), dim=-1)
        difference_NB = log_q_NB.exp() - log_p_NB.exp()
        kl_N = F.kl_div(log_q_NB, log_p_NB, reduction="none", log_target=True).sum(dim=-1)
        if mask_N is not None:
            kl_N = kl_N.masked_fill(~mask_N, 0.0)
            difference_NB = difference_NB.masked_fill(~mask_N[:, None], 0.0)
        ctx.save_for_backward(x, rest, top_NK, difference_NB)
        ctx.temperature, ctx.dtype = temperature, student_NV.dtype
        return kl_N.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, rest, top_NK, difference_NB = ctx.saved_tensors
        buckets = difference_NB * (upstream / ctx.temperature)
        gradient = (x - rest).exp_().mul_(buckets[:, -1:]).scatter_(-1, top_NK, buckets[:, :-1])
        return gradient.to(ctx.dtype), None, None, None, None


def relation_kd(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    *,
    heads: int,
    form: Literal["scaled_dot", "cosine"],
    temperature: float = 1.0,
    query_mask_BT: Tensor | None = None,
    key_mask_BT: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention-relation distillation of one layer, summed over Q, K, V and averaged over heads.

        R = softmax(S / tau),  loss = sum_{Q,K,V} 1/A sum_a sum_t KL(R_teacher[a,t] || R_student[a,t])

    ``scaled_dot`` (eq. 10-12): ``S = A A^T / sqrt(d)``, d the width of a relation head.
    ``cosine`` (Algorithm 1 and the authors' code): the rows of A are L2-normalised first, no sqrt(d).

    Args:
        student, teacher: the Q, K, V states of a layer, each ``[B, heads of that state, T, E]``. Heads are
            concatenated and split again into ``heads`` relation heads, so widths and head counts may differ
            between the two models and between Q and K, V.
        heads: relation heads A; 0 keeps each state's own heads, which must then agree.
        query_mask_BT: rows that count, bool ``[B, T]``; all if None.
        key_mask_BT: columns that a row may relate to, bool ``[B, T]``; all if None.
        causal: a row relates only to itself and earlier columns.

    Returns:
        The sum over the rows of the batch; divide by the number of counted rows.

    Raises:
        ValueError: a state cannot be split into that many heads.
    """
    total = student[0].new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    for state_s, state_t in zip(student, teacher, strict=True):
        relation_s = _split_heads(state_s, heads)
        relation_t = _split_heads(state_t, heads)
        if relation_s.shape[1] != relation_t.shape[1]:
            raise ValueError(
                f"student and teacher have {relation_s.shape[1]} and {relation_t.shape[1]} heads here: "
                "set distill.relation_heads to a number that divides both widths"
            )
        relation_heads = relation_s.shape[1]
        for (start, rows, block_s), (_, _, block_t) in zip(
            _relation_blocks(relation_s), _relation_blocks(relation_t), strict=True
        ):
            sequences = slice(start, start + len(block_s))
            masks = (None if m is None else m[sequences] for m in (query_mask_BT, key_mask_BT))
            # The relations of a block live only while it is worked on; the backward pass makes them again.
            inputs = (block_s, block_t, rows, form, temperature, *masks, causal)
            # No check that both times agree: it compares devices, which a trace on the meta device makes up.
            kl = checkpoint(_relation_kl, *inputs, use_reentrant=False, determinism_check="none")
            total = total + kl / relation_heads
    return total


def _relation_blocks(state_BATE: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Blocks of at most BLOCK_RELATIONS relations: whole sequences, else heads of one, else rows of one head.

    Yields:
        The first sequence of the block, its rows, and its states ``[b, a, T, E]`` with all T columns.
    """
    batch, heads, tokens, _ = state_BATE.shape
    num_sequences, num_heads, num_rows = (
        min(max(1, BLOCK_RELATIONS // relations), most)
        for relations, most in ((heads * tokens * tokens, batch), (tokens * tokens, heads), (tokens, tokens))
    )
    # Split, not sliced: the gradients of slices would each be as large as all states.
    for index, sequences in enumerate(state_BATE.split(num_sequences)):
        for block in sequences.split(num_heads, dim=1):
            for row in range(0, tokens, num_rows):
                yield index * num_sequences, slice(row, row + num_rows), block


def _relation_kl(
    student_BATE: Tensor,
    teacher_BATE: Tensor,
    rows: slice,
    form: str,
    temperature: float,
    query_mask_BT: Tensor | None,
    key_mask_BT: Tensor | None,
    causal: bool,
) -> Tensor:
    """Sum over ``rows`` and heads of the KL between the relations of some sequences.

    Autocast is off here: under bf16 the matrix product and the softmax round by more than the two relations
    differ late in training, and the gradient turns away from the true one.
    """
    mask = _relation_mask(student_BATE, rows, key_mask_BT, causal)
    with torch.autocast(student_BATE.device.type, enabled=False):
        log_s = _log_relations(student_BATE, rows, form, temperature, mask)
        log_t = _log_relations(teacher_BATE, rows, form, temperature, mask)
    kl = log_t.exp() * (log_t - log_s)
    if mask is not None:
        kl = kl.masked_fill(~mask, 0.0)
    kl_BR = kl.sum(dim=(1, -1))
    if query_mask_BT is not None:
        kl_BR = kl_BR.masked_fill(~query_mask_BT[:, rows], 0.0)
    return kl_BR.sum()


def _log_relations(
    state_BATE: Tensor, rows: slice, form: str, temperature: float, mask: Tensor | None
) -> Tensor:
    """Log of the relations ``[B, A, rows, T]``; ``mask`` broadcasts to that shape."""
    state = _wide(state_BATE)
    if form == "cosine":
        state = F.normalize(state, dim=-1)
    scores = state[:, :, rows] @ state.transpose(-1, -2)
    if form == "scaled_dot":
        scores = scores / math.sqrt(state.shape[-1])
    scores = scores / temperature
    if mask is not None:
        # A finite floor, not -inf: log_t - log_s of two excluded columns must not be NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    return F.log_softmax(scores, dim=-1)


def _relation_mask(state: Tensor, rows: slice, key_mask_BT: Tensor | None, causal: bool) -> Tensor | None:
    """Bool ``[B, 1, rows, T]`` or ``[rows, T]``: what a row may relate to, which always includes itself."""
    column = torch.arange(state.shape[2], device=state.device)
    row = column[rows, None]
    mask = None
    if key_mask_BT is not None:
        mask = key_mask_BT[:, None, None] | (row == column)
    if causal:
        mask = row >= column if mask is None else mask & (row >= column)
    return mask


def _split_heads(state_BHTE: Tensor, heads: int) -> Tensor:
    """``[B, H, T, E] -> [B, heads, T, H * E / heads]``, head after head."""
    batch, own_heads, tokens, width = state_BHTE.shape
    if heads in (0, own_heads):
        return state_BHTE
    if own_heads * width % heads:
        raise ValueError(
            f"states of width {own_heads * width} do not split into {heads} relation heads: "
            "set distill.relation_heads to a divisor"
        )
    return state_BHTE.transpose(1, 2).reshape(batch, tokens, heads, -1).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """fp32 at least: softmax of bf16 logits loses the tail that distillation is about."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
