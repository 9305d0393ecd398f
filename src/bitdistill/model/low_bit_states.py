"""Low-bit queries, keys and values (BitNet v2, arXiv 2504.18415, and BitNet a4.8, arXiv 2411.04965).

Queries and keys are quantised behind the rotary embedding, values as they are, per token and head
(``quant.fake_quantize_state``), in an attention function registered with transformers that calls the one the user
chose. At every step it sees the whole cache, which holds unquantised states: codes depend on their own state alone, so
every step finds the same ones that a cache of codes would hold. The first token of a sequence (the papers' BOS)
keeps keys and values of 8 bits; which it is, behind left padding too, a hook on the decoder finds and hands down.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .quant import fake_quantize_state

QUERY_BITS = (16, 8, 4)
KV_BITS = (16, 8, 4, 3)
UNQUANTISED = (16, 16)
"""``state_bits`` of an attention whose queries, and keys and values, are left alone."""
START_BITS = 8
"""Bits of the first token's keys and values."""

_PREFIX = "bitdistill_low_bit_"
_WRAPPED = ("sdpa", "eager")
"""Attention functions that are wrapped, beside those of this package."""


def quantize_states(model: PreTrainedModel, query_bits: int, kv_bits: int) -> None:
    """Quantise the attention states of a decoder from now on, in place; 16 bits leave them alone.

    Gradients are straight-through. A second call changes the bits.

    Raises:
        ValueError: bits that there are none of, or a model without causal attention that transformers dispatches.
    """
    for name, bits, allowed in (("query_bits", query_bits, QUERY_BITS), ("kv_bits", kv_bits, KV_BITS)):
        if bits not in allowed:
            raise ValueError(f"{name} = {bits!r}: use one of {', '.join(map(str, allowed))}")
    decoder = model.base_model
    layers = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
    is_low = (query_bits, kv_bits) != UNQUANTISED
    if is_low and not (layers and all(map(_is_dispatched, layers))):
        raise ValueError(
            f"query_bits = {query_bits}, kv_bits = {kv_bits}: {type(model).__name__} has no causal attention that "
            "transformers' AttentionInterface dispatches, so its states cannot be quantised; leave both at 16"
        )
    if is_low and not getattr(decoder, "has_low_bit_states", False):
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.has_low_bit_states = True  # type: ignore[assignment]
    for layer in layers:
        layer.state_bits = (query_bits, kv_bits)  # type: ignore[assignment]


def _is_dispatched(attention: nn.Module) -> bool:
    """Whether a module is causal attention that asks transformers for its attention function."""
    code = sys.modules[type(attention).__module__]
    return getattr(attention, "is_causal", False) and hasattr(code, "ALL_ATTENTION_FUNCTIONS")


def _before_decoder(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Select the wrapped attention function, whichever was chosen meanwhile, and say where sequences start."""
    chosen = decoder.config._attn_implementation
    if not chosen.startswith(_PREFIX):
        decoder.config._attn_implementation = _wrapped(chosen)
    given = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
    return args, kwargs | {"sequence_starts": _sequence_starts(given)}


def _wrapped(chosen: str) -> str:
    """Register the attention function ``chosen`` with quantised states; returns its name."""
    if chosen not in _WRAPPED and not chosen.startswith("bitdistill_"):
        raise ValueError(
            f"attn_implementation = {chosen!r} has not been seen to work with query_bits and kv_bits below 16; load "
            f"the model with one of {', '.join(_WRAPPED)}"
        )
    name = _PREFIX + chosen
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_low_bit_attention, chosen))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[chosen])
    return name


def _sequence_starts(given: Mapping[str, Any]) -> Tensor:
    """Which of the positions so far, cached ones first, are first tokens: bool ``[B, cached + new]``.

    A mask ``[B, cached + new]`` tells (its first real token); without one the positions do, several where sequences
    are packed into a row, and without either it is the first.
    """
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"][..., 0]
    batch, new = tokens.shape
    cache, mask, positions = (given.get(key) for key in ("past_key_values", "attention_mask", "position_ids"))
    cached = 0 if cache is None else int(cache.get_seq_length())
    places = torch.arange(cached + new, device=tokens.device).expand(batch, -1)
    real = torch.ones_like(places, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask[:, : cached + new].bool()
        starts = real & (real.cumsum(dim=1) == 1)
    elif positions is not None:
        starts = places == (cached + new - 1 - positions[:, -1:])
    else:
        starts = places == 0
    if positions is not None and not cached:
        starts = starts | ((positions == 0) & real)
    return starts


def _low_bit_attention(
    chosen: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    sequence_starts: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``chosen`` on quantised states: query ``[B, H, T, E]``, key and value ``[B, H_kv, S, E]`` with cached ones."""
    query_bits, kv_bits = module.state_bits  # type: ignore[misc]
    query = _quantized(query, query_bits)
    if kv_bits < 16:
        starts = _aligned(sequence_starts, key.shape[2])[:, None, :, None]
        key, value = (_with_starts(states, kv_bits, starts) for states in (key, value))
    if chosen == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[chosen]
    return attend(module, query, key, value, *args, **kwargs)  # type: ignore[no-any-return]


def _quantized(states: Tensor, bits: int) -> Tensor:
    return fake_quantize_state(states, bits) if bits < 16 else states


def _with_starts(states: Tensor, bits: int, starts: Tensor) -> Tensor:
    if bits == START_BITS:
        return _quantized(states, bits)
    return torch.where(starts, _quantized(states, START_BITS), _quantized(states, bits))


def _aligned(starts: Tensor, length: int) -> Tensor:
    """``starts`` for a cache of ``length`` places: a sliding window drops the oldest, a static cache has free ones."""
    total = starts.shape[1]
    if length <= total:
        return starts[:, total - length :]
    return torch.nn.functional.pad(starts, (0, length - total))
