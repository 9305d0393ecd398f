"""The losses of BitDistill as functions of tensors.

    L = CE + lambda * logits KD + gamma * relation KD                                    (eq. 13)

Every function returns a *sum*, and the caller divides by a count taken over the whole optimizer step. So
the loss does not depend on batch size, sequence length, head count, or on how a batch is split by
gradient accumulation or over processes.

Letters: B batch, T tokens, V vocabulary, H heads, E width of a head, N selected tokens.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..data.prompts import IGNORE_INDEX

BLOCK_RELATIONS = 1 << 22
"""Relations (heads x tokens x tokens) that exist at the same time, in whole sequences."""

BLOCK_TOKENS = 256
"""Tokens whose logits are worked on together: a block stays in the processor's cache."""


def shifted_labels(labels_BT: Tensor) -> Tensor:
    """Labels moved so that position t holds the token that position t predicts; the last predicts nothing."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def cross_entropy(hidden_NE: Tensor, head: torch.nn.Module, labels_N: Tensor) -> Tensor:
    """Sum of next-token cross-entropies, ``-log softmax(head(h))[label]``.

    Args:
        hidden_NE: final hidden states of the tokens that predict, ``[N, E]``.
        head: the output head, ``[N, E] -> [N, V]``.
        labels_N: the tokens they should predict, ``[N]`` int64.

    Logits are made in blocks of tokens and widened to fp32; autograd keeps what the backward pass needs of each.
    """
    total = hidden_NE.new_zeros((), dtype=torch.promote_types(hidden_NE.dtype, torch.float32))
    for hidden, labels in zip(hidden_NE.split(BLOCK_TOKENS), labels_N.split(BLOCK_TOKENS), strict=True):
        logits = head(hidden)
        total = total + F.cross_entropy(_wide(logits), labels, reduction="sum")
    return total


def logits_kd(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float) -> Tensor:
    """Sum over tokens of ``KL(softmax(teacher / tau) || softmax(student / tau))`` (eq. 8-9), no tau^2.

    Args:
        student_NV, teacher_NV: logits ``[N, V]``; computed in fp32 (fp64 stays fp64).
    """
    student = F.log_softmax(_wide(student_NV) / temperature, dim=-1)
    teacher = F.log_softmax(_wide(teacher_NV) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


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
        mask_BTT = _relation_mask(relation_s, key_mask_BT, causal)
        batch, relation_heads, tokens, _ = relation_s.shape
        rows = max(1, BLOCK_RELATIONS // (relation_heads * tokens * tokens))
        for start in range(0, batch, rows):
            block = slice(start, start + rows)
            arguments = (
                relation_s[block],
                relation_t[block],
                form,
                temperature,
                mask_BTT if mask_BTT is None or mask_BTT.shape[0] == 1 else mask_BTT[block],
                None if query_mask_BT is None else query_mask_BT[block],
            )
            # The [A, T, T] relations of a block live only while it is worked on; the backward pass makes
            # them again.
            total = total + checkpoint(_relation_kl, *arguments, use_reentrant=False)
    return total


def _relation_kl(
    student_BATE: Tensor,
    teacher_BATE: Tensor,
    form: str,
    temperature: float,
    mask_BTT: Tensor | None,
    query_mask_BT: Tensor | None,
) -> Tensor:
    """Sum over rows, mean over heads, of the KL between the relations of some sequences.

    Autocast is off here: under bf16 the matrix product and the softmax round by more than the two relations
    differ late in training, and the gradient turns away from the true one.
    """
    mask = None if mask_BTT is None else mask_BTT[:, None]
    with torch.autocast(student_BATE.device.type, enabled=False):
        log_s = _log_relations(student_BATE, form, temperature, mask)
        log_t = _log_relations(teacher_BATE, form, temperature, mask)
    kl = log_t.exp() * (log_t - log_s)
    if mask is not None:
        kl = kl.masked_fill(~mask, 0.0)
    kl_BT = kl.sum(dim=-1).mean(dim=1)
    if query_mask_BT is not None:
        kl_BT = kl_BT.masked_fill(~query_mask_BT, 0.0)
    return kl_BT.sum()


def _log_relations(state_BATE: Tensor, form: str, temperature: float, mask: Tensor | None) -> Tensor:
    """Log of the relations ``[B, A, T, T]``; ``mask`` broadcasts to that shape."""
    state = _wide(state_BATE)
    if form == "cosine":
        state = F.normalize(state, dim=-1)
        scores = state @ state.transpose(-1, -2)
    else:
        scores = state @ state.transpose(-1, -2) / math.sqrt(state.shape[-1])
    scores = scores / temperature
    if mask is not None:
        # A finite floor, not -inf: log_t - log_s of two excluded columns must not be NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    return F.log_softmax(scores, dim=-1)


def _relation_mask(state: Tensor, key_mask_BT: Tensor | None, causal: bool) -> Tensor | None:
    """Bool ``[B or 1, T, T]``, True where a row may relate to a column; a row always relates to itself."""
    tokens = state.shape[2]
    mask = None
    if key_mask_BT is not None:
        own = torch.eye(tokens, dtype=torch.bool, device=state.device)
        mask = key_mask_BT[:, None, :] | own
    if causal:
        triangle = torch.ones(tokens, tokens, dtype=torch.bool, device=state.device).tril()[None]
        mask = triangle if mask is None else mask & triangle
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
